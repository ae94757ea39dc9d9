"""Where the variants of a comparison lie: their metric with its interval, and what it costs in parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftkit.report.charts import log_ticks, nice_ticks, share, short
from peftkit.report.comparison import Comparison
from peftkit.report.facts import Json, finite

Limits = tuple[float, float]


def intervals(found: Comparison) -> Json:
    """Each variant's metric on one axis: mean, interval and single trials in percent of it; and its ticks."""
    rows = [(variant, figure) for variant in found.variants if (figure := variant.figure(found.metric))]
    if not rows:
        return {}
    # Two seeds may have an interval that is wider than all variants together: the axis is that of what was measured.
    limits = _limits([value for _, figure in rows for value in (figure["mean"], *_trials(figure))], 0.12)
    return {
        "ticks": _ticks(nice_ticks(*limits), limits),
        "rows": [
            {
                "variant": variant,
                "mean": _percent(figure["mean"], limits),
                "low": max(0.0, _percent(_end(figure, "low"), limits)),
                "high": min(100.0, _percent(_end(figure, "high"), limits)),
                "trials": [_percent(value, limits) for value in _trials(figure)],
                "figure": figure,
            }
            for variant, figure in rows
        ],
    }


def pareto(found: Comparison) -> Json:
    """Metric against trained parameters (logarithmic) in percent of the plot, those that no smaller one equals, and ticks."""
    points = []
    for variant in found.variants:
        size, value = (finite(variant.figure(name).get("mean")) for name in ("trainable_params", found.metric))
        if size and value is not None:
            points.append((variant, math.log10(size), value))
    if len(points) < 2:
        return {}
    x, y = _limits([at for _, at, _ in points], 0.08), _limits([value for *_, value in points], 0.12)
    placed: list[Json] = [{"variant": variant, "x": _percent(at, x), "y": _percent(value, y)} for variant, at, value in points]
    sign = 1 if found.facts.get("greater_is_better", True) else -1
    front: list[Json] = []
    for point in sorted(placed, key=lambda point: (point["x"], -sign * point["y"])):
        if not front or sign * (point["y"] - front[-1]["y"]) > 0:
            front.append(point)
    sizes = [tick for tick in log_ticks(*x) if x[1] - x[0] < 2 or math.log10(tick).is_integer()]
    return {
        "points": [{**point, "is_best": point in front} for point in placed],
        "front": " ".join(f"{point['x']},{100 - point['y']:.2f}" for point in front),
        "x": _ticks(sizes, x, math.log10),
        "y": _ticks(nice_ticks(*y), y),
    }


def _end(figure: Json, name: str) -> float:
    value = finite(figure.get(name))
    return float(figure["mean"]) if value is None else value


def _trials(figure: Json) -> list[float]:
    values = figure.get("values")
    return [number for value in values if (number := finite(value)) is not None] if isinstance(values, list) else []


def _limits(values: Sequence[float], margin: float) -> Limits:
    low, high = min(values), max(values)
    room = margin * (high - low) or abs(high) / 10 or 1.0
    return low - room, high + room


def _percent(value: float, limits: Limits) -> float:
    return round(100 * share(value, limits), 2)


def _ticks(ticks: Sequence[float], limits: Limits, place: Any = float) -> list[Json]:
    return [{"at": _percent(place(tick), limits), "text": short(tick)} for tick in ticks]
