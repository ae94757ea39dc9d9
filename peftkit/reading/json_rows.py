"""Rows in JSON: lines, lists, lists within an object, and SQuAD's nested articles."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from io import StringIO
from typing import Any

from peftkit.errors import DataError
from peftkit.formats.base import RowError

RowOrError = dict[str, Any] | RowError

_SPACE = re.compile(r"[ \t\r\n]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what the error handler `surrogateescape` makes of such bytes
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_INTEGER = re.compile(r"[:\[, \t\r\n-][0-9]{19}")
_TURNS = ("messages", "conversations")  # lists of mappings that are one row, not several
_PLAIN = json.JSONDecoder()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(f"the key `{next(name for name in names if names.count(name) > 1)}` stands twice in one JSON object")
    return row


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)


def text_fault(text: str) -> str | None:
    """What makes a text no text: NUL bytes, or bytes that are not UTF-8; None where it is sound."""
    if "\0" in text:
        return f"has NUL bytes (the first at character {text.index(chr(0)) + 1}); text has none"
    if not text.isascii() and (found := _NOT_UTF8.search(text)):
        byte = f"byte 0x{ord(found[0]) - 0xDC00:02x} (character {found.start() + 1})"
        return f"has the {byte}, which is not UTF-8; save the file as UTF-8"
    return None


def read_lines(lines: Iterator[str] | StringIO, shown: str) -> Iterator[tuple[str, RowOrError]]:
    """The rows of JSON lines, each with its line number.

    Raises:
        DataError: the file is one JSON document over several lines.
    """
    is_first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _row_of_line(line)
        if is_first and isinstance(row, RowError) and _opens_document(line):
            raise DataError(f"{shown}:{number}: holds one JSON document, not one row per line; call the file .json")
        is_first = False
        yield f"{shown}:{number}", row


def _opens_document(line: str) -> bool:
    return line.strip() in ("{", "[") or line.lstrip().startswith("[{")


def _row_of_line(line: str) -> RowOrError:
    if fault := text_fault(line):
        return RowError(fault)
    text = line.strip()
    try:
        value, end = _decode(text, 0)
        if end < len(text):
            raise json.JSONDecodeError("more follows after the row", text, end)
        return value
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        return RowError(f"not valid JSON: {error.msg} (column {error.colno})")


def _decode(text: str, start: int) -> tuple[dict[str, Any], int]:
    """The row that begins at `start`, and where it ends.

    Raises:
        RowError: it is no row that can be used. JSONDecodeError: it is no JSON, so that its end is not known.
    """
    try:
        value, end = _STRICT.raw_decode(text, start)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, start) from None
    except json.JSONDecodeError:
        raise
    except RowError:
        raise
    except ValueError as error:  # int() refuses thousands of digits
        raise json.JSONDecodeError(str(error).partition(";")[0], text, start) from None
    if not isinstance(value, dict):
        raise RowError(f"is {_kind(value)}, not a mapping of columns")
    if _is_suspect(text[start:end]) and (fault := _value_fault(value)):
        raise RowError(fault)
    return value, end


def _is_suspect(text: str) -> bool:
    """Whether a row's JSON may hold what no tokenizer or tensor takes; looks at every row, so it has to be fast."""
    has_escape = "\\u" in text and _SURROGATE.search(text) is not None
    return has_escape or _LONG_INTEGER.search(text) is not None or (not text.isascii() and _NOT_UTF8.search(text) is not None)


def _value_fault(value: Any, name: str = "") -> str | None:
    """Why a value cannot be used, with its column; None where it can."""
    if isinstance(value, dict | list):
        parts = [(name, part) for part in value]  # of a mapping: its keys
        parts += [(name or key, part) for key, part in value.items()] if isinstance(value, dict) else []
        return next((fault for inner, part in parts if (fault := _value_fault(part, inner))), None)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return f"column `{name}` holds an integer beyond 64 bits"
    if isinstance(value, str) and (fault := text_fault(value.replace("\0", ""))):
        return f"column `{name}` {fault}"
    if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        return f"column `{name}` holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    return None


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_document(text: str, shown: str) -> Iterator[tuple[str, RowOrError]]:
    """The rows of a JSON document (a list of rows, an object with one such list, or SQuAD), numbered from 1.

    JSON lines under the name of a document are read as such.

    Raises:
        DataError: it is no JSON, or holds no list of rows.
    """
    if "\0" in text:
        raise DataError(f"{shown}:{text.count(chr(10), 0, text.index(chr(0))) + 1}: has NUL bytes; text has none")
    start = _skip(text, 0)
    if start == len(text):
        raise DataError(f"{shown}: is empty")
    try:
        if text[start] == "{":
            yield from _object_rows(text, start, shown)
        elif text[start] == "[":
            yield from _flat(_list_rows(text, start, shown), shown)
        else:
            raise DataError(f"{shown}: holds {_kind(_PLAIN.decode(text.strip()))}, not a list of rows")
    except json.JSONDecodeError as error:
        raise DataError(f"{shown}: not valid JSON in line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{shown}: not valid JSON: nested too deeply") from error


def _object_rows(text: str, start: int, shown: str) -> Iterator[tuple[str, RowOrError]]:
    lists, end = _lists_in(text, start)
    if _skip(text, end) < len(text):
        if text[_skip(text, end)] != "{":
            raise json.JSONDecodeError("more follows after the document", text, _skip(text, end))
        yield from read_lines(StringIO(text), shown)
    elif len(lists) == 1 and not {*lists} & {*_TURNS}:
        yield from _flat(_list_rows(text, next(iter(lists.values())), shown, inside=True), shown)
    elif "\n" not in text[start:end] or {*lists} & {*_TURNS}:
        yield f"{shown}:1", _row_of_line(text)
    elif lists:
        names = ", ".join(f"`{name}`" for name in lists)
        raise DataError(f"{shown}: holds several lists of rows ({names}); keep each of them in a file of its own")
    else:
        raise DataError(f"{shown}: holds a mapping without a list of rows; one row per line belongs in a .jsonl file")


def _lists_in(text: str, start: int) -> tuple[dict[str, int], int]:
    """Where the lists of mappings in an object begin, by key, and where the object ends."""
    found: dict[str, int] = {}
    empty: dict[str, int] = {}
    position = _skip(text, start + 1)
    while text[position : position + 1] == '"':
        key, position = _PLAIN.raw_decode(text, position)
        position = _skip(text, position)
        if text[position : position + 1] != ":":
            raise json.JSONDecodeError("expected `:` after the key", text, position)
        position = _skip(text, position + 1)
        value, end = _PLAIN.raw_decode(text, position)
        if isinstance(value, list) and all(isinstance(part, dict) for part in value[:1]):
            (found if value else empty)[key] = position
        position = _skip(text, end)
        if text[position : position + 1] != ",":
            break
        position = _skip(text, position + 1)
    if text[position : position + 1] != "}":
        raise json.JSONDecodeError("expected a key in double quotes, or `}`", text, position)
    return found or empty, position + 1


def _list_rows(text: str, start: int, shown: str, *, inside: bool = False) -> Generator[RowOrError]:
    """The elements of the list that begins at `start`; `inside`: of an object, so that more may follow."""
    number, position = 0, _skip(text, start + 1)
    mark = text[position : position + 1]
    while mark != "]":
        number += 1
        try:
            row, position = _element(text, position)
            yield row
            position = _skip(text, position)
            mark = text[position : position + 1]
            if mark not in ("]", ","):
                what = "expected `,` or `]` after the row" if mark else "the file ends here"
                raise json.JSONDecodeError(what, text, position)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise DataError(f"{shown}:{number}: not valid JSON in {where}: {error.msg}") from error
        if mark == ",":
            position = _skip(text, position + 1)
    if not inside and _skip(text, position + 1) < len(text):
        raise json.JSONDecodeError("more follows after the list", text, _skip(text, position + 1))


def _element(text: str, start: int) -> tuple[RowOrError, int]:
    try:
        return _decode(text, start)
    except RowError as error:
        return error, _PLAIN.raw_decode(text, start)[1]


def _skip(text: str, start: int) -> int:
    """The next position that holds no white space."""
    return _SPACE.match(text, start).end()  # type: ignore[union-attr]


def _flat(rows: Iterator[RowOrError], shown: str) -> Iterator[tuple[str, RowOrError]]:
    """Rows with their numbers; SQuAD's articles as one row per question."""
    number = 0
    for row in rows:
        questions = _questions(row) if isinstance(row, dict) and isinstance(row.get("paragraphs"), list) else [row]
        for question in questions:
            number += 1
            yield f"{shown}:{number}", question


def _questions(article: dict[str, Any]) -> Iterator[RowOrError]:
    """The rows id, title, context, question, answers, is_impossible of one article (https://rajpurkar.github.io/SQuAD-explorer)."""
    for number, paragraph in enumerate(article["paragraphs"], 1):
        where = f"paragraph {number} of the article {article.get('title', '')!r}"
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
            yield RowError(f"{where} is no mapping with `context` and a list `qas`")
            continue
        for question in paragraph["qas"]:
            if not isinstance(question, dict):
                yield RowError(f"{where} has a question that is no mapping but {_kind(question)}")
                continue
            shared = {"title": article.get("title"), "context": paragraph.get("context")}
            names = ("id", "question", "answers", "is_impossible")
            yield shared | {name: question[name] for name in names if name in question}
