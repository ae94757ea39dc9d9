"""The curves of a report as PNG files, for papers and slides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.errors import RecipeError, ResourceError
from peftkit.report.charts import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The light colours of page/style.css, in their order.
COLOURS = ("#0072b2", "#d55e00", "#00855f", "#b1457f", "#8f6a00", "#5b4bb5", "#30363d", "#a1453d")


def write_pictures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write every chart to a PNG file of its name; returns their paths.

    Raises:
        RecipeError: matplotlib is not installed.
        ResourceError: the folder cannot be written.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise RecipeError("--png needs matplotlib; `pip install matplotlib` (or peftkit's extra `plot`) adds it") from error
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
            _draw(chart, figure.add_subplot())
            paths.append(folder / f"{chart.name}.png")
            figure.savefig(paths[-1], dpi=150)
    except OSError as error:
        raise ResourceError(f"--png {folder}: cannot be written: {error.strerror}; name another folder") from error
    return paths


def _draw(chart: Chart, axes: Axes) -> None:
    for line in chart.lines:
        steps, values = zip(*((x, float("nan") if y is None else y) for x, y in line.points), strict=True)
        look = ("-" if line.colour < len(COLOURS) else "--") * (len(steps) > 2) + "o" * (len(steps) <= 40)
        colour = COLOURS[line.colour % len(COLOURS)]
        axes.plot(steps, values, look, color=colour, label=line.label, markersize=4)
        if line.band:
            low, high = ([edges[side] for edges in line.band] for side in (1, 2))
            axes.fill_between([step for step, *_ in line.band], low, high, color=colour, alpha=0.13, linewidth=0)
    axes.set(title=chart.title, xlabel="step", ylabel=chart.unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize="small")
