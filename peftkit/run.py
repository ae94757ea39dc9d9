"""The run directory: every file name of a run is spelled here, and every file is written atomically."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftkit.errors import LoadError, RecipeError, ResourceError
from peftkit.plan import Plan
from peftkit.recipe import LoadedRecipe, Recipe
from peftkit.recipe.paths import absolute_path
from peftkit.recipe.yaml_file import parse_scalar
from peftkit.tasks import keys_of_others

PACKAGES = ("peftkit", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers")
# `--set some.api_key=abc` and `--set=some.api_key=abc`; a tokenizer is no secret.
_SECRET = re.compile(r"((?:token(?!izer)|key|secret|password)[\w.\-]*\s*=).*", re.IGNORECASE | re.DOTALL)


def _files_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


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
        old = path.with_name(f".{path.name}.old")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # left by a kill between the next two lines
            path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    def resume(cls, plan: Plan, output: Path | None) -> Run:
        """The run to continue: the one named, or the newest of this recipe that has not ended.

        Raises:
            RecipeError: there is none, it has ended, or its recipe is another one.
        """
        run = cls(output) if output is not None else newest_unfinished(plan.recipe)
        if run is None or not run.resolved_path.is_file():
            where = output or f"{plan.recipe.output.dir}/{plan.recipe.name}-*"
            raise RecipeError(f"--resume: {where} is no run to continue; leave --resume out to start one")
        if run.read_status().get("state") == "done":
            raise RecipeError(f"--resume: the run {run.dir} has ended; nothing is left to do")
        old, new = run.resolved_path.read_text(encoding="utf-8"), resolved_yaml(plan)
        if old != new:
            changed = difflib.unified_diff(old.splitlines(), new.splitlines(), "the run", "this recipe", lineterm="", n=0)
            raise RecipeError(f"--resume: the recipe of {run.dir} was another one:\n" + "\n".join(changed))
        return run

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

    def evaluation_paths(self, split: str) -> tuple[Path, Path]:
        """Metrics and predictions of a split."""
        folder = self.dir / "evaluations"
        return folder / f"{split}.json", folder / f"{split}.predictions.jsonl"

    @property
    def template_date(self) -> str | None:
        """The day (ISO) that the run's chat template writes, if it writes one."""
        if not self.environment_path.is_file():
            return None
        date: str | None = json.loads(self.environment_path.read_text(encoding="utf-8")).get("template_date")
        return date

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

    def append_data_report(self, where: str, why: str) -> None:
        """Add a training row that was left out while it was streamed."""
        line = {"split": "train", "kind": "bad_row", "row": where, "reason": why}
        with self.data_report_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")

    def read_metrics_at(self, step: int) -> dict[str, dict[str, float]]:
        """Metrics of the evaluations after `step`, by split."""
        lines = self._read_metrics()
        return {line["split"]: line["metrics"] for line in lines if "split" in line and line["step"] == step}

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

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again."""
        if self.metrics_path.is_file():
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(self.metrics_path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


def _first_free(base: Path) -> Path:
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def newest_unfinished(recipe: Recipe) -> Run | None:
    """The run of this recipe that was written to last and has not ended, or None."""
    # `base-large-20250101-120000` is no run of the recipe `base`.
    of_recipe = re.compile(rf"{re.escape(str(recipe.name))}-\d{{8}}-\d{{6}}(-\d+)?")
    folders = Path(recipe.output.dir).glob(f"{recipe.name}-*")
    runs = [Run(path) for path in folders if path.is_dir() and of_recipe.fullmatch(path.name)]
    open_runs = [run for run in runs if run.read_status().get("state") not in ("done", None)]
    return max(open_runs, key=lambda run: run.status_path.stat().st_mtime, default=None)


def resolved_yaml(plan: Plan) -> str:
    """The recipe with every value that has an effect, paths absolute, `auto` decided: a valid recipe again."""
    data = plan.recipe.model_dump(mode="json")
    data["model"]["dtype"] = plan.dtype
    data["model"]["quantization"] = _resolved_quantization(plan)
    data["training"] |= {
        "mixed_precision": plan.mixed_precision,
        "micro_batch_size": plan.micro_batch_size,
        "learning_rate": plan.learning_rate,
    }
    if data["training"]["max_steps"] is not None:
        del data["training"]["num_train_epochs"]
    if not plan.task.generates:
        del data["generation"]
    if plan.recipe.data is not None:
        if not plan.task.train_on:
            del data["data"]["train_on"]
        if "max_length" not in plan.recipe.data.model_fields_set:
            del data["data"]["max_length"]  # the default bows to what the model can take
        if data["data"]["validation"] is None and data["data"]["test"] is None:
            del data["evaluation"]
    for key in keys_of_others(plan.task):
        section, _, name = key.rpartition(".")
        (data.get(section) or {} if section else data).pop(name, None)
    _make_absolute(data, plan.recipe_dir)
    return yaml.dump(data, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)


def _resolved_quantization(plan: Plan) -> dict[str, Any] | None:
    section, found = plan.recipe.model.quantization, plan.quantization
    if section is None or found is None:
        return None
    # Defaults of the schema need not be what a checkpoint has that is quantised already.
    stated = section.model_dump(mode="json", include=section.model_fields_set if found.is_stored else None)
    return stated | ({"compute_dtype": found.compute_dtype} if found.computes_in or not found.is_stored else {})


class _RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes what our reader takes for a number, such as `1e4`, which YAML 1.1 takes for text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(parse_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_RecipeDumper.add_representer(str, _represent_text)


def _make_absolute(data: dict[str, Any], recipe_dir: Path) -> None:
    rows = data["data"] or {}
    splits = {name: rows[name] for name in ("train", "validation", "test") if isinstance(rows.get(name), list)}
    # A single source is written as the section that it is.
    rows |= {name: sources[0] for name, sources in splits.items() if len(sources) == 1}
    sources = [source for sources in splits.values() for source in sources]
    names = [(data["model"], key) for key in ("name_or_path", "tokenizer_name_or_path", "chat_template")]
    for section, key in [*names, *((source, "path") for source in sources)]:
        if section[key] is not None and (path := absolute_path(section[key], recipe_dir)) is not None:
            section[key] = str(path)


def environment(plan: Plan, fingerprints: dict[str, str]) -> dict[str, Any]:
    """Versions, machine, command line (secrets removed) and fingerprints of data and model."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": plan.hardware.device_name,
        "num_processes": plan.hardware.num_processes,
        "git_commit": _git_commit(plan.recipe_dir),
        "argv": [_without_secret(argument) for argument in sys.argv],
        "fingerprints": fingerprints,
    }


def _git_commit(folder: Path) -> str | None:
    """The commit that the recipe's folder is at; None outside a repository or without git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _without_secret(argument: str) -> str:
    return _SECRET.sub(r"\1***", argument)
