"""Triples (head, relation, tail) in the answers of a model: read from the forms that it may be asked to write them in."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from peftkit.tasks.generations import TripleFormat

Triple = tuple[str, str, str]
# Names of head, relation and tail in JSON objects, where a recipe names none.
KEYS = (
    ("head", "subject", "h", "头实体", "主体"),
    ("relation", "predicate", "r", "关系", "谓词"),
    ("tail", "object", "t", "尾实体", "客体"),
)
EXPECTED = (
    '`head | relation | tail`, one a line, JSON as [{"head": "a", "relation": "b", "tail": "c"}], or (head, relation, tail)'
)

_NOTHING = {"", "()", "none", "no triples", "no relations", "无", "没有", "无关系", "没有关系"}
_SEPARATORS = ("\t", "|", "->", "→", ";", ",")  # the first that makes three parts
_PAIRS = {"(": ")", "[": "]", "《": "》", "〈": "〉", "【": "】", "「": "」", "『": "』", "“": "”"}
_QUOTES = ('""', "''", "“”", "\u2018\u2019", "「」", "『』")
_BULLET = re.compile(r"^\s*(?:[-*•]\s+|\d+(?:[.)]\s+|、\s*))")
_JSON_START = re.compile(r'\{\s*["}]|\[\s*[\[{"\]]')
# Numbers stay as they are written.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


@dataclass(frozen=True)
class Parsed:
    """What a text says.

    Attributes:
        triples: each once.
        malformed: pieces that are none.
    """

    triples: frozenset[Triple]
    malformed: tuple[str, ...]


def parse_triples(text: str, form: TripleFormat = "auto", keys: tuple[str, ...] | None = None) -> Parsed:
    """The triples that a text lists.

    Unicode's NFKC makes full-width punctuation ASCII before they are read; parts are compared as `plain` has them.

    Args:
        text: an answer.
        form: how triples are written; `auto`: as the text looks.
        keys: names of head, relation and tail in JSON objects; None: those of `KEYS`.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    if text.rstrip(".。").casefold() in _NOTHING:
        return Parsed(frozenset(), ())
    names = tuple((name,) for name in keys) if keys else KEYS
    readers: dict[str, Callable[[str], Iterator[list[str] | str]]] = {
        "json": lambda text: _from_json(text, names),
        "tuples": _from_tuples,
        "lines": _from_lines,
    }
    triples, malformed = set(), []
    for piece in readers[_form_of(text) if form == "auto" else form](text):
        parts = [] if isinstance(piece, str) else [plain(part) for part in piece]
        if len(parts) == 3 and all(parts):
            triples.add((parts[0], parts[1], parts[2]))
        else:
            malformed.append(_writable(piece if isinstance(piece, str) else " | ".join(part.strip() for part in piece)))
    return Parsed(frozenset(triples), tuple(malformed))


def plain(part: str) -> str:
    """A head, relation or tail as it is compared: in NFKC, without quotes around it, blanks in it as one."""
    part = unicodedata.normalize("NFKC", _writable(part)).strip()  # JSON's escapes are read by now
    if len(part) > 1 and part[0] + part[-1] in _QUOTES:
        part = part[1:-1]
    return " ".join(part.split())


def _writable(text: str) -> str:
    """The text without the halves of characters that JSON's escapes can leave, which no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _form_of(text: str) -> str:
    if _JSON_START.search(text):
        return "json"
    is_cut = text.startswith(("(", "[")) and not any(is_closed for _, is_closed in _groups(text))
    return "tuples" if is_cut or any(isinstance(piece, list) for piece in _from_tuples(text)) else "lines"


def _from_lines(text: str) -> Iterator[list[str] | str]:
    """One triple a line; bullets and numbers before it do not count."""
    for line in text.splitlines():
        if line.strip():
            yield _three_parts(_BULLET.sub("", line)) or line.strip()


def _from_tuples(text: str, *, may_nest: bool = True) -> Iterator[list[str] | str]:
    """Whatever stands in brackets, which may stand in a pair of outer ones; what is between them does not count."""
    groups = list(_groups(text))
    if not groups:
        yield text
    for group, is_closed in groups:
        is_list = may_nest and group.startswith(("(", "[")) and any(_three_parts(inner) for inner, _ in _groups(group))
        if is_list:
            yield from _from_tuples(group, may_nest=False)
        elif group:
            yield (_three_parts(group) if is_closed else None) or group


def _groups(text: str) -> Iterator[tuple[str, bool]]:
    """The insides of outermost brackets, and whether they are closed."""
    depth = start = 0
    for place, letter in enumerate(text):
        if letter in "([":
            start = start if depth else place + 1
            depth += 1
        elif letter in ")]" and depth:
            depth -= 1
            if not depth:
                yield text[start:place].strip(), True
    if depth:
        yield text[start:].strip(), False


def _three_parts(text: str) -> list[str] | None:
    for separator in _SEPARATORS:
        if separator in text and len(parts := _split(text, separator)) == 3:
            return parts
    return None


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand in no brackets or quotes, where these are closed."""
    parts, closers, start = [], [""], 0
    for place, letter in enumerate(text):
        if letter == closers[-1]:
            closers.pop()
        elif letter == '"' or letter in _PAIRS:
            closers.append(_PAIRS.get(letter, '"'))
        elif len(closers) == 1 and place >= start and text.startswith(separator, place):
            parts.append(text[start:place])
            start = place + len(separator)
    return [*parts, text[start:]] if len(closers) == 1 else text.split(separator)


def _from_json(text: str, names: tuple[tuple[str, ...], ...]) -> Iterator[list[str] | str]:
    """Every JSON value of a text, whatever stands between them (a fence, words, ends of lines)."""
    found = _JSON_START.search(text)
    if found is None:
        yield text
    while found is not None:
        try:
            value, end = _DECODER.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            yield text[found.start() :]
            return
        yield from _from_value(value, names)
        found = _JSON_START.search(text, end)


def _from_value(value: Any, names: tuple[tuple[str, ...], ...]) -> Iterator[list[str] | str]:
    """A triple, a list of them, or an object that holds such a list."""
    if (one := _as_parts(value, names)) is not None:
        yield one
        return
    lists = [part for part in value.values() if isinstance(part, list)] if isinstance(value, dict) else [value]
    if len(lists) != 1 and value:
        yield json.dumps(value, ensure_ascii=False)
    for item in lists[0] if len(lists) == 1 else []:
        yield _as_parts(item, names) or json.dumps(item, ensure_ascii=False)


def _as_parts(value: Any, names: tuple[tuple[str, ...], ...]) -> list[str] | None:
    """The three parts of a JSON object or list; None where it has others."""
    if isinstance(value, dict):
        found = [[value[name] for name in known if name in value] for known in names]
        value = [parts[0] for parts in found if len(parts) == 1]
    is_triple = isinstance(value, list) and len(value) == 3 and all(isinstance(part, str) for part in value)
    return value if is_triple else None
