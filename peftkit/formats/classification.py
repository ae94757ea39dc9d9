"""The classification format: a text (or a pair of texts) and its label."""

from __future__ import annotations

import math
from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, text_of

_LABEL = "a label is a name or a number, or a list of names"


def _classification(row: RawRow, target: bool) -> CanonicalRow:
    result: CanonicalRow = {"text": text_of(row, "text", "sentence", "sentence1")}
    pair = text_of(row, "text_pair", "sentence2", required=False)
    if pair:
        result["text_pair"] = pair
    if not target:
        return result
    label = row.get("label")
    for part in label if isinstance(label, list) else [label]:
        _check(part, label)
    return result | {"label": label}


def _check(part: Any, label: Any) -> None:
    """One label of a row, or an element of the list that it is."""
    if (
        isinstance(part, bool)
        or not isinstance(part, str | int | float)
        or (isinstance(label, list) and isinstance(part, float))
    ):
        raise RowError(f"column `label` holds {label!r}; {_LABEL}")
    if isinstance(part, float) and not math.isfinite(part):
        raise RowError(f"column `label` holds {label!r}, which is no number to learn")
    if isinstance(part, str) and not part.strip():
        raise RowError("column `label` is empty" if part is label else "column `label` holds an empty name")


CLASSIFICATION = Format(
    name="classification",
    summary="text (or sentence), optional text_pair (or sentence1, sentence2), label: a name, a number or a list of names",
    yields=("text", "label"),
    matches=lambda names: "label" in names and bool(names & {"text", "sentence", "sentence1"}),
    convert=_classification,
)
