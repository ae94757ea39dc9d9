"""Going on with another recipe, other rows or another model; other processes; `--locked`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import instruction_rows, write_jsonl
from tests.engine.test_resume import numbers_of
from tests.runs import curve, lines_of, peftkit_process, run_cli, tiny_recipe, train

STEPS = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "save_total_limit": 2}


def unfinished(run: Path, step: int = 3) -> None:
    """Make of a run one that was killed after a checkpoint."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter", ignore_errors=True)
    (run / "status.json").write_text(json.dumps({"state": "stopped", "step": step}))


@pytest.fixture
def stopped(models_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Recipe and run directory, stopped after step 3 of 6; its model is a copy."""
    shutil.copytree(models_dir / "llama", tmp_path / "llama")
    model = {"name_or_path": str(tmp_path / "llama")}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=STEPS, model=model)
    train(recipe, tmp_path / "run")
    unfinished(tmp_path / "run")
    return recipe, tmp_path / "run"


def change_rows(folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", instruction_rows(22)[1:])


def change_model(folder: Path) -> None:
    config = json.loads((folder / "llama/config.json").read_text())
    (folder / "llama/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


@pytest.mark.parametrize(("change", "code", "key"), [(change_rows, 3, "data.train"), (change_model, 7, "model")])
def test_other_rows_or_another_model_are_refused_unless_forced(
    stopped: tuple[Path, Path], change: Any, code: int, key: str
) -> None:
    recipe, run = stopped
    before = (run / "status.json").read_text()
    change(run.parent)
    result = run_cli("train", recipe, "--output", run, "--resume")
    assert (result.code, f"  {key} was " in result.err, "--force" in result.err) == (code, True, True), result.err
    assert (run / "status.json").read_text() == before
    result = run_cli("train", recipe, "--output", run, "--resume", "--force")
    assert (result.code, f"note: --force: {key} was " in result.err) == (0, True), result.err
    assert "resumed after step 3 of 6" in result.err
    forced = json.loads((run / "environment.json").read_text())["forced"]
    assert [entry["changes"][0].split()[0] for entry in forced] == [key]


def test_another_recipe_is_forced_and_written_down(stopped: tuple[Path, Path]) -> None:
    recipe, run = stopped
    change = ("--set", "training.learning_rate=0.005")
    refused = run_cli("train", recipe, "--output", run, "--resume", *change)
    assert (refused.code, "-  learning_rate: 0.01" in refused.err, "`--force`" in refused.err) == (2, True, True)
    train(recipe, run, "--resume", "--force", *change)
    assert "learning_rate: 0.005" in (run / "resolved.yaml").read_text()
    assert "+  learning_rate: 0.005" in json.loads((run / "environment.json").read_text())["forced"][0]["changes"]
    assert "--force: +  learning_rate: 0.005" in (run / "train.log").read_text()
    unfinished(run)  # its checkpoint is of the recipe before, which is on record
    train(recipe, run, "--resume", *change)


def test_force_without_resume_has_no_effect_and_is_refused(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    result = cli("train", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--force")
    assert (result.code, "--force: has no effect without --resume" in result.err) == (2, True)


def test_one_process_becomes_two_and_one_again(models_dir: Path, tmp_path: Path) -> None:
    """`micro_batch_size: auto` is decided anew, which is no other recipe."""
    settings = {
        "max_steps": 9,
        "save_steps": 3,
        "logging_steps": 1,
        "batch_size": 6,
        "micro_batch_size": "auto",
        "save_total_limit": 9,
    }
    recipe, run = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=settings), tmp_path / "run"
    train(recipe, tmp_path / "whole")
    train(recipe, run)
    unfinished(run)
    process = peftkit_process("train", recipe, "--output", run, "--resume", "--processes", 2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    unfinished(run, 6)
    train(recipe, run, "--resume")
    assert [line["step"] for line in lines_of(run)] == list(range(1, 10))
    assert curve(run, "loss", "grad_norm") == [
        pytest.approx(row, abs=1e-5) for row in curve(tmp_path / "whole", "loss", "grad_norm")
    ]


@pytest.mark.parametrize(
    ("data", "training"),
    [
        ({}, {"batch_size": 8, "micro_batch_size": 2}),
        ({"packing": True}, {"micro_batch_size": 1}),
        ({"streaming": True}, {}),
    ],
    ids=["accumulation", "packing", "streaming"],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    models_dir: Path, tmp_path: Path, data: dict[str, Any], training: dict[str, Any]
) -> None:
    if data.get("streaming"):
        data = {"train": {"path": str(tmp_path / "rows.jsonl"), "streaming": True}, "shuffle_buffer_size": 8}
    adapter = {"method": "lora", "r": 4, "lora_dropout": 0.1}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=STEPS | training, data=data, adapter=adapter)
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    unfinished(tmp_path / "run")
    train(recipe, tmp_path / "run", "--resume")
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "whole")


def test_locked_refuses_what_has_drifted_and_names_it(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = stopped
    train(recipe, tmp_path / "again", "--locked", str(run))
    facts = json.loads((run / "environment.json").read_text())
    facts["packages"]["peft"] = "0.1"
    (tmp_path / "old.json").write_text(json.dumps(facts))
    change_rows(tmp_path)
    result = run_cli("train", recipe, "--output", tmp_path / "third", "--locked", tmp_path / "old.json")
    assert (result.code, "  peft was 0.1, is " in result.err, "  data.train was " in result.err) == (2, True, True)
    assert not (tmp_path / "third").exists()
    result = run_cli("train", recipe, "--locked", tmp_path / "none.json")
    assert (result.code, "is no environment.json that a run has written" in result.err) == (2, True)
