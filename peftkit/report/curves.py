"""Which charts a run has, and several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftkit.report.charts import Chart, Line, Point, chart, mean_of, points_of
from peftkit.report.facts import RunFacts, finite
from peftkit.report.show import label_of

MAX_METRICS = 8  # metrics that have a chart of their own
SPLITS = ("validation", "test")
Curve = Callable[[RunFacts], list[Point]]


def throughput(facts: RunFacts) -> list[Point]:
    """(step, target tokens per second since the last line); evaluations are not counted."""
    found: list[Point] = []
    before = {"target_tokens": 0, "seconds": 0.0}
    for line in facts.steps:
        tokens, seconds = finite(line.get("target_tokens")), finite(line.get("seconds"))
        if tokens is None or seconds is None:
            continue
        passed = seconds - before["seconds"]
        if passed > 0:
            found.append((float(line["step"]), (tokens - before["target_tokens"]) / passed))
        before = {"target_tokens": tokens, "seconds": seconds}
    return found


def _column(name: str, scale: float = 1.0) -> Curve:
    return lambda facts: points_of(facts.steps, name, scale)


def _score(metric: str, split: str) -> Curve:
    return lambda facts: [(float(step), finite(row[metric])) for step, row in facts.scores.get(split, []) if metric in row]


TRAINING: dict[str, tuple[str, str, Curve]] = {
    "learning_rate": ("Learning rate", "", _column("learning_rate")),
    "grad_norm": ("Gradient norm", "", _column("grad_norm")),
    "throughput": ("Throughput", "target tokens per second", throughput),
    "memory": ("Memory, at most so far", "GiB", _column("memory_bytes", 2**-30)),
}


def run_charts(facts: RunFacts) -> list[Chart]:
    """The charts of a single run: losses of all splits in one, a chart per metric, then how it trained."""
    losses = [Line("train", "training", _column("loss")(facts))]
    losses += [Line(split, split, _score("loss", split)(facts), colour) for colour, split in enumerate(SPLITS, 1)]
    found = [chart("loss", "Loss", losses, smooths=True, wide=True, note="By optimizer step.")]
    for metric in _metrics([facts]):
        lines = [Line(split, split, _score(metric, split)(facts), colour) for colour, split in enumerate(SPLITS, 1)]
        found.append(chart(metric, label_of(metric), lines))
    for name, (title, unit, curve) in TRAINING.items():
        found.append(chart(name, title, [Line("train", "training", curve(facts))], unit=unit))
    return [drawn for drawn in found if drawn is not None]


def overlay(runs: Sequence[RunFacts]) -> list[Chart]:
    """The charts of several runs, a line each."""
    groups = {facts.name: [facts] for facts in runs}
    return group_charts(groups)


def group_charts(groups: dict[str, list[RunFacts]], prefix: str = "") -> list[Chart]:
    """The charts of groups of runs: a line each, the mean over the group's runs at the steps that all have, and their range."""
    runs = [facts for group in groups.values() for facts in group]
    curves: list[tuple[str, str, str, Curve]] = [("loss", "Training loss", "", _column("loss"))]
    for metric in ("loss", *_metrics(runs)):
        split = next((split for split in SPLITS if any(len(_score(metric, split)(facts)) > 1 for facts in runs)), SPLITS[0])
        curves.append((f"{split}_{metric}", f"{label_of(metric)}, {split} rows", "", _score(metric, split)))
    curves += [(name, title, unit, curve) for name, (title, unit, curve) in TRAINING.items()]
    found = []
    for name, title, unit, curve in curves:
        lines = []
        for number, (label, group) in enumerate(groups.items()):
            mean, band = mean_of([points for facts in group if (points := curve(facts))])
            lines.append(Line(f"{prefix}run{number}", label, mean, number, band))
        is_loss = name == "loss"
        found.append(chart(f"{prefix}{name}", title, lines, unit=unit, smooths=is_loss, wide=is_loss))
    return [drawn for drawn in found if drawn is not None]


def _metrics(runs: Sequence[RunFacts]) -> list[str]:
    """Metrics, without the loss, that were measured at several steps."""
    names = dict.fromkeys(
        name
        for facts in runs
        for scores in facts.scores.values()
        if len(scores) > 1
        for _, metrics in scores
        for name in metrics
        if name != "loss"
    )
    return list(names)[:MAX_METRICS]
