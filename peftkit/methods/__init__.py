"""The adapter methods. One module per method, and this table: grep finds every one of them here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping

from peftkit.methods.base import Method

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
_OURS = ("full", "head", "bitfit", "bottleneck")


class _Methods(Mapping[str, Method]):
    """Name -> method; a module is read when its method is asked for, since reading all of them takes longer than a recipe."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> Method:
        if name not in self._names:
            raise KeyError(name)
        return _read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@functools.cache
def _read(name: str) -> Method:
    method: Method = getattr(importlib.import_module(f"peftkit.methods.{name}"), name.upper())
    return method


METHODS: Mapping[str, Method] = _Methods((*_IN_PEFT, *_OURS))
