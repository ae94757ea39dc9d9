"""The pairs format: texts that belong together, or two texts and how alike they are."""

from __future__ import annotations

import math
from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, is_missing, shown, text_of

_FIRST, _SECOND = ("anchor", "query", "text", "sentence1"), ("positive", "text_pair", "sentence2")


def _pairs(row: RawRow, target: bool) -> CanonicalRow:
    if not target:
        return {"text": text_of(row, *_FIRST, "sentence", *_SECOND, "prompt")}
    result: CanonicalRow = {"anchor": text_of(row, *_FIRST), "positive": text_of(row, *_SECOND)}
    if not is_missing(row.get("score")):
        return result | {"score": _score(row["score"])}
    negatives = row.get("negative")
    if is_missing(negatives) or negatives == "":
        return result
    negatives = negatives if isinstance(negatives, list) else [negatives]
    for negative in negatives:
        if not isinstance(negative, str) or not negative.strip():
            raise RowError(f"column `negative` holds {shown(negative)}; a negative is a text, or a list of texts")
    return result | {"negative": negatives}


def _score(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"column `score` holds {shown(value)}, not a number")
    return number


PAIRS = Format(
    name="pairs",
    summary="anchor (or query) and positive, optional negative (a text or a list); or text and text_pair (or sentence1, "
    "sentence2) and score",
    yields=("anchor", "positive"),
    matches=lambda names: bool(names & {*_FIRST}) and ("positive" in names or ("score" in names and bool(names & {*_SECOND}))),
    read=_pairs,
    example={"anchor": "How old is she?", "positive": "What is her age?"},
)
