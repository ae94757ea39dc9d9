"""What a comparison comes to: means with intervals over the seeds, the Pareto front, the table, whether rows were the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.run import Run

FILE = "compare.json"
COSTS = (
    "trainable_params",
    "adapter_bytes",
    "peak_memory_bytes",
    "train_seconds",
    "target_tokens_per_second",
    "forgetting",
)
PARETO = ("trainable_params", "peak_memory_bytes")  # beside the metric: less of them is better
INTERVAL = "mean and 95% interval of it over the seeds, by Student's t"


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95% interval of the mean over the seeds: mean +- t(0.975, n - 1) s / sqrt(n); none with one value.

    A seed moves initial weights, order of the rows and dropout; that other test rows would give another figure is not in it.
    """
    mean = statistics.fmean(values)
    low = high = None
    if len(values) > 1 and all(map(math.isfinite, values)):
        from scipy.special import stdtrit

        half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "values": list(values)}


def summarise(trials: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Figure -> interval, over the trials that are done."""
    done = [trial for trial in trials if trial["state"] == "done"]
    rows = [dict(trial["metrics"]) | {name: trial[name] for name in COSTS if trial.get(name) is not None} for trial in done]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: interval([row[name] for row in rows if name in row]) for name in names}


def mark_pareto(variants: Sequence[dict[str, Any]], metric: str, *, greater_is_better: bool) -> None:
    """Set `pareto` where no other variant is at least as good in metric and costs, and better in one of them."""
    points = {}
    for number, variant in enumerate(variants):
        summary = variant["summary"]
        if all(name in summary for name in (metric, *PARETO)):
            value = summary[metric]["mean"]
            points[number] = (-value if greater_is_better else value, *(summary[name]["mean"] for name in PARETO))
    for number, variant in enumerate(variants):
        own = points.get(number)
        variant["pareto"] = own is not None and not any(_dominates(other, own) for other in points.values())


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def different_rows(root: Path, variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not trained on the rows of the first variant in their order, a line each; by the digests in metrics.jsonl."""
    found: list[str] = []
    first: dict[int, tuple[str, dict[tuple[int, int], str]]] = {}
    for variant in variants:
        for trial in variant["trials"]:
            if trial["state"] != "done":
                continue
            digests = _digests(Run(root / trial["run_dir"]))
            name, others = first.setdefault(trial["seed"], (variant["name"], digests))
            if any(digests[span] != others[span] for span in digests.keys() & others.keys()):
                found.append(f"{variant['name']}, seed {trial['seed']}: other rows, or in another order, than {name}")
    return found


def _digests(run: Run) -> dict[tuple[int, int], str]:
    """Digest of the rows by the steps that it is about."""
    lines = run.read_training_lines()
    steps = [0, *(line["step"] for line in lines)]
    return {(before, line["step"]): line.get("rows", "") for before, line in zip(steps, lines, strict=False)}


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for people."""
    metric, with_forgetting = result["metric"], any("forgetting" in variant["summary"] for variant in result["variants"])
    costs = [name for name in COSTS if name in _SHOWN and (name != "forgetting" or with_forgetting)]
    columns = ["", f"{result['split']} {metric}", *(_SHOWN[name] for name in costs), "learning rate", ""]
    return columns, [_row(variant, metric, costs) for variant in _ranked(result)]


_SHOWN = {
    "trainable_params": "trainable",
    "adapter_bytes": "adapter",
    "peak_memory_bytes": "peak memory",
    "train_seconds": "seconds",
    "target_tokens_per_second": "targets/s",
    "forgetting": "forgetting",
}


def _ranked(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    sign = -1 if result["greater_is_better"] else 1

    def place(variant: Mapping[str, Any]) -> float:
        found = variant["summary"].get(result["metric"])
        return sign * found["mean"] if found else math.inf

    return sorted(result["variants"], key=place)


def _row(variant: Mapping[str, Any], metric: str, costs: Sequence[str]) -> list[str]:
    summary = variant["summary"]
    cells = [_with_interval(summary.get(metric))]
    cells += [_amount(name, summary[name]["mean"]) if name in summary else "" for name in costs]
    rate = f"{variant['learning_rate']:.2g}" if variant["learning_rate"] else ""
    return [variant["name"], *cells, rate, _remarks(variant)]


def _with_interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    half = f" +- {found['high'] - found['mean']:.4f}" if found["high"] is not None else ""
    return f"{found['mean']:.4f}{half}"


def _amount(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.2f} MiB" if value < 2**30 else f"{value / 2**30:,.2f} GiB"
    return f"{value:+.4f}" if name == "forgetting" else f"{value:,.0f}" if name == "trainable_params" else f"{value:,.1f}"


def _remarks(variant: Mapping[str, Any]) -> str:
    parts = ["Pareto"] if variant["pareto"] else []
    for state, word in (("refused", "refused"), ("failed", "failed"), ("pending", "not done"), ("running", "not done")):
        count = sum(trial["state"] == state for trial in variant["trials"])
        parts += [word if state == "refused" else f"{count} {word}"] if count else []
    return "; ".join(parts + ([variant["size_note"]] if variant["size_note"] else []))


def failures(result: Mapping[str, Any]) -> list[str]:
    """Why trials were refused or failed, a line each."""
    lines = []
    for variant in result["variants"]:
        for trial in variant["trials"]:
            if trial["state"] == "refused":
                lines.append(f"{variant['name']} was refused: {trial['error']}")
            elif trial["error"]:
                lines.append(f"{variant['name']}, seed {trial['seed']}: exit {trial['exit_code']}: {trial['error']}")
    return lines
