"""The command line that starts several processes, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RecipeError
from peftkit.launch import (
    JOB_DIR,
    OPTIONS,
    WORKER_MARK,
    Launch,
    is_worker,
    launch_command,
    launch_options,
    report_exit,
    resolve,
    run_of_workers,
    worker_arguments,
    worker_run_dir,
)
from peftkit.launch_file import read_sharding
from peftkit.machines import Machines
from peftkit.run import Run
from tests.unit.conftest import Load

CPU = {"num_machines": 1, "machine_rank": 0, "num_processes": 2}


def test_the_workers_are_started_by_an_agent_that_accelerate_is_in() -> None:
    command = launch_command(Path("launch.yaml"), Path("outcome.json"), ["train", "r.yaml"])
    assert command[:5] == [sys.executable, "-m", "peftkit.agent", str(os.getpid()), "outcome.json"]
    assert command[5:] == ["--config_file", "launch.yaml", "-m", "peftkit", "train", "r.yaml"]


def test_the_launch_file_of_this_machine_is_gloo_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_DEVICE", "cpu")
    facts = resolve(Launch(processes=3), "auto")
    assert (facts["distributed_type"], facts["use_cpu"], facts["main_process_port"]) == ("MULTI_GPU", True, 0)
    assert facts["num_processes"] == 3


def test_the_workers_share_one_run_directory_and_all_overrides(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    loaded = load(recipe, "training.seed=1", "output.dir=elsewhere")
    run_dir = worker_run_dir(loaded, None, False)
    arguments = worker_arguments(loaded, run_dir, False, True)
    assert arguments[:6] == ["train", str(loaded.path), "--set", "training.seed=1", "--set", "output.dir=elsewhere"]
    assert (arguments[6:], str(run_dir).startswith("elsewhere/recipe-2")) == (["--output", str(run_dir), "--json"], True)


def test_a_resumed_run_is_the_one_named_or_the_newest_unfinished(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    loaded = load(recipe, f"output.dir={tmp_path}")
    run = Run(tmp_path / "recipe-20250101-120000")
    run.dir.mkdir()
    run.write_status("failed")
    assert worker_run_dir(loaded, None, True) == run.dir
    assert worker_run_dir(loaded, Path("run"), True) == Path("run")
    assert worker_arguments(loaded, run.dir, True, False)[2:] == [
        "--set",
        f"output.dir={tmp_path}",
        "--output",
        str(run.dir),
        "--resume",
    ]


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
        resolve(Launch(processes, config), "auto")


@pytest.mark.parametrize("read", [lambda file: read_sharding(None, file), lambda file: resolve(Launch(None, file), "auto")])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "cannot be read as YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"num_processes: \xe9", "cannot be read as YAML: 'utf-8' codec"),
        (b"num_processes: many", "num_processes: many is not allowed; it takes a whole number above 0"),
        (b"num_processes: -2", "num_processes: -2 is not allowed"),
        (b"- a", "is no launch file of accelerate"),
    ],
)
def test_a_launch_file_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str, read: Any) -> None:
    (tmp_path / "launch.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        read(tmp_path / "launch.yaml")


def test_a_worker_tells_its_launcher_why_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {WORKER_MARK: "1", JOB_DIR: str(tmp_path), "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    report_exit(0)
    assert list(tmp_path.iterdir()) == []
    report_exit(3, "bad rows")
    facts = {"code": 3, "rank": 2, "message": "bad rows", "lost_peer": False, "at_terminal": False}
    assert json.loads((tmp_path / "exit-2.json").read_text()) == facts


def test_several_machines_need_an_output_folder(load: Load, recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="--output: several machines need it"):
        run_of_workers(CPU | {"num_machines": 2}, load(recipe), None, False)


def test_a_folder_that_holds_more_than_logs_is_refused_before_workers_start(
    load: Load, recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "run/logs").mkdir(parents=True)
    assert run_of_workers(CPU, load(recipe), tmp_path / "run", False) == Run(tmp_path / "run")
    (tmp_path / "run/notes.txt").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        run_of_workers(CPU, load(recipe), tmp_path / "run", False)
    assert run_of_workers(CPU | {"machine_rank": 1}, load(recipe), tmp_path / "run", False).dir == tmp_path / "run"


def test_workers_know_the_options_that_their_job_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Launch(2, Path("my configs/fsdp2.yaml"), machines=Machines(2, 1, "10.0.0.1"))
    stated = ["--processes", "2", "--launch", "my configs/fsdp2.yaml", "--num-machines", "2", "--machine-rank", "1"]
    assert asked.options == [*stated, "--main-process-ip", "10.0.0.1"]
    monkeypatch.setenv(OPTIONS, shlex.join(asked.options))
    assert launch_options() == []
    monkeypatch.setenv(WORKER_MARK, "1")
    assert launch_options() == asked.options
