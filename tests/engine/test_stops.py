"""Runs that are asked to stop: by signals, by Ctrl-C, by their time; while loading, training and evaluating."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import lines_of, peftkit_process, run_cli, tiny_recipe, train

LONG: dict[str, Any] = {"max_steps": 2000, "logging_steps": 1, "save_steps": 2000}


def wait_for(condition: Any, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stopped_at(recipe: Path, run: Path, file: str, number: int) -> tuple[int, str]:
    """Send a signal to a run once it has written a file; its exit code and what it says."""
    process = peftkit_process("train", recipe, "--output", run)
    wait_for((run / file).is_file, process)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    return process.returncode, message


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_a_checkpoint(models_dir: Path, tmp_path: Path, number: int, code: int) -> None:
    recipe, run = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=LONG), tmp_path / "run"
    code_found, message = stopped_at(recipe, run, "metrics.jsonl", number)
    assert code_found == code, message
    step = lines_of(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert f"stopped by {signal.Signals(number).name} after step {step} of 2000, with a full checkpoint. To go on:" in message


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_ends_a_run_at_once(models_dir: Path, tmp_path: Path, number: int, code: int) -> None:
    recipe, run = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=LONG), tmp_path / "run"
    code_found, message = stopped_at(recipe, run, "status.json", number)
    assert code_found == code, message
    assert "where there is nothing to save. To go on:" in message
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"], (run / "metrics.jsonl").exists()) == ("stopped", code, False)
    assert not (run / "run.lock").exists()


def test_a_signal_while_libraries_are_imported_is_told_in_words(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    process = peftkit_process("train", recipe, "--output", tmp_path / "run", cold=True)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch_python" in maps.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75, message
    assert "stopped by SIGTERM before training began: the same command starts again" in message


def test_a_signal_while_evaluating_is_heard_when_that_has_ended(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.engine import held_out

    score = held_out.score_examples

    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return score(*arguments, **options)

    monkeypatch.setattr(held_out, "score_examples", interrupted)
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"validation": 0.2}, training={"eval_steps": 4})
    result = run_cli("train", recipe, "--output", tmp_path / "run")
    assert result.code == 75
    assert "stopped by SIGTERM after step 4 of 6" in result.err
    assert [line["step"] for line in lines_of(tmp_path / "run") if "split" in line] == [4]


def test_a_run_stops_when_its_time_is_up_and_goes_on(models_dir: Path, tmp_path: Path) -> None:
    timed = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training={"max_seconds": 0.001})
    for step in range(1, 6):
        resume = ["--resume"] if step > 1 else []
        result = run_cli("train", timed, "--output", tmp_path / "run", *resume)
        assert (result.code, f"stopped by training.max_seconds after step {step} of 6" in result.err) == (75, True)
    train(timed, tmp_path / "run", "--resume")
    train(timed, tmp_path / "whole", "--set", "training.max_seconds=null")
    losses = [[line["loss"] for line in lines_of(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == losses[1]


def test_the_second_ctrl_c_stops_at_once() -> None:
    from peftkit.engine.signals import StopSignal
    from peftkit.errors import Stopped
    from peftkit.stop import stops_at_once

    def twice() -> None:
        with stops_at_once("here"), StopSignal().heard():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="stopped by SIGINT here") as stop:
        twice()
    assert stop.value.exit_code == 130
