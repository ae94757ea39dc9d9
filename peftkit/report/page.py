"""The page: templates filled with what has been read. Every text of a run is escaped, and the page asks for nothing else."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from peftkit import __version__
from peftkit.report import show
from peftkit.report.changes import changes, differing
from peftkit.report.charts import Chart
from peftkit.report.comparison import Comparison
from peftkit.report.curves import overlay, run_charts
from peftkit.report.examples import confusion, examples
from peftkit.report.facts import RunFacts, mapping
from peftkit.report.spread import intervals, pareto
from peftkit.report.verdict import metric_of, verdict

FOLDER = Path(__file__).parent / "page"
COLOURS = 8  # that style.css has; later lines are dashed in the same ones


def render(runs: Sequence[RunFacts], comparisons: Sequence[Comparison]) -> str:
    """One HTML document of some runs, or comparisons, or both."""
    drawn = charts_of(runs, comparisons)
    names = [facts.name for facts in runs] + [str(found.facts.get("name") or found.folder.name) for found in comparisons]
    return (
        _templates()
        .get_template("page.html")
        .render(
            title=", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
            version=__version__,
            written=time.strftime("%Y-%m-%d %H:%M"),
            runs=runs,
            charts=drawn[: len(drawn) - sum(len(found.charts) for found in comparisons)],
            comparisons=comparisons,
            differences=differing(runs) if len(runs) > 1 else {},
            columns=_columns(runs),
            data=script_json({chart.name: chart.data() for chart in drawn}),
            style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),  # our own file
            script=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),  # our own file
        )
    )


def charts_of(runs: Sequence[RunFacts], comparisons: Sequence[Comparison]) -> list[Chart]:
    """All charts of a page: those of the runs, then those of the comparisons."""
    charts = run_charts(runs[0]) if len(runs) == 1 else overlay(runs)
    return [*charts, *(chart for found in comparisons for chart in found.charts)]


def script_json(data: Any) -> Markup:
    """JSON that can stand in a script element: `<` could end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))  # nothing is left of it that is markup


def headline(facts: RunFacts) -> list[tuple[str, str, str]]:
    """(name, figure, what is worth knowing beside it) of the few numbers that people look for first."""
    summary, split = facts.summary, facts.main_split
    found = []
    if split is not None:
        name, _ = metric_of(facts, split)
        before = facts.first_scores.get(split, {}).get(name)
        value = facts.last_scores[split].get(name)
        found.append(
            (f"{show.label_of(name)}, {split}", show.show(value), f"{show.show(before)} before" if before is not None else "")
        )
    loss = facts.steps[-1].get("loss") if facts.steps else None
    found.append(("Training loss", show.show(loss), f"step {facts.num_steps:,}"))
    parameters = mapping(facts.environment.get("parameters"))
    trained, total = summary.get("trainable_params") or parameters.get("trainable"), parameters.get("all")
    if trained:
        found.append(("Trained parameters", show.show(trained), f"{100 * trained / total:.3g}% of {total:,}" if total else ""))
    seconds = summary.get("train_seconds") or (facts.steps[-1].get("seconds") if facts.steps else None)
    found.append(("Training time", show.show_seconds(seconds), ""))
    if speed := summary.get("target_tokens_per_second"):
        found.append(("Throughput", show.show(float(speed)), "target tokens per second"))
    if memory := summary.get("peak_memory_bytes"):
        planned = summary.get("predicted_memory_bytes")
        found.append(("Memory, at most", show.show_bytes(memory), f"plan: {show.show_bytes(planned)}" if planned else ""))
    if facts.adapter_bytes:
        found.append(("Adapter on disk", show.show_bytes(facts.adapter_bytes), ""))
    return found


def _columns(runs: Sequence[RunFacts]) -> list[tuple[str, str]]:
    """(split, metric) that the table of several runs has a column for, those that runs are judged by first."""
    judged = dict.fromkeys((split, metric_of(facts, split)[0]) for facts in runs for split in facts.last_scores)
    return list(
        judged | {(split, name): None for facts in runs for split, scores in facts.last_scores.items() for name in scores}
    )


@functools.cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(FOLDER)
    # What a file does not say is left empty: it may be older than this page, or damaged.
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    functions = (changes, confusion, examples, headline, intervals, mapping, metric_of, pareto, verdict)
    templates.globals |= {function.__name__: function for function in functions} | {"colours": COLOURS}
    shown = (show.show, show.show_bytes, show.show_seconds, show.show_yaml, show.label_of)
    templates.filters |= {function.__name__: function for function in shown}
    return templates
