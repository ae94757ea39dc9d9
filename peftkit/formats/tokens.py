"""The tokens format: words and a tag for each of them."""

from __future__ import annotations

from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, columns_text, is_missing, names_text, shown

_WORDS, _TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels")


def _tokens(row: RawRow, target: bool) -> CanonicalRow:
    name, words = _list_of(row, _WORDS)
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip():
            raise RowError(f"word {number} in `{name}` is {shown(word)}; a word is text that is not blank")
    if not target:
        return {"tokens": words}
    name, tags = _list_of(row, _TAGS)
    for number, tag in enumerate(tags, 1):
        if isinstance(tag, bool) or not isinstance(tag, str | int) or not str(tag).strip():
            raise RowError(f"tag {number} in `{name}` is {shown(tag)}; a tag is a name or a whole number")
    if len(words) != len(tags):
        raise RowError(f"there are {len(words)} words and {len(tags)} tags; every word needs one tag")
    return {"tokens": words, "tags": tags}


def _list_of(row: RawRow, names: tuple[str, ...]) -> tuple[str, list[Any]]:
    """The first of the named columns that is there, with its list."""
    for name in names:
        if not is_missing(row.get(name)):
            if not isinstance(row[name], list) or not row[name]:
                raise RowError(f"column `{name}` is no list with at least one element")
            return name, row[name]
    raise RowError(f"no column {names_text(names)}; the row has {columns_text(row)}")


TOKENS = Format(
    name="tokens",
    summary="tokens (or words): a list of words; tags (or ner_tags, pos_tags, labels): a name or number for each word",
    yields=("tokens", "tags"),
    matches=lambda names: bool(names & {*_WORDS}) and bool(names & {*_TAGS}),
    read=_tokens,
    example={"tokens": ["Ada", "left"], "tags": ["B-PER", "O"]},
)
