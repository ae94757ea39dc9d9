"""The data formats. One function per format, and this table: grep finds every one of them here."""

from peftkit.formats.base import Format
from peftkit.formats.classification import CLASSIFICATION
from peftkit.formats.language import CHAT, INSTRUCTION, PROMPT_COMPLETION, SEQ2SEQ, TEXT

# The order is the order in which `format: auto` tries them: the most specific columns first.
FORMATS: dict[str, Format] = {item.name: item for item in (CHAT, CLASSIFICATION, PROMPT_COMPLETION, INSTRUCTION, SEQ2SEQ, TEXT)}


def detect_format(columns: frozenset[str]) -> Format | None:
    """The format that rows with these columns are in, or None."""
    return next((item for item in FORMATS.values() if item.matches(columns)), None)
