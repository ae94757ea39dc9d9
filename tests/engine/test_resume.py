"""Runs that are killed, stopped, damaged or continued."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.engine.checksums import write_checksums
from peftkit.run import write_json
from tests.forks import Forked
from tests.runs import lines_of, peftkit_process, run_cli, tiny_recipe, train

STEPS = 120


def recipe_in(models_dir: Path, folder: Path, dropout: float) -> Path:
    """Lines, evaluations and checkpoints at steps that do not coincide, so that a checkpoint falls between two lines."""
    training = {"max_steps": STEPS, "logging_steps": 4, "save_steps": 5, "eval_steps": 14}
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": dropout}
    return tiny_recipe("CAUSAL_LM", models_dir, folder, training=training, adapter=adapter, data={"validation": 0.25})


@pytest.fixture(scope="module")
def whole(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], tuple[Path, Path]]:
    """Recipe and run directory of a run with this dropout that nothing interrupted."""
    runs: dict[float, tuple[Path, Path]] = {}

    def get(dropout: float) -> tuple[Path, Path]:
        if dropout not in runs:
            folder = tmp_path_factory.mktemp("whole")
            recipe = recipe_in(models_dir, folder, dropout)
            train(recipe, folder / "run")
            runs[dropout] = recipe, folder / "run"
        return runs[dropout]

    return get


@pytest.fixture
def stopped(whole: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Recipe and run directory as a run leaves them that was stopped after its last checkpoint but one."""
    recipe, run = whole(0.0)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "adapter")
    (copy / "status.json").write_text(json.dumps({"state": "stopped", "step": STEPS}))
    shutil.rmtree(copy / f"checkpoints/step-{STEPS:06d}")
    return recipe, copy


def interrupt(recipe: Path, run: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a run as a process of its own and send a signal once it has some checkpoints; exit status and stderr."""
    process = peftkit_process("train", recipe, "--output", run)
    deadline = time.monotonic() + 120
    while not any(path.name > "step-000015" for path in (run / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    try:
        return process.wait(60), process.communicate()[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without what the clock and the machine decide."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory_bytes")} for line in lines_of(run)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole: Any, tmp_path: Path, dropout: float) -> None:
    recipe, expected = whole(dropout)
    assert interrupt(recipe, tmp_path / "run", signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (tmp_path / "run/adapter").exists()
    summary = train(recipe, tmp_path / "run", "--resume")
    assert summary["global_step"] == STEPS
    assert numbers_of(tmp_path / "run") == numbers_of(expected)
    assert adapter_of(tmp_path / "run") == adapter_of(expected)


def test_sigterm_writes_a_checkpoint_and_exits_75(whole: Any, tmp_path: Path) -> None:
    recipe, expected = whole(0.0)
    code, message = interrupt(recipe, tmp_path / "run", signal.SIGTERM)
    assert code == 75
    status = json.loads((tmp_path / "run/status.json").read_text())
    newest = int(max((tmp_path / "run/checkpoints").glob("step-*")).name[5:])
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, newest)
    assert f"stopped by SIGTERM after step {newest} of {STEPS}, with a full checkpoint. To go on:" in message
    assert f"peftkit train {recipe} --output {tmp_path / 'run'} --resume" in message
    train(recipe, tmp_path / "run", "--resume")
    assert numbers_of(tmp_path / "run") == numbers_of(expected)


def test_resume_without_output_finds_the_newest_unfinished_run(models_dir: Path, tmp_path: Path) -> None:
    recipe, run = tiny_recipe("CAUSAL_LM", models_dir, tmp_path), tmp_path / "recipe-20250101-000000"
    here = ("--set", f"output.dir={tmp_path}")
    train(recipe, run, *here)
    (run / "status.json").write_text(json.dumps({"state": "stopped", "step": 6}))
    result = run_cli("train", recipe, "--resume", "--json", *here)
    assert result.code == 0, result.err
    assert result.json["run_dir"] == str(run)


def test_resume_with_another_recipe_is_refused_with_the_difference(cli: Any, stopped: tuple[Path, Path]) -> None:
    recipe, run = stopped
    result = cli("train", recipe, "--output", run, "--resume", "--set", "training.learning_rate=0.5")
    assert result.code == 2
    assert "-  learning_rate: 0.01\n+  learning_rate: 0.5" in result.err


def test_resume_of_a_finished_run_is_refused(cli: Any, whole: Any) -> None:
    recipe, run = whole(0.0)
    result = cli("train", recipe, "--output", run, "--resume")
    assert result.code == 2
    assert f"the run {run} has ended; nothing is left to do" in result.err


def test_resume_where_no_run_is_is_refused(cli: Any, whole: Any, tmp_path: Path) -> None:
    result = cli("train", whole(0.0)[0], "--output", tmp_path / "none", "--resume")
    assert result.code == 2
    assert "is no run to continue" in result.err


def spoil(file: Path, damage: str) -> None:
    """Cut a file in half, fill it with garbage, flip one bit of it, or remove it."""
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
        return
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    file.write_bytes({"cut": content[: len(content) // 2], "garbage": b"\x93garbage" * 40, "flipped": flipped}[damage])


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.pt", "rng.pt", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "gone", "flipped"])
def test_a_run_without_a_sound_checkpoint_is_refused(cli: Any, stopped: tuple[Path, Path], name: str, damage: str) -> None:
    recipe, run = stopped
    folder = run / f"checkpoints/step-{STEPS - 5:06d}"
    spoil(folder / name, damage)
    result = cli("train", recipe, "--output", run, "--resume")
    assert result.code == 7
    assert f"no checkpoint of {run} can be loaded" in result.err
    assert f"{folder}: " in result.err
    assert name in result.err


def test_a_damaged_checkpoint_is_passed_over_and_named(whole: Any, tmp_path: Path) -> None:
    recipe, expected = whole(0.3)
    interrupt(recipe, tmp_path / "run", signal.SIGKILL)
    newest, before = sorted((tmp_path / "run/checkpoints").glob("step-*"))[::-1][:2]
    spoil(newest / "optimizer.pt", "flipped")
    result = run_cli("train", recipe, "--output", tmp_path / "run", "--resume")
    assert result.code == 0, result.err
    log = (tmp_path / "run/train.log").read_text()
    assert f"the checkpoint {newest} is passed over: optimizer.pt is not what was written" in log
    assert f"resumed after step {int(before.name[5:])} of {STEPS}" in log
    assert numbers_of(tmp_path / "run") == numbers_of(expected)


def test_a_checkpoint_of_another_run_is_passed_over(cli: Any, stopped: tuple[Path, Path]) -> None:
    recipe, run = stopped
    folder = run / f"checkpoints/step-{STEPS - 5:06d}"
    write_json(folder / "identity.json", json.loads((folder / "identity.json").read_text()) | {"data.train": "others"})
    write_checksums(folder)
    result = cli("train", recipe, "--output", run, "--resume")
    assert result.code == 7
    assert "it is of another data.train" in result.err


def test_a_run_killed_between_a_new_best_and_a_checkpoint_ends_alike(whole: Any, tmp_path: Path) -> None:
    """Step 42 is a new best; the checkpoint before it, after step 40, knows that of step 14."""
    recipe, expected = whole(0.3)
    program = """
import os, sys
from peftkit.engine import checkpoint, trainer
save = checkpoint.save_best
def save_and_die(run, model, step):
    save(run, model, step)
    if step == 42:
        os.kill(os.getpid(), 9)
trainer.save_best = save_and_die
from peftkit.cli import main
main()
"""
    command = [sys.executable, "-c", program, "train", recipe, "--output", tmp_path / "run"]
    assert Forked(command, stderr=subprocess.DEVNULL).wait() == -signal.SIGKILL
    assert best_steps(tmp_path / "run") == [14, 42]
    train(recipe, tmp_path / "run", "--resume")
    assert numbers_of(tmp_path / "run") == numbers_of(expected)
    assert adapter_of(tmp_path / "run") == adapter_of(expected)


def best_steps(run: Path) -> list[int]:
    """The steps whose best adapters are kept."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("best-*"))


def adapter_of(run: Path) -> bytes:
    """The trained adapter."""
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def test_what_a_killed_process_left_half_written_is_removed(stopped: tuple[Path, Path]) -> None:
    recipe, run = stopped
    left = [run / "checkpoints/.step-000120.0a1b2c3d", run / "checkpoints/.step-000110.old", run / ".adapter.01234567"]
    for folder in left:
        (folder / "inside").mkdir(parents=True)
    train(recipe, run, "--resume")
    assert [folder for folder in left if folder.exists()] == []


def test_a_folder_that_is_not_empty_is_not_written_to(cli: Any, whole: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = cli("train", whole(0.0)[0], "--output", tmp_path)
    assert result.code == 2
    assert f"--output {tmp_path}: is not empty" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
