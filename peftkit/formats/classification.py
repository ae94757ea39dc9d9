"""The classification format: a text (or a pair of texts) and its label."""

from __future__ import annotations

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, text_of


def _classification(row: RawRow, target: bool) -> CanonicalRow:
    result: CanonicalRow = {"text": text_of(row, "text", "sentence", "sentence1")}
    pair = text_of(row, "text_pair", "sentence2", required=False)
    if pair:
        result["text_pair"] = pair
    if not target:
        return result
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise RowError(f"column `label` holds {label!r}; a label is a name or a whole number")
    if isinstance(label, str) and not label.strip():
        raise RowError("column `label` is empty")
    return result | {"label": label}


CLASSIFICATION = Format(
    name="classification",
    summary="text (or sentence), optional text_pair (or sentence1, sentence2), label: a name or a number",
    yields=("text", "label"),
    matches=lambda names: "label" in names and bool(names & {"text", "sentence", "sentence1"}),
    convert=_classification,
)
