"""What a data format is: raw columns in, canonical columns out.

Canonical columns are where formats and tasks meet: `messages` (list of {role, content}), `prompt` + `completion`, `text`,
`text` + `label` (and `text_pair`), `tokens` + `tags`, `question` + `context` + `answers` ({text, answer_start}, as in SQuAD),
`anchor` + `positive` (and `negative`, a list, or `score`, a number). Where rows have tasks, `task_id` comes with any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RawRow = Mapping[str, Any]
CanonicalRow = dict[str, Any]


class RowError(ValueError):
    """A row that a format or a task cannot read; the caller adds file and row number."""


@dataclass(frozen=True, eq=False, repr=False)  # one of a kind each; what is not generated starts faster
class Format:
    """One data format.

    Attributes:
        name: the value of `data.*.format`.
        summary: one line for messages and help: the columns it reads.
        yields: canonical columns of a row with its target.
        matches: whether rows with these columns look like this format (for `auto`).
        convert: raw row to canonical row; with `target=False` the part to be learned may be missing (inference).
    """

    name: str
    summary: str
    yields: tuple[str, ...]
    matches: Callable[[frozenset[str]], bool]
    convert: Callable[[RawRow, bool], CanonicalRow]


def text_of(row: RawRow, *names: str, required: bool = True) -> str:
    """The first of the named columns as text.

    Raises:
        RowError: none of them is there (and one is required), or the value is not text, or blank while required.
    """
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise RowError(f"column `{name}` holds {_kind(value)}, not text")
        if required and not value.strip():
            raise RowError(f"column `{name}` is blank")
        return value
    if required:
        wanted = " or ".join(f"`{name}`" for name in names)
        raise RowError(f"no column {wanted}; the row has {columns_text(row)}")
    return ""


def columns_text(row: RawRow) -> str:
    """The columns of a row, for messages."""
    return ", ".join(f"`{name}`" for name in row) or "no columns"


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", int: "a number", float: "a number", bool: "true/false"}
    return names.get(type(value), type(value).__name__)
