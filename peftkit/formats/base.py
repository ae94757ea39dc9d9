"""What a data format is: raw columns in, canonical columns out.

Canonical columns are where formats and tasks meet. A row has those of one line:

- `messages`: list of {role, content} and, with them, `tools`. A role is system, developer, user, assistant or tool. `content`
  is text, empty only beside `tool_calls`: [{type: "function", function: {name, arguments: a mapping}, id?}]. A turn may have
  `name`, `tool_call_id`, `reasoning_content`, and an assistant turn, where the row states it, `weight` (a float >= 0).
  `tools` is a list of {type: "function", function: {...}}.
- `prompt` + `completion`; `text`; `segments`: list of {text, train: whether it is learned}, used as they are.
- `chosen` + `rejected`: two conversations, as `messages` are, with the same turns before their answers (`tools` too); assistant
  turns that both share have the weight 0.
- `input_ids` + `labels`: lists of whole numbers. Each label is its own token's id, or IGNORED where nothing is learned. Labels
  that are neither are a sequence of their own, for a decoder, which `pretokenized.check_aligned` refuses for other tasks.
- `text` + `label` (and `text_pair`); `tokens` + `tags`; `question` + `context` + `answers` ({text, answer_start}, as in SQuAD);
  `anchor` + `positive` (and `negative`, a list, or `score`, a number).

Where rows have tasks, `task_id` comes with any of them. No text in them holds NUL or half a surrogate pair.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RawRow = Mapping[str, Any]
CanonicalRow = dict[str, Any]

IGNORED = -100  # label of a token that is not learned, as in torch.nn.functional.cross_entropy


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
        read: raw row to canonical row; with False the part to be learned may be missing (inference). Called by `convert`.
        example: a small good row.
        also_yields: other canonical columns that a row may get instead, by what is in it.
    """

    name: str
    summary: str
    yields: tuple[str, ...]
    matches: Callable[[frozenset[str]], bool]
    read: Callable[[RawRow, bool], CanonicalRow]
    example: RawRow
    also_yields: tuple[tuple[str, ...], ...] = ()

    def convert(self, row: RawRow, target: bool) -> CanonicalRow:
        """A raw row in canonical columns; without its target, and without need of one, for inference.

        Raises:
            RowError: the row is not in this format, or one of its texts is broken.
        """
        canonical = self.read(row, target)
        check_characters(canonical)
        return canonical

    def columns_of(self, canonical: CanonicalRow) -> tuple[str, ...]:
        """Which of its canonical columns a row with its target has: what the task must be able to read."""
        return next(columns for columns in (self.yields, *self.also_yields) if set(columns) <= canonical.keys())


def is_missing(value: Any) -> bool:
    """Whether a column is empty: null, or the NaN that readers of tables write there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: RawRow, *names: str, required: bool = True) -> str:
    """The first of the named columns as text; where none is required, the first that is not blank, or nothing.

    Raises:
        RowError: none of them is there (and one is required), or the value is not text, or blank while required.
    """
    for name in names:
        value = row.get(name)
        if is_missing(value):
            continue
        if not isinstance(value, str):
            raise RowError(f"column `{name}` holds {kind_of(value)}, not text")
        if value.strip():
            return value
        if required:
            raise RowError(f"column `{name}` is blank")
    if required:
        raise RowError(f"no column {names_text(names)}; the row has {columns_text(row)}")
    return ""


def flag_of(row: RawRow, name: str) -> bool | None:
    """A column that says true or false; None where it is empty.

    Raises:
        RowError: it says something else.
    """
    value = row.get(name)
    if is_missing(value) or isinstance(value, bool):
        return None if is_missing(value) else bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):  # CSV
        return value.strip().lower() == "true"
    raise RowError(f"column `{name}` holds {shown(value)}; it must be true or false")


def json_of(text: str, what: str) -> Any:
    """What a JSON text says.

    Raises:
        RowError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON ({error}): {shown(text)}") from error


def check_characters(canonical: CanonicalRow) -> None:
    """Refuse characters that are no text: every text of every format passes here.

    Raises:
        RowError: a text holds NUL, or half of a surrogate pair.
    """
    waiting: list[Any] = [canonical]
    while waiting:  # not recursive: tool arguments may be nested as deep as JSON allows
        value = waiting.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, dict):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(part for part in value if not isinstance(part, int))


def _check_text(text: str) -> None:
    place, name = text.find("\0"), "NUL (U+0000)"
    if place < 0 and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = error.start
            name = f"U+{ord(text[place]):04X}, half of a surrogate pair, as in a file that was cut or written wrongly"
    if place >= 0:
        raise RowError(f"a text holds, as character {place + 1} after {shown(text[max(0, place - 20) : place])}, {name}")


def names_text(names: tuple[str, ...]) -> str:
    """Alternatives, for messages."""
    return " or ".join(f"`{name}`" for name in names)


def columns_text(row: RawRow) -> str:
    """The columns of a row, for messages."""
    return ", ".join(f"`{name}`" for name in row) or "no columns"


def kind_of(value: Any) -> str:
    """The kind of a value in plain words."""
    names = {dict: "a mapping", list: "a list", int: "a number", float: "a number", bool: "true/false", str: "text"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: Any) -> str:
    """A value for messages, shortened."""
    return _SHORT.repr(value)
