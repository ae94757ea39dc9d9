"""Numbers and values as people read them."""

from __future__ import annotations

import json
import math
from typing import Any

NOTHING = "\N{EN DASH}"  # for what is not known


def show(value: Any) -> str:
    """A value in a table: whole numbers with separators, others with four digits, the rest as JSON or text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NOTHING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}".replace("e-0", "e-")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def show_yaml(value: Any) -> str:
    """A value of a recipe, as the recipe has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def show_bytes(size: Any) -> str:
    """A size in the unit that fits."""
    if not isinstance(size, int | float) or not size:
        return NOTHING
    power = min(int(math.log(size, 1024)), 3)
    return (
        f"{size:.0f} B" if power == 0 else f"{size / 1024**power:.{2 if power == 3 else 1}f} {('KiB', 'MiB', 'GiB')[power - 1]}"
    )


def show_seconds(seconds: Any) -> str:
    """A duration in the units that fit."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def label_of(name: str) -> str:
    """The name of a metric or figure as a heading: `f1_macro` is `F1 macro`."""
    known = {"f1": "F1", "mcc": "MCC", "mrr": "MRR", "ndcg": "nDCG", "bleu": "BLEU", "chrf": "chrF"}
    first, *rest = [known.get(word, word) for word in name.split("_")]
    return " ".join([first[:1].upper() + first[1:] if first == first.lower() else first, *rest])
