"""The classification format: a text (or a pair of texts) and its label."""

from __future__ import annotations

import math
from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, is_missing, shown, text_of

_ALLOWED = "a label is a name or a number, or a list of names"


def _classification(row: RawRow, target: bool) -> CanonicalRow:
    result: CanonicalRow = {"text": text_of(row, "text", "sentence", "sentence1")}
    pair = text_of(row, "text_pair", "sentence2", required=False)
    if pair:
        result["text_pair"] = pair
    if not target:
        return result
    name = "labels" if is_missing(row.get("label")) and "labels" in row else "label"
    label = row.get(name)
    for part in label if isinstance(label, list) else [label]:
        _check(part, label, name)
    return result | {"label": label}


def _check(part: Any, label: Any, name: str) -> None:
    """One label of a row, or an element of the list that it is."""
    if (
        isinstance(part, bool)
        or not isinstance(part, str | int | float)
        or (isinstance(label, list) and isinstance(part, float))
    ):
        raise RowError(f"column `{name}` holds {shown(label)}; {_ALLOWED}")
    if isinstance(part, float) and not math.isfinite(part):
        raise RowError(f"column `{name}` holds {label!r}, which is no number to learn")
    if isinstance(part, str) and not part.strip():
        raise RowError(f"column `{name}` is empty" if part is label else f"column `{name}` holds an empty name")


CLASSIFICATION = Format(
    name="classification",
    summary="text (or sentence), optional text_pair (or sentence1, sentence2), label (or labels): a name, a number or a "
    "list of names",
    yields=("text", "label"),
    matches=lambda names: bool(names & {"label", "labels"}) and bool(names & {"text", "sentence", "sentence1"}),
    read=_classification,
    example={"text": "I liked it.", "label": "good"},
)
