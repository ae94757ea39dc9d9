"""A table of things by name, each read from its module when it is asked for: reading all of them takes longer than a recipe."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Table(Mapping[str, T]):
    """Name -> thing.

    Args:
        places: name -> `module:NAME`, in order.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._read: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._read:
            module, _, attribute = self._places[name].partition(":")
            self._read[name] = getattr(importlib.import_module(module), attribute)
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
