"""The command line that starts several processes, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.errors import RecipeError
from peftkit.launch import WORKER_MARK, is_worker, launch, launch_command, worker_arguments
from tests.unit.conftest import Load


def test_a_launch_file_is_handed_to_accelerate_with_the_arguments_of_the_workers() -> None:
    command = launch_command(2, Path("configs/x.yaml"), ["train", "r.yaml"])
    assert command[:5] == [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/x.yaml"]
    assert command[5:] == ["--num_processes", "2", "-m", "peftkit", "train", "r.yaml"]


def test_the_number_of_processes_is_left_to_the_launch_file_unless_stated() -> None:
    assert "--num_processes" not in launch_command(None, Path("configs/x.yaml"), [])


def test_without_a_launch_file_one_is_written_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_DEVICE", "cpu")
    path = Path(launch_command(2, None, [])[4])
    facts = yaml.safe_load(path.read_text())
    path.unlink()
    assert (facts["distributed_type"], facts["use_cpu"], facts["main_process_port"]) == ("MULTI_GPU", True, 0)


def test_the_workers_share_one_run_directory_and_all_overrides(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    loaded = load(recipe, "training.seed=1", "output.dir=elsewhere")
    arguments = worker_arguments(loaded, None, False, True)
    assert arguments[:6] == ["train", str(loaded.path), "--set", "training.seed=1", "--set", "output.dir=elsewhere"]
    assert (arguments[6], arguments[7].startswith("elsewhere/recipe-2"), arguments[8:]) == ("--output", True, ["--json"])


def test_a_resumed_run_is_found_by_the_workers_themselves(load: Load, recipe: dict[str, Any]) -> None:
    loaded = load(recipe)
    assert worker_arguments(loaded, None, True, False) == ["train", str(loaded.path), "--resume"]
    assert worker_arguments(loaded, Path("run"), True, False)[2:] == ["--output", "run", "--resume"]


def test_a_worker_knows_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKER_MARK, raising=False)
    assert not is_worker()
    monkeypatch.setenv(WORKER_MARK, "1")
    assert is_worker()


@pytest.mark.parametrize(
    ("processes", "config", "words"),
    [
        (0, None, "--processes: 0 is not allowed"),
        (-1, None, "--processes: -1 is not allowed"),
        (None, Path("gone.yaml"), "--launch: there is no file `gone.yaml`"),
    ],
)
def test_what_cannot_be_launched_is_refused(processes: int | None, config: Path | None, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        launch(processes, config, [])
