"""Odd steps are told with their rows; a run that is resumed tells the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from peftkit.engine.checkpoint import Progress
from peftkit.engine.examples import epoch_order
from peftkit.engine.journal import Journal
from peftkit.engine.spikes import WARM_UP, WINDOW, note_spike
from peftkit.run import Run
from peftkit.tasks.example import Example
from tests.conftest import write_jsonl
from tests.runs import lines_of, run_cli, tiny_recipe


def row(origin: str, length: int, num_targets: int = 1) -> Example:
    return Example({"input_ids": list(range(length))}, [0] * length, num_targets, origin, length)


ROWS = [row(f"rows.jsonl:{number}", number) for number in range(1, 11)] + [row("rows.jsonl:11", 99, num_targets=0)]


def notes(steps: list[tuple[float, float]], progress: Progress | None = None) -> list[str]:
    """What is said of each of these steps: loss and gradient norm."""
    progress = progress or Progress()
    said = []
    for loss, norm in steps:
        progress.step += 1
        said.append(note_spike(progress, loss, norm, ROWS, len(ROWS)))
    return said


ODD_ROW = epoch_order(60, 0, 0)[57]
USUAL = [(2.0 + 0.1 * (step % 5), 1.0 + 0.2 * (step % 3)) for step in range(60)]


@pytest.mark.parametrize("odd", [(9.0, 1.0), (2.0, 30.0)], ids=["loss", "gradient"])
def test_an_odd_step_is_told_with_its_rows(odd: tuple[float, float]) -> None:
    said = notes([*USUAL, odd])
    assert not any(said[:-1])
    assert said[-1].startswith(f"note: step 61 is unlike the last {WINDOW}: loss {odd[0]:.4f} (usually 2.2000), grad norm ")
    origins = ", ".join(f"rows.jsonl:{number}" for number in range(10, 2, -1))
    assert said[-1].endswith(f"Its rows, the longest first: {origins} and 2 more")


@pytest.mark.parametrize(
    "steps",
    [
        [*USUAL[: WARM_UP - 1], (9.0, 1.0)],
        [*USUAL, (2.6, 1.0)],
        [*USUAL, (2.0, float("inf"))],
        [(1e-7, 1e-6), (2e-7, 1e-6)] * 20 + [(1e-3, 1.5e-6)],
        [(4.0 - 0.05 * step, 1.0 + 0.01 * step) for step in range(60)],
    ],
    ids=["too early", "a little more", "skipped under fp16", "all but vanished", "learning"],
)
def test_what_is_usual_is_not_told(steps: list[tuple[float, float]]) -> None:
    assert not any(notes(steps))


def test_a_last_step_of_a_few_rows_is_left_out() -> None:
    progress = Progress()
    notes(USUAL, progress)
    assert note_spike(progress, 9.0, 30.0, ROWS[:5], 11) == ""
    assert note_spike(progress, 9.0, 30.0, ROWS[:6], 11) != ""


def test_a_series_of_odd_steps_is_told_once() -> None:
    said = notes([*USUAL, (9.0, 1.0), (9.5, 1.0), (2.0, 1.0), (9.0, 1.0)])
    assert [bool(text) for text in said[-4:]] == [True, False, False, True]


def test_the_window_is_kept_as_short_as_it_says() -> None:
    progress = Progress()
    notes(USUAL * 3, progress)
    assert len(progress.recent) == WINDOW


@pytest.fixture(scope="module")
def spiked(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Recipe, run directory and result of a run of rows that are all alike, but for that of step 58."""
    folder = tmp_path_factory.mktemp("spiked")
    settings = {"max_steps": 60, "batch_size": 1, "micro_batch_size": 1, "save_steps": 5, "save_total_limit": 12}
    settings |= {"learning_rate": 0.01, "logging_steps": 4}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, adapter={"method": "full"}, training=settings)
    rows = [{"instruction": f"the cat {number}", "output": "sat"} for number in range(60)]
    rows[ODD_ROW] = {"instruction": "the cat", "output": "zebra qux 9 9 9 !!"}
    write_jsonl(folder / "rows.jsonl", rows)
    return recipe, folder / "run", run_cli("train", recipe, "--output", folder / "run")


def test_a_run_notes_a_spike_in_its_log_and_metrics(spiked: tuple[Path, Path, Any]) -> None:
    recipe, run, result = spiked
    assert result.code == 0, result.err
    told = [line for line in (run / "train.log").read_text().splitlines() if "is unlike the last" in line]
    assert len(told) == 1
    assert "note: step 58 is unlike the last 50: loss " in told[0]
    assert told[0].endswith(f"Its rows, the longest first: {recipe.parent / 'rows.jsonl'}:{ODD_ROW + 1}")
    assert [line["step"] for line in lines_of(run) if line.get("spike")] == [60]


def test_a_resumed_run_tells_the_same(spiked: tuple[Path, Path, Any], tmp_path: Path) -> None:
    recipe, run, _ = spiked
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    for checkpoint in (tmp_path / "run/checkpoints").glob("step-*"):
        if checkpoint.name > "step-000040":
            shutil.rmtree(checkpoint)
    (tmp_path / "run/status.json").write_text(json.dumps({"state": "stopped", "step": 40}))
    resumed = run_cli("train", recipe, "--output", tmp_path / "run", "--resume")
    assert resumed.code == 0, resumed.err
    assert [line.get("spike") for line in lines_of(tmp_path / "run")] == [line.get("spike") for line in lines_of(run)]


def test_steps_that_fp16_skipped_are_counted_in_the_metrics(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(recipe=SimpleNamespace(training=SimpleNamespace(logging_steps=1)))
    plan.hardware = SimpleNamespace(device="cpu")
    accelerator: Any = MagicMock(is_main_process=True)
    journal = Journal(plan, Run(tmp_path), accelerator, MagicMock(), 9)
    progress = Progress(step=1, loss_sum=2.0, loss_targets=1)
    journal.step(progress, 0.1, 1.0)
    progress = dataclasses.replace(progress, step=2, loss_targets=1, skipped_steps=3)
    journal.step(progress, 0.1, 1.0)
    assert [line.get("skipped_steps") for line in lines_of(tmp_path)] == [None, 3]
