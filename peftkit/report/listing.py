"""The runs in a folder, each in one line: read without trust and in a millisecond or so, as there may be a thousand."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from peftkit.adapters import CONFIG
from peftkit.errors import LoadError
from peftkit.lock import live_holder
from peftkit.report.comparison import FILE, is_comparison
from peftkit.report.facts import Json, finite, is_run, mapping
from peftkit.run import Run
from peftkit.tasks import TASKS

State = Literal["running", "finished", "stopped", "failed", "certificate failed", "damaged", ""]

_CERTIFICATE_FAILED = 6  # the exit code
_TAIL_BYTES = 8192
_LOGGED_STEP = re.compile(r" step (\d+)/(\d+) ")
_METRIC = re.compile(r"^  metric_for_best_model: (\w+)$", re.MULTILINE)
_GO_ON = "To go on:\n"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast where libyaml is built in


@dataclass(frozen=True)
class Entry:
    """One line of the list; None is unknown.

    Attributes:
        path: the directory.
        kind: a run, a folder of `compare` or `sweep`, a PEFT adapter that no run of ours made, or a folder with runs in it.
        state: how it stands; empty for adapters and folders.
        note: the rest in words: why it failed, how many trials a comparison has.
        go_on: the command that continues it; empty where none does.
        task, method, model: of its recipe.
        split, metric, value: the best value of the metric that decides, and the rows that it is of.
        step, num_steps: optimizer steps done, and all of them.
        seconds: of training.
        time: of its last change, in seconds since the epoch.
    """

    path: str
    kind: Literal["run", "compare", "sweep", "adapter", "folder"]
    state: State = ""
    note: str = ""
    go_on: str = ""
    task: str | None = None
    method: str | None = None
    model: str | None = None
    split: str | None = None
    metric: str | None = None
    value: float | None = None
    step: int | None = None
    num_steps: int | None = None
    seconds: float | None = None
    time: float = 0.0


def list_runs(folder: Path) -> list[Entry]:
    """What is in a folder (or is the folder itself), the newest first.

    Raises:
        LoadError: there is no such folder, or it cannot be looked into.
    """
    if (own := read_entry(folder)) is not None and own.kind != "folder":
        return [own]
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise LoadError(f"{folder}: {error.strerror}; name the folder that runs are in") from error
    found = [entry for path in paths if (entry := read_entry(path)) is not None]
    return sorted(found, key=lambda entry: (-entry.time, entry.path))


def read_entry(path: Path) -> Entry | None:
    """What a directory is; None where it has nothing to do with runs."""
    try:
        if is_comparison(path):
            return _comparison(path)
        if is_run(path):
            return _run(path)
        if (path / CONFIG).is_file():
            return _adapter(path)
        inside = sum(is_run(Path(entry.path)) for entry in os.scandir(path) if entry.is_dir())
    except OSError as error:
        return Entry(str(path), "folder", "damaged", f"cannot be read: {error.strerror}")
    return Entry(str(path), "folder", note=f"{_count(inside, 'run')} in it", time=path.stat().st_mtime) if inside else None


def _run(path: Path) -> Entry:
    run = Run(path)
    status, damage = _json(run.status_path)
    entry = _with_recipe(Entry(str(path), "run", time=finite(status.get("time")) or path.stat().st_mtime), run)
    if holder := live_holder(run):
        return replace(_with_progress(entry, run, status), state="running", note=f"by {holder}")
    if damage or entry.task is None:
        return replace(entry, state="damaged", note=damage or f"{run.resolved_path.name} cannot be read")
    if status.get("state") == "done":
        return _finished(entry, run, mapping(status.get("summary")))
    return _unfinished(_with_progress(entry, run, status), status)


def _with_recipe(entry: Entry, run: Run) -> Entry:
    """With what its recipe says; of a resolved recipe only what stands before `data` is read as YAML."""
    try:
        text = run.resolved_path.read_text(encoding="utf-8")
        head = yaml.load(text.partition("\ndata:")[0], _Loader)
        facts = {"task": head["task"], "method": head["adapter"]["method"], "model": head["model"]["name_or_path"]}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return entry
    stated, task = _METRIC.search(text), TASKS.get(facts["task"])
    named = stated[1] if stated and stated[1] != "null" else None
    return replace(entry, **facts, metric=named or (task.default_metric if task else None))


def _finished(entry: Entry, run: Run, summary: Json) -> Entry:
    by_split = mapping(summary.get("metrics_by_split"))
    split = next((name for name in ("validation", "test") if by_split.get(name)), None)
    metric = entry.metric if split else "loss"
    value = mapping(by_split[split]).get(str(metric)) if split else summary.get("train_loss")
    step = summary.get("global_step")
    is_whole = any(run.adapter_dir.glob("*.safetensors"))
    return replace(
        entry,
        state="finished" if is_whole else "damaged",
        note="" if is_whole else f"it is done, but {run.adapter_dir.name}/ has no weights",
        split=split or "train",
        metric=metric,
        value=finite(value),
        step=step,
        num_steps=step,
        seconds=finite(summary.get("train_seconds")),
    )


def _unfinished(entry: Entry, status: Json) -> Entry:
    error = str(status.get("error") or "")
    code = status.get("exit_code")
    if status.get("state") == "failed":
        state: State = "certificate failed" if code == _CERTIFICATE_FAILED else "failed"
        return replace(entry, state=state, note=f"exit code {code}: {error.strip().partition(chr(10))[0]}")
    why, _, command = error.partition(_GO_ON)
    resolved = Run(Path(entry.path)).resolved_path
    command = command.strip() or shlex.join(["peftkit", "train", str(resolved), "--output", entry.path, "--resume"])
    note = why.strip().removesuffix(".") or "its process has ended without a word: it was killed, or the machine went down"
    return replace(entry, state="stopped", note=note, go_on=command)


def _with_progress(entry: Entry, run: Run, status: Json) -> Entry:
    """With what is known of a run that is not done: the best evaluation so far, steps, seconds."""
    lines = _json_lines(run.metrics_path)
    scores = [(str(line.get("split")), mapping(line["metrics"]).get(str(entry.metric))) for line in lines if "metrics" in line]
    split = next((name for name in ("validation", "test") if any(name == other for other, _ in scores)), None)
    values = [value for name, found in scores if name == split and (value := finite(found)) is not None]
    task = TASKS.get(entry.task or "")
    more_is_better = bool(task and task.metrics.get(entry.metric or "", False))
    logged = _LOGGED_STEP.findall(_tail(run.log_path))
    step = max([int(done) for done, _ in logged[-1:]] + [int(finite(status.get("step")) or 0)])
    return replace(
        entry,
        split=split,
        value=(max if more_is_better else min)(values, default=None),
        step=step,
        num_steps=int(logged[-1][1]) if logged else None,
        seconds=next((finite(line.get("seconds")) for line in reversed(lines) if "seconds" in line), None),
    )


def _comparison(path: Path) -> Entry:
    facts, damage = _json(path / FILE)
    kind: Literal["compare", "sweep"] = "sweep" if facts.get("kind") == "sweep" else "compare"
    entry = Entry(str(path), kind, time=(path / FILE).stat().st_mtime, task=facts.get("task"), metric=facts.get("metric"))
    if damage:
        return replace(entry, state="damaged", note=damage)
    variants = [mapping(variant) for variant in facts.get("variants") or []]
    trials = [mapping(trial) for variant in variants for trial in variant.get("trials") or []]
    counts = Counter(str(trial.get("state")) for trial in trials)
    runs = [path / str(trial.get("run_dir")) for trial in trials if trial.get("state") == "running"]
    is_running = any(live_holder(Run(run)) for run in runs)
    is_open = bool(counts["pending"] + counts["running"])
    means = [finite(mapping(mapping(variant.get("summary")).get(str(entry.metric))).get("mean")) for variant in variants]
    states = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    best = max if facts.get("greater_is_better") else min
    return replace(
        entry,
        state="running" if is_running else "stopped" if is_open else "finished",
        note=f"{_count(len(variants), 'variant')}, {_count(len(trials), 'run')}: {states}",
        split=facts.get("split"),
        value=best([mean for mean in means if mean is not None], default=None),
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _adapter(path: Path) -> Entry:
    config, damage = _json(path / CONFIG)
    told = Entry(str(path), "adapter", time=(path / CONFIG).stat().st_mtime, task=config.get("task_type"))
    method = str(config.get("peft_type") or "").lower() or None
    note = damage or "a PEFT adapter that no run of ours has left; `peftkit evaluate` and `infer` take it"
    return replace(
        told, state="damaged" if damage else "", note=note, method=method, model=config.get("base_model_name_or_path")
    )


def _json(path: Path) -> tuple[Json, str]:
    """The mapping in a file, and what is wrong with the file; a file that is not there is wrong too."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read: {error.strerror if isinstance(error, OSError) else error}"
    return (found, "") if isinstance(found, dict) else ({}, f"{path.name} holds no mapping")


def _json_lines(path: Path) -> list[Json]:
    """Lines of evaluations, and the last lines of training."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as texts:
        lines = [text for text in texts if '"metrics"' in text]
    return list(_parsed([*lines, *_tail(path).splitlines()[1:]]))


def _parsed(texts: list[str]) -> Iterator[Json]:
    for text in texts:
        with contextlib.suppress(ValueError):  # cut short by a crash
            if isinstance(line := json.loads(text), dict):
                yield line


def _tail(path: Path) -> str:
    """The end of a file; empty where there is none."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return handle.read().decode(errors="replace")
    except OSError:
        return ""
