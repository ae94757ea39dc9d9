"""The run directory: every file name of a run is spelled here, and every file is written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import LoadError, RecipeError, ResourceError
from peftkit.plan import MICRO_BATCH, Plan
from peftkit.recipe import LoadedRecipe, Recipe
from peftkit.recipe.yaml_file import read_yaml
from peftkit.resolved import resolved_yaml

_LEFTOVER = re.compile(r"\..+\.(old|[0-9a-f]{8})")  # see `write_text` and `new_folder`


def _files_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk: without this a power cut can undo a rename (Windows has no such call)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write one JSON document atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def require_place(path: Path, option: str) -> None:
    """Refuse an output file that could not be written, before any work is done for it.

    Raises:
        RecipeError: it is a folder, or where it would be is no folder that may be written to.
    """
    if os.path.isdir(path):
        raise RecipeError(f"{option} {path}: is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not folder.is_dir():
        raise RecipeError(f"{option} {path}: {folder} is a file, no folder; name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RecipeError(f"{option} {path}: the folder {folder} may not be written to; change that, or name another place")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(_files_mode())  # safetensors writes 0600
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            elif file.is_dir():
                sync_folder(file)
        sync_folder(temporary)
        old = _set_aside(path)
        temporary.replace(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a reader sees all of it or nothing."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Move a folder, if there is one, to a hidden name."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed before it could remove it
        path.replace(old)
    return old


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed has left half written, or half removed."""
    for path in folder.glob(".*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class Run:
    """A run directory."""

    dir: Path

    @classmethod
    def create(cls, loaded: LoadedRecipe, plan: Plan, output: Path | None) -> Run:
        """Make the directory of a new run and write its recipe.

        Raises:
            RecipeError: `output` holds a run or other files already.
            ResourceError: the directory cannot be written.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = Path(plan.recipe.output.dir) / f"{plan.recipe.name}-{stamp}"
        run = cls(output or _first_free(base))
        run.require_new()
        try:
            run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
            write_text(run.recipe_path, loaded.text)
            write_text(run.resolved_path, resolved_yaml(plan))
        except OSError as error:
            raise ResourceError(f"the run directory {run.dir} cannot be written: {error.strerror}") from error
        return run

    def require_new(self) -> None:
        """Refuse a directory that holds anything beside the logs of workers, which begin before the run does.

        Raises:
            RecipeError: it does.
        """
        occupied = self.dir.exists() and (not self.dir.is_dir() or any(path != self.logs_dir for path in self.dir.iterdir()))
        if occupied:
            raise RecipeError(f"--output {self.dir}: is not empty; name a new folder, or add `--resume` to continue that run")

    @classmethod
    def open(cls, directory: Path) -> Run:
        """An existing run directory.

        Raises:
            LoadError: it is none.
        """
        run = cls(directory)
        if not run.resolved_path.is_file():
            raise LoadError(f"{directory} is no run directory: it has no {run.resolved_path.name}")
        return run

    @classmethod
    def resume(cls, plan: Plan, output: Path | None, *, force: bool = False) -> Run:
        """The run to continue: the one named, or the newest of this recipe that has not ended.

        Raises:
            RecipeError: there is none, it has ended, or its recipe is another one and that is not forced.
        """
        run = run_to_continue(plan.recipe, output)
        if run is None or not run.resolved_path.is_file():
            where = output or f"{plan.recipe.output.dir}/{plan.recipe.name}-*"
            raise RecipeError(f"--resume: {where} is no run to continue; leave --resume out to start one")
        if run.read_status().get("state") == "done":
            raise RecipeError(f"--resume: the run {run.dir} has ended; nothing is left to do")
        if not force and (changed := run.changes_of_recipe(plan)):
            remedy = "Give it the recipe that it began with, or add `--force` to go on with this one"
            raise RecipeError(f"--resume: the recipe of {run.dir} was another one:\n{changed}\n{remedy}")
        return run

    def changes_of_recipe(self, plan: Plan) -> str:
        """How a plan's recipe differs from the run's, as a diff; empty where it does not.

        Another time limit, and what a machine makes of `training.micro_batch_size: auto`, leave the result as it is.
        """
        old, size = self.resolved_path.read_text(encoding="utf-8"), self.decided_micro_batch()
        if size is not None and plan.decides(MICRO_BATCH):
            plan = dataclasses.replace(plan, micro_batch_size=size)
        before, after = (re.sub(r"(?m)^  max_seconds:.*\n", "", text).splitlines() for text in (old, resolved_yaml(plan)))
        return "\n".join(difflib.unified_diff(before, after, "the run", "this recipe", lineterm="", n=0))

    def decided_micro_batch(self) -> int | None:
        """What `training.micro_batch_size: auto` became; None where the run's recipe had a number, or there is no run yet."""
        if not self.resolved_path.is_file() or MICRO_BATCH not in self.read_environment().get("decided", {}):
            return None
        size: int = read_yaml(self.resolved_path)[0]["training"]["micro_batch_size"]
        return size

    @property
    def recipe_path(self) -> Path:
        """The recipe as written."""
        return self.dir / "recipe.yaml"

    @property
    def resolved_path(self) -> Path:
        """Every value of the recipe; itself a valid recipe."""
        return self.dir / "resolved.yaml"

    @property
    def environment_path(self) -> Path:
        """Versions, hardware and fingerprints."""
        return self.dir / "environment.json"

    @property
    def status_path(self) -> Path:
        """State, step, times, error."""
        return self.dir / "status.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step or evaluation."""
        return self.dir / "metrics.jsonl"

    @property
    def data_report_path(self) -> Path:
        """What the audit found of the rows, one JSON object a line."""
        return self.dir / "data_report.jsonl"

    @property
    def lock_path(self) -> Path:
        """Who writes to the run now."""
        return self.dir / "run.lock"

    @property
    def log_path(self) -> Path:
        """What was printed, and tracebacks of bugs."""
        return self.dir / "train.log"

    @property
    def logs_dir(self) -> Path:
        """What launched workers print that have no terminal."""
        return self.dir / "logs"

    def worker_log_path(self, rank: int | str) -> Path:
        """What the worker of this rank printed, and its stack where it crashed or hung."""
        return self.logs_dir / f"rank-{rank}.log"

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of `step-000500` checkpoints."""
        return self.dir / "checkpoints"

    @property
    def adapter_dir(self) -> Path:
        """The final or best adapter; loads with peft alone."""
        return self.dir / "adapter"

    @property
    def report_path(self) -> Path:
        """What `peftkit report` says of the run, one HTML file."""
        return self.dir / "report.html"

    def export_dir(self, target: str) -> Path:
        """What `peftkit export` writes for a target."""
        return self.dir / "exports" / target

    def evaluation_paths(self, split: str) -> tuple[Path, Path]:
        """Metrics and predictions of a split."""
        folder = self.dir / "evaluations"
        return folder / f"{split}.json", folder / f"{split}.predictions.jsonl"

    def generations_path(self, split: str) -> Path:
        """Generated answers of a split beside those of its rows."""
        return self.dir / "evaluations" / f"{split}.generations.jsonl"

    def comparison_paths(self, split: str) -> tuple[Path, Path]:
        """How the adapter differs from its base on a split: metrics, and a line for every row."""
        folder = self.dir / "evaluations"
        return folder / f"{split}.comparison.json", folder / f"{split}.comparison.jsonl"

    def evaluated_splits(self) -> list[str]:
        """The splits, and names of files, that have been evaluated."""
        ending = ".predictions.jsonl"
        return sorted(path.name.removesuffix(ending) for path in (self.dir / "evaluations").glob(f"*{ending}"))

    @property
    def template_date(self) -> str | None:
        """The day (ISO) that the run's chat template writes, if it writes one."""
        date: str | None = self.read_environment().get("template_date")
        return date

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says; empty where there is none."""
        if not self.environment_path.is_file():
            return {}
        facts: dict[str, Any] = json.loads(self.environment_path.read_text(encoding="utf-8"))
        return facts

    def record_once(self, name: str, find: Callable[[], Any]) -> None:
        """Add a fact to environment.json, where a run that goes on has not got it yet; only then it is found out."""
        known = self.read_environment()
        if name not in known:
            write_json(self.environment_path, known | {name: find()})

    @property
    def identity(self) -> dict[str, str]:
        """Fingerprints of recipe, rows and model: checkpoints of one run have the same."""
        recipe = hashlib.sha256(self.resolved_path.read_bytes()).hexdigest()
        fingerprints: dict[str, str] = self.read_environment().get("fingerprints", {})
        return {"recipe": recipe} | fingerprints

    def write_status(self, state: str, **facts: Any) -> None:
        """Replace status.json; times are seconds since the epoch."""
        write_json(self.status_path, {"state": state, "time": round(time.time(), 3), "pid": os.getpid()} | facts)

    def read_status(self) -> dict[str, Any]:
        """What status.json says; empty where there is none."""
        if not self.status_path.is_file():
            return {}
        status: dict[str, Any] = json.loads(self.status_path.read_text(encoding="utf-8"))
        return status

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; NaN is written as NaN, never hidden."""
        with self.metrics_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def sync_metrics(self) -> int:
        """Have the lines so far on disk, as a power cut must leave no checkpoint newer than they are; their size in bytes."""
        if not self.metrics_path.is_file():
            return 0
        with self.metrics_path.open("rb") as handle:
            os.fsync(handle.fileno())
            return os.fstat(handle.fileno()).st_size

    def append_data_report(self, where: str, why: str) -> None:
        """Add a training row that was left out while it was streamed."""
        line = {"split": "train", "kind": "bad_row", "row": where, "reason": why}
        with self.data_report_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def read_metrics_at(self, step: int) -> dict[str, dict[str, float]]:
        """Metrics of the evaluations after `step`, by split."""
        lines = self._read_metrics()
        return {line["split"]: line["metrics"] for line in lines if "metrics" in line and line["step"] == step}

    def read_training_lines(self) -> list[dict[str, Any]]:
        """Lines of steps, in their order."""
        return [line for line in self._read_metrics() if "loss" in line]

    def read_last_loss(self) -> float | None:
        """The loss of the last training line; None where there is none."""
        return next((line["loss"] for line in reversed(self._read_metrics()) if "loss" in line), None)

    def _read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_path.is_file():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]

    def log(self, text: str) -> None:
        """Add a line to train.log."""
        with self.log_path.open("a", encoding="utf-8") as handle:
            handle.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def truncate_metrics(self, num_bytes: int) -> None:
        """Drop what came after a checkpoint, which a resumed run writes again; `num_bytes`: see `sync_metrics`."""
        if self.metrics_path.is_file():
            with self.metrics_path.open("r+b") as handle:
                handle.truncate(min(num_bytes, self.metrics_path.stat().st_size))


def _first_free(base: Path) -> Path:
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def run_to_continue(recipe: Recipe, output: Path | None) -> Run | None:
    """The run that `--resume` means: the one named, or the newest that has not ended."""
    return Run(output) if output is not None else newest_unfinished(recipe)


def newest_unfinished(recipe: Recipe) -> Run | None:
    """The run of this recipe that was written to last and has not ended, or None."""
    # `base-large-20250101-120000` is no run of the recipe `base`.
    of_recipe = re.compile(rf"{re.escape(str(recipe.name))}-\d{{8}}-\d{{6}}(-\d+)?")
    folders = Path(recipe.output.dir).glob(f"{recipe.name}-*")
    runs = [Run(path) for path in folders if path.is_dir() and of_recipe.fullmatch(path.name)]
    open_runs = [run for run in runs if run.read_status().get("state") not in ("done", None)]
    return max(open_runs, key=lambda run: run.status_path.stat().st_mtime, default=None)
