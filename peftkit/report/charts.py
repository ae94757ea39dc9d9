"""Charts as plain data that the page draws: scales, ticks, and lines in thousandths of the plot.

An SVG holds the lines alone and is stretched to the page's width; its labels are text of the page beside it, so that they stay
readable at any width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from peftkit.report.facts import finite
from peftkit.report.show import NOTHING

MAX_POINTS = 1600  # of all lines of a chart: what a file of a few hundred kilobytes can hold
FULL = 1000  # side of the plot in units of its SVG
TABLE_ROWS = 12  # of the table behind a chart

Point = tuple[float, float | None]  # x, and y where it is finite


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        key: lines with the same one, in all charts, are switched together.
        label: its name in the legend.
        points: (x, y), x rising; y None where a number is not finite, which breaks the line.
        colour: number of its colour.
        band: (x, low, high) of what the line is the mean of; empty without.
    """

    key: str
    label: str
    points: list[Point]
    colour: int = 0
    band: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A chart of lines over steps.

    Attributes:
        name: unique on the page.
        title: what is drawn.
        unit: of y, empty for plain numbers.
        lines: what is drawn; see `chart` for how they are thinned.
        y: lowest and highest value of the axis.
        note: what the caption says beside the title.
        smooths: whether the page offers to smooth it.
        wide: whether it takes the page's whole width.
    """

    name: str
    title: str
    unit: str
    lines: list[Line]
    y: tuple[float, float]
    note: str = ""
    smooths: bool = False
    wide: bool = False

    @cached_property
    def x(self) -> tuple[float, float]:
        """First and last step."""
        steps = [point[0] for line in self.lines for point in line.points]
        return (min(steps), max(steps)) if min(steps) < max(steps) else (min(steps) - 1, max(steps) + 1)

    def ticks(self) -> list[dict[str, Any]]:
        """Ticks of y: place in percent from below, and text."""
        return [{"at": round(100 * share(tick, self.y), 2), "text": short(tick)} for tick in nice_ticks(*self.y)]

    def steps(self) -> list[dict[str, Any]]:
        """Ticks of x."""
        ticks = [tick for tick in nice_ticks(*self.x, count=6) if tick == int(tick)]
        return [{"at": round(100 * share(tick, self.x), 2), "text": f"{tick:,.0f}"} for tick in ticks]

    def path(self, line: Line) -> str:
        """A line as SVG path data; two points, such as before and after, are dots alone: nothing is known between them."""
        parts, pen = [], "M"
        if len(line.points) < 3:
            return ""
        for x, y in line.points:
            if y is None:
                pen = "M"
                continue
            parts.append(f"{pen}{self._at(x, y)}")
            pen = "L"
        return "".join(parts)

    def dots(self, line: Line) -> str:
        """Dots at the points, where they are few: lines of no length, which round ends make dots at any stretch."""
        points = [(x, y) for x, y in line.points if y is not None]
        return "".join(f"M{self._at(x, y)}h0" for x, y in points) if len(points) <= 40 else ""

    def band(self, line: Line) -> str:
        """The band around a line."""
        there = [self._at(x, high) for x, _, high in line.band]
        back = [self._at(x, low) for x, low, _ in reversed(line.band)]
        return f"M{'L'.join(there + back)}Z" if there else ""

    def _at(self, x: float, y: float) -> str:
        return f"{FULL * share(x, self.x):.0f} {FULL * (1 - share(y, self.y)):.1f}"

    def data(self) -> dict[str, Any]:
        """What the page's script needs to draw the lines anew and read values off them; bands are drawn once."""
        lines = {
            line.key: {"label": line.label, "x": [x for x, _ in line.points], "y": [_rounded(y) for _, y in line.points]}
            for line in self.lines
        }
        return {"x": self.x, "y": self.y, "lines": lines}

    def table(self) -> list[list[str]]:
        """Rows of a table of the chart: a step, and the value of every line there or next before."""
        steps = sorted({x for line in self.lines for x, _ in line.points})
        chosen = [steps[round(n * (len(steps) - 1) / (TABLE_ROWS - 1))] for n in range(TABLE_ROWS)]
        rows = []
        for step in dict.fromkeys(chosen if len(steps) > TABLE_ROWS else steps):
            values = [next((y for x, y in reversed(line.points) if x <= step), None) for line in self.lines]
            rows.append([f"{step:,.0f}", *(NOTHING if value is None else f"{value:.4g}" for value in values)])
        return rows


def chart(name: str, title: str, lines: Sequence[Line], *, unit: str = "", **options: Any) -> Chart | None:
    """A chart of lines, thinned to what a page can hold; None where nothing can be drawn."""
    drawn = [line for line in lines if any(y is not None for _, y in line.points)]
    if not drawn:
        return None
    limit = max(60, MAX_POINTS // len(drawn) // 2 * 2)
    longest = max(len(line.points) for line in drawn)
    note = options.pop("note", "")
    if longest > limit:
        note += f" {longest:,} points, drawn as the lowest and the highest of {limit // 2} stretches."
    thinned = [Line(line.key, line.label, thin(line.points, limit), line.colour, _few(line.band, limit)) for line in drawn]
    values = [y for line in thinned for _, y in line.points if y is not None]
    values += [edge for line in thinned for _, *edges in line.band for edge in edges]
    return Chart(name, title, unit, thinned, _limits(min(values), max(values)), note.strip(), **options)


def points_of(rows: Sequence[dict[str, Any]], name: str, scale: float = 1.0) -> list[Point]:
    """(step, value) of a number in lines of metrics."""
    found = [(float(row["step"]), finite(row.get(name))) for row in rows if name in row]
    return [(step, None if value is None else value * scale) for step, value in found]


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each stretch of equal length, so that no spike is lost.

    A stretch that holds a number that is not finite keeps it, so that the gap is seen.
    """
    if len(points) <= limit:
        return list(points)
    count, kept = limit // 2, list[Point]()
    for number in range(count):
        part = points[number * len(points) // count : (number + 1) * len(points) // count]
        known = [(y, place) for place, (_, y) in enumerate(part) if y is not None]
        gaps = [place for place, (_, y) in enumerate(part) if y is None]
        chosen = {min(known)[1], max(known)[1]} if known else set()
        kept += [part[place] for place in sorted(chosen | set(gaps[:1]))]
    return kept


def _few(band: Sequence[tuple[float, float, float]], limit: int) -> list[tuple[float, float, float]]:
    return [band[round(n * (len(band) - 1) / (limit - 1))] for n in range(limit)] if len(band) > limit else list(band)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two numbers, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - count))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms; over few decades their doubles and fivefolds too."""
    factors = (1.0,) if high - low > 3 else (1.0, 2.0, 5.0)
    ticks = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def share(value: float, limits: tuple[float, float]) -> float:
    """Where a value lies between two limits, 0 to 1."""
    return (value - limits[0]) / (limits[1] - limits[0])


def short(value: float) -> str:
    """A tick's text: 12k, 0.05, 2e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    text = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return text.replace(".0e", "e").replace("e-0", "e-")


def _limits(low: float, high: float) -> tuple[float, float]:
    """An axis with a margin, from 0 where that is near and nothing is below."""
    if low == high:
        margin = abs(low) / 2 or 1.0
        return low - margin, high + margin
    margin = 0.04 * (high - low)
    return (0.0 if 0 <= low <= (high - low) / 2 else low - margin), high + margin


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def mean_of(lines: Sequence[list[Point]]) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """The mean of several lines at the steps that all of them have, and (step, lowest, highest) there."""
    tables = [{x: y for x, y in points if y is not None} for points in lines]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    rows = [(x, [table[x] for table in tables]) for x in shared]
    mean: list[Point] = [(x, sum(values) / len(values)) for x, values in rows]
    return mean, [(x, min(values), max(values)) for x, values in rows] if len(tables) > 1 else []
