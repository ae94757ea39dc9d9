"""What `compare` and `sweep` leave in their folder: variants of a recipe, each trained with several seeds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from peftkit.errors import LoadError
from peftkit.report.charts import Chart
from peftkit.report.curves import group_charts
from peftkit.report.facts import Json, RunFacts, finite, is_run, mapping, read_run

FILE = "compare.json"
COSTS = ("trainable_params", "adapter_bytes", "peak_memory_bytes", "train_seconds", "target_tokens_per_second", "forgetting")


@dataclass(frozen=True)
class Trial:
    """One training of a variant.

    Attributes:
        facts: what compare.json says of it.
        run: its run directory, where there is one.
        link: its own report, relative to the folder; empty without.
    """

    facts: Json
    run: RunFacts | None
    link: str


@dataclass(frozen=True)
class Variant:
    """A variant with its trials; `number` is that of its colour."""

    number: int
    name: str
    facts: Json
    trials: list[Trial]

    def figure(self, name: str) -> Json:
        """mean, low, high and values of a figure over the trials; empty where no trial has it."""
        found = mapping(mapping(self.facts.get("summary")).get(name))
        return found if finite(found.get("mean")) is not None else {}

    @property
    def done(self) -> int:
        """Trials that have ended well."""
        return sum(trial.facts.get("state") == "done" for trial in self.trials)


@dataclass(frozen=True)
class Comparison:
    """A comparison or a sweep.

    Attributes:
        folder: its directory.
        facts: what compare.json says.
        variants: the best first.
        charts: curves of the variants over each other, means over their trials.
        prefix: what the keys of its lines begin with, so that two comparisons on a page do not switch each other's.
    """

    folder: Path
    facts: Json
    variants: list[Variant]
    charts: list[Chart]
    prefix: str

    @property
    def metric(self) -> str:
        """What the variants are judged by."""
        return str(self.facts.get("metric", "loss"))

    @property
    def figures(self) -> list[str]:
        """The figures that some variant has: the metric first, then other metrics, then cost."""
        names = dict.fromkeys([self.metric])
        names |= dict.fromkeys(
            name for variant in self.variants for name in mapping(variant.facts.get("summary")) if name not in COSTS
        )
        known = [*names, *COSTS]
        return [name for name in known if any(variant.figure(name) for variant in self.variants)]

    @property
    def failures(self) -> list[tuple[Variant, Trial]]:
        """Trials that have not ended well, and say why."""
        found = [(variant, trial) for variant in self.variants for trial in variant.trials]
        return [(variant, trial) for variant, trial in found if trial.facts.get("state") in ("failed", "refused")]

    @property
    def num_unfinished(self) -> int:
        """Trials that are still to come, or under way."""
        return sum(trial.facts.get("state") in ("pending", "running") for variant in self.variants for trial in variant.trials)


def is_comparison(folder: Path) -> bool:
    """Whether a folder is one that `compare` or `sweep` writes."""
    return (folder / FILE).is_file()


def read_comparison(folder: Path, prefix: str = "") -> Comparison:
    """A comparison, with the curves of its trials.

    Raises:
        LoadError: its file cannot be read.
    """
    try:
        facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
        found = [mapping(variant) for variant in facts["variants"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{folder / FILE} cannot be read: {type(error).__name__}: {error}; run the comparison again") from error
    variants = [_variant(folder, number, variant) for number, variant in enumerate(found)]
    groups = {variant.name: [trial.run for trial in variant.trials if trial.run is not None] for variant in variants}
    better = -1 if facts.get("greater_is_better", True) else 1
    by_metric = sorted(variants, key=lambda variant: _rank(variant, str(facts.get("metric")), better))
    return Comparison(folder, facts, by_metric, group_charts(groups, prefix), prefix)


def _rank(variant: Variant, metric: str, sign: int) -> float:
    mean = finite(variant.figure(metric).get("mean"))
    return math.inf if mean is None else sign * mean


def _variant(folder: Path, number: int, facts: Json) -> Variant:
    trials = [_trial(folder, mapping(trial)) for trial in facts.get("trials") or []]
    return Variant(number, str(facts.get("name", f"variant {number + 1}")), facts, trials)


def _trial(folder: Path, facts: Json) -> Trial:
    where = str(facts.get("run_dir") or "")
    path = folder / where
    if not where or not is_run(path):
        return Trial(facts, None, "")
    run = read_run(path)
    return Trial(facts, run, quote(f"{where}/{run.run.report_path.name}") if run.run.report_path.is_file() else "")
