"""How a run ends: its exit code through the launcher, its last loss, and bookkeeping that cannot fail it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit.commands import train as command
from tests.conftest import write_jsonl
from tests.runs import lines_of, peftkit_process, run_cli, tiny_recipe, train


def test_bad_rows_end_a_launched_run_as_they_end_any(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": 1}])
    process = peftkit_process("train", recipe, "--output", tmp_path / "run", "--processes", 2)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 3, err


def test_another_recipe_ends_a_launched_resume_with_its_own_code(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    train(recipe, tmp_path / "run")
    old = {"state": "stopped", "step": 6, "exit_code": 75}
    (tmp_path / "run/status.json").write_text(json.dumps(old))
    arguments = ("--output", tmp_path / "run", "--resume", "--processes", 2, "--set", "training.seed=1")
    process = peftkit_process("train", recipe, *arguments)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 2, err


def test_a_run_that_stops_early_has_a_last_loss(models_dir: Path, tmp_path: Path) -> None:
    settings = {"eval_steps": 1, "early_stopping_patience": 2, "early_stopping_threshold": 100.0, "logging_steps": 5}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"validation": 0.2}, training=settings)
    summary = train(recipe, tmp_path / "run")
    assert summary["global_step"] == 3
    training = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert [(line["step"], line["loss"]) for line in training] == [(3, summary["train_loss"])]


def test_a_resumed_run_whose_steps_are_done_has_its_last_loss(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    first = train(recipe, tmp_path / "run")
    (tmp_path / "run/status.json").write_text(json.dumps({"state": "failed", "step": 6, "exit_code": 1}))
    assert train(recipe, tmp_path / "run", "--resume")["train_loss"] == first["train_loss"]


def test_a_certified_run_does_not_fail_for_its_memory_plan(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("no passes")

    monkeypatch.setattr(command, "plan_memory", fail)
    result = run_cli("train", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--output", tmp_path / "run")
    assert result.code == 0, result.err
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["summary"]["predicted_memory_bytes"]) == ("done", None)
    assert status["summary"]["peak_memory_bytes"] > 0
    assert "the plan for the memory could not be made: ZeroDivisionError: no passes" in (tmp_path / "run/train.log").read_text()
    assert "the plan said nothing: it could not be made" in result.out
