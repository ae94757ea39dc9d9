"""Whole runs through the command line, for fixtures that several tests share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from tests.conftest import Result, rows_of, write_jsonl
from tests.forks import Forked

_MODELS = {"CAUSAL_LM": "llama", "SEQ_2_SEQ_LM": "t5"}  # all others: bert


def run_cli(*arguments: Any) -> Result:
    """`peftkit ARGUMENTS` in this process, for fixtures that outlive one test (`cli` lives for one)."""
    from peftkit.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["peftkit", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    return Result(code, out.getvalue(), err.getvalue())


def tiny_recipe(task: str, models_dir: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of a task on its tiny model, in a file; sections are merged into it.

    It has 21 rows, so that every third step of 8 rows is one of 5.
    """
    rows = rows_of(task, 21)
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(models_dir / _MODELS.get(task, "bert"))},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "max_length": 60},
        "training": {"learning_rate": 0.01, "max_steps": 6, "batch_size": 8, "micro_batch_size": 4, "logging_steps": 1},
    }
    for name, values in sections.items():
        changed = values if "method" in values else recipe.get(name, {}) | values
        recipe[name] = {key: value for key, value in changed.items() if value is not None}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def train(recipe: Path, output: Path, *arguments: str) -> dict[str, Any]:
    """Train in this process; the summary."""
    result = run_cli("train", recipe, "--output", output, "--json", *arguments)
    assert result.code == 0, result.err
    summary: dict[str, Any] = result.json
    return summary


def peftkit_process(*arguments: Any, environment: dict[str, str] | None = None, cold: bool = False) -> subprocess.Popen[str]:
    """`peftkit ARGUMENTS` as a process of its own, with further environment variables; a fork, see there, or a cold start."""
    environment = os.environ | {"PEFTKIT_DEVICE": "cpu"} | (environment or {})
    command = [sys.executable, "-m", "peftkit", *map(str, arguments)]
    start = subprocess.Popen if cold else Forked
    return start(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(run: Path, *names: str) -> list[list[float]]:
    """The named numbers of every training line."""
    return [[line[name] for name in names] for line in lines_of(run) if "loss" in line]
