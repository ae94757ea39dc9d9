"""The command line that starts several processes, and what it refuses."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.errors import RecipeError
from peftkit.launch import (
    EXIT_FILE,
    WORKER_MARK,
    is_worker,
    launch,
    launch_command,
    read_sharding,
    report_exit,
    worker_arguments,
    worker_run_dir,
    write_launch_file,
)
from peftkit.run import Run
from tests.unit.conftest import Load


def test_a_launch_file_is_handed_to_accelerate_with_the_arguments_of_the_workers() -> None:
    command = launch_command(2, Path("configs/x.yaml"), ["train", "r.yaml"])
    assert command[:5] == [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/x.yaml"]
    assert command[5:] == ["--num_processes", "2", "-m", "peftkit", "train", "r.yaml"]


def test_the_number_of_processes_is_left_to_the_launch_file_unless_stated() -> None:
    assert "--num_processes" not in launch_command(None, Path("configs/x.yaml"), [])


def test_the_launch_file_of_this_machine_is_gloo_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFTKIT_DEVICE", "cpu")
    facts = yaml.safe_load(write_launch_file(tmp_path / "launch.yaml").read_text())
    assert (facts["distributed_type"], facts["use_cpu"], facts["main_process_port"]) == ("MULTI_GPU", True, 0)


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
        launch(processes, config, [])


@pytest.mark.parametrize("read", [lambda file: read_sharding(None, file), lambda file: launch(None, file, [])])
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


def test_the_worker_that_fails_first_tells_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKER_MARK, "1")
    monkeypatch.setenv(EXIT_FILE, str(tmp_path / "code"))
    for code in (0, 3, 1):
        report_exit(code)
    assert (tmp_path / "code").read_text() == "3"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("", 0),
        (f"import os; open(os.environ['{EXIT_FILE}'], 'w').write('7'); raise SystemExit(1)", 7),
        ("raise SystemExit(1)", 1),
        ("import os, signal; os.kill(os.getppid(), signal.SIGTERM); signal.pause()", 143),
        ("import os, signal; os.kill(os.getppid(), signal.SIGINT); signal.pause()", 130),
    ],
)
def test_the_launcher_ends_as_its_workers(monkeypatch: pytest.MonkeyPatch, script: str, code: int) -> None:
    monkeypatch.setattr("peftkit.launch.launch_command", lambda *arguments: [sys.executable, "-c", script])
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert launch(2, None, []) == code
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
