"""The adapter methods. One module per method, and this table: grep finds every one of them here."""

from peftkit.methods.base import Method
from peftkit.methods.full import FULL
from peftkit.methods.head import HEAD
from peftkit.methods.lora import LORA

METHODS: dict[str, Method] = {method.name: method for method in (LORA, FULL, HEAD)}
