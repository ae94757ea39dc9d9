"""The adapter methods. One module per method, and this table: grep finds every one of them here."""

from __future__ import annotations

from collections.abc import Mapping

from peftkit.methods.base import Method
from peftkit.table import Table

_IN_PEFT = (
    "lora",
    "adalora",
    "adamss",
    "adaption_prompt",
    "beft",
    "boft",
    "c3a",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "lily",
    "ln_tuning",
    "loha",
    "lokr",
    "miss",
    "oft",
    "osf",
    "peanut",
    "poly",
    "psoft",
    "pvera",
    "randlora",
    "road",
    "shadow",
    "shira",
    "supertuning",
    "tinylora",
    "trainable_tokens",
    "unilora",
    "vblora",
    "vera",
    "waveft",
    "xlora",
    "cartridge",
    "cpt",
    "multitask_prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "prompt_tuning",
)
_OURS = ("full", "head", "bitfit", "bottleneck", "adapter_fusion")


METHODS: Mapping[str, Method] = Table({name: f"peftkit.methods.{name}:{name.upper()}" for name in (*_IN_PEFT, *_OURS)})
