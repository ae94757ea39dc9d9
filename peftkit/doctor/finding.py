"""What `doctor` says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        part: packages, extras, machine, places or hub.
        name: what was looked at.
        state: `broken` alone makes `doctor` fail; `missing` is something optional, `note` something to know.
        text: what was found.
        remedy: the command that mends it, or what to do; empty where nothing is to be done.
    """

    part: str
    name: str
    state: State
    text: str
    remedy: str = ""
