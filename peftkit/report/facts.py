"""What a run directory says, read without trust: a run may be unfinished, killed in the middle of a line, or damaged."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from peftkit.errors import LoadError, RecipeError
from peftkit.recipe.yaml_file import read_yaml
from peftkit.run import Run

Json = dict[str, Any]
MAX_PREDICTIONS = 20_000  # rows of a split that are looked at
MAX_ANSWERS = 10  # generated answers that are shown
MAX_FINDINGS = 50  # findings of the audit that are kept word for word; all are counted


@dataclass(frozen=True)
class Evaluation:
    """What has been found on one split.

    Attributes:
        split: its name.
        num_rows: rows that were scored.
        metrics: numbers and tables, as `evaluations/SPLIT.json` has them.
        predictions: one mapping per row.
        answers: those that were generated, beside what the rows say; a mapping each.
        comparison: the adapter against its base, where `evaluate --compare-base` has been run; else empty.
    """

    split: str
    num_rows: int
    metrics: Json
    predictions: list[Json]
    answers: list[Json]
    comparison: Json


@dataclass(frozen=True)
class RunFacts:
    """A run, as far as its directory tells.

    Attributes:
        run: its directory.
        name: what it is called on the page; runs that are shown together have different ones.
        written: the recipe as it was written; empty where it cannot be read.
        recipe_text: the same with its comments.
        resolved: the recipe with every value; likewise.
        environment: versions, machine, fingerprints.
        status: state, step, error, and the summary of a run that is done.
        steps: the training lines of metrics.jsonl, in their order.
        scores: split -> (step, metrics) in the order of steps, one for each step.
        samples: lines with texts that were generated while training.
        evaluations: what is in `evaluations/`.
        findings: the first findings of the audit.
        num_findings: (split, kind) -> how many there are.
        log: train.log.
        unreadable: files and lines that could not be read, in words.
        kept_step: the step whose adapter was kept, where it is known not to be the last one.
        adapter_bytes: size of the adapter's weights; 0 without any.
    """

    run: Run
    name: str
    written: Json = field(default_factory=dict)
    recipe_text: str = ""
    resolved: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    status: Json = field(default_factory=dict)
    steps: list[Json] = field(default_factory=list)
    scores: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    findings: list[Json] = field(default_factory=list)
    num_findings: Counter[tuple[str, str]] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    kept_step: int | None = None
    adapter_bytes: int = 0

    @property
    def state(self) -> str:
        """done, failed, stopped, training, or unknown."""
        return str(self.status.get("state", "unknown"))

    @property
    def summary(self) -> Json:
        """What `train --json` printed; empty before the run is done."""
        return mapping(self.status.get("summary"))

    @property
    def last_scores(self) -> dict[str, dict[str, float]]:
        """split -> its metrics: those of the adapter that was kept, or the newest of a run that goes on."""
        known = mapping(self.summary.get("metrics_by_split"))
        return {split: known.get(split) or scores[-1][1] for split, scores in self.scores.items()}

    @property
    def first_scores(self) -> dict[str, dict[str, float]]:
        """split -> metrics before the first step, where they were measured."""
        return {split: scores[0][1] for split, scores in self.scores.items() if scores[0][0] == 0}

    @property
    def main_split(self) -> str | None:
        """The split that figures are quoted of: test, else validation, else any."""
        names = ("test", "validation", *self.scores)
        return next((name for name in names if name in self.scores), None)

    @property
    def num_steps(self) -> int:
        """Steps that have been trained."""
        return int(self.status.get("step") or (self.steps[-1]["step"] if self.steps else 0))


def is_run(folder: Path) -> bool:
    """Whether a folder is what is left of a run."""
    run = Run(folder)
    return any(path.is_file() for path in (run.resolved_path, run.status_path, run.metrics_path))


def read_run(folder: Path, name: str = "") -> RunFacts:
    """Everything about a run that its directory still tells.

    Raises:
        LoadError: it is no run directory.
    """
    if not is_run(folder):
        raise LoadError(f"{folder} is no run directory, and no folder of a comparison; name what `train` or `compare` wrote")
    run, bad = Run(folder), list[str]()
    lines = list(_json_lines(run.metrics_path, bad))
    findings = list(_json_lines(run.data_report_path, bad))
    return RunFacts(
        run=run,
        name=name or run.dir.absolute().name,
        written=_read(run.recipe_path, lambda path: read_yaml(path)[0], bad),
        recipe_text=_text(run.recipe_path),
        resolved=_read(run.resolved_path, lambda path: read_yaml(path)[0], bad),
        environment=_read(run.environment_path, _json, bad),
        status=_read(run.status_path, _json, bad),
        steps=[line for line in lines if is_number(line.get("step")) and "loss" in line],
        scores=_scores(lines),
        samples=[line for line in lines if isinstance(line.get("samples"), list)],
        evaluations=[_evaluation(run, split, bad) for split in run.evaluated_splits()],
        findings=findings[:MAX_FINDINGS],
        num_findings=Counter((str(line.get("split")), str(line.get("kind"))) for line in findings),
        unreadable=bad,
        kept_step=_kept_step(lines),
        adapter_bytes=sum(path.stat().st_size for path in run.adapter_dir.glob("*.safetensors")),
    )


def read_runs(folders: Sequence[Path]) -> list[RunFacts]:
    """Several runs, named by as much of their paths as tells them apart.

    Raises:
        LoadError: one of them is no run directory.
        RecipeError: one is named twice.
    """
    paths = [folder.absolute() for folder in folders]
    if twice := [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]:
        raise RecipeError(f"{twice[0]}: is named twice; name every run once")
    depth = next(n for n in range(1, 100) if len({path.parts[-n:] for path in paths}) == len(paths))
    return [read_run(path, "/".join(path.parts[-depth:])) for path in paths]


def mapping(value: Any) -> Json:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number; NaN and infinity are."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers among metrics."""
    return {name: value for name, value in values.items() if is_number(value)}


def _scores(lines: Sequence[Json]) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """A step that was evaluated again, as the kept adapter's is at the end, counts once."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        if isinstance(line.get("metrics"), dict) and is_number(line.get("step")):
            found.setdefault(str(line.get("split")), {})[line["step"]] = numbers(line["metrics"])
    return {split: sorted(by_step.items()) for split, by_step in found.items()}


def _kept_step(lines: Sequence[Json]) -> int | None:
    """At its end a run evaluates what it keeps: an evaluation of an earlier step, after the last training line."""
    last = max((line["step"] for line in lines if "loss" in line and is_number(line.get("step"))), default=0)
    newest = next((line for line in reversed(lines) if "metrics" in line or "loss" in line), {})
    step = finite(newest.get("step")) if "metrics" in newest else None
    return int(step) if step is not None and 0 < step < last else None


def _evaluation(run: Run, split: str, bad: list[str]) -> Evaluation:
    metrics_path, predictions_path = run.evaluation_paths(split)
    known = _read(metrics_path, _json, bad)
    predictions = list(islice(_json_lines(predictions_path, bad), MAX_PREDICTIONS))
    answers = list(islice(_json_lines(run.generations_path(split), bad), MAX_ANSWERS))
    comparison = _read(run.comparison_paths(split)[0], _json, bad)
    num_rows = known.get("num_rows", len(predictions))
    return Evaluation(split, num_rows, mapping(known.get("metrics")), predictions, answers, comparison)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read(path: Path, reader: Callable[[Path], Any], bad: list[str]) -> Json:
    """What a file holds; an empty mapping where there is none, or where it cannot be read, which is noted."""
    if not path.is_file():
        return {}
    try:
        found = reader(path)
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecipeError) as error:
        bad.append(f"{path.name} cannot be read: {error}")
        return {}
    return found


def _json_lines(path: Path, bad: list[str]) -> Iterator[Json]:
    """The JSON objects of a file, one a line; lines that are none, such as one cut short by a crash, are counted."""
    if not path.is_file():
        return
    broken = 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as texts:
        for text in texts:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict):
                yield line
            else:
                broken += 1
    if broken:
        bad.append(f"{path.name} has {broken:,} line{'s' * (broken > 1)} that cannot be read")


def finite(value: Any) -> float | None:
    """A number that can be drawn, else None."""
    return float(value) if is_number(value) and math.isfinite(value) else None
