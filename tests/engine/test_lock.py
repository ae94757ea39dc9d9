"""One process writes to a run directory at a time; what a process that has ended left is no hindrance."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RecipeError
from peftkit.lock import lock
from peftkit.run import Run, write_json
from tests.forks import Forked
from tests.runs import run_cli, tiny_recipe, train


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A directory to lock."""
    return Run(tmp_path)


def taken(run: Run, *, force: bool = False) -> list[str]:
    """Take the lock and let go of it; the notes."""
    notes: list[str] = []
    with lock(run, notes.append, force=force):
        assert json.loads(run.lock_path.read_text())["pid"] == os.getpid()
    assert not run.lock_path.exists()
    return notes


def test_a_lock_that_is_held_is_refused_with_who_holds_it(run: Run) -> None:
    with lock(run, print, force=False), pytest.raises(RecipeError) as refused:
        taken(run, force=True)
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    assert taken(run) == []


def test_a_lock_is_let_go_of_when_the_block_fails(run: Run) -> None:
    with pytest.raises(ValueError, match="half way"), lock(run, print, force=False):
        raise ValueError("half way")
    assert taken(run) == []


def test_the_lock_of_a_killed_process_is_noted_and_replaced(run: Run) -> None:
    program = f"""
import os
from pathlib import Path
from peftkit.lock import lock
from peftkit.run import Run
with lock(Run(Path({str(run.dir)!r})), print, force=False):
    os.kill(os.getpid(), 9)
"""
    Forked([sys.executable, "-c", program]).wait()
    pid = json.loads(run.lock_path.read_text())["pid"]
    assert taken(run) == [f"note: {run.lock_path} was left by process {pid} on {socket.gethostname()}, which has ended"]


@pytest.mark.parametrize("change", [{"started": 1.0}, {"boot_id": "before"}, {"pid": "?"}])
def test_another_process_with_the_same_number_holds_nothing(run: Run, change: dict[str, Any]) -> None:
    with lock(run, print, force=False):
        own = json.loads(run.lock_path.read_text())
    write_json(run.lock_path, own | change)
    assert "which has ended" in taken(run)[0]


def test_a_process_that_runs_holds_its_lock_without_the_system_s_help(run: Run) -> None:
    with lock(run, print, force=False):
        own = json.loads(run.lock_path.read_text())
    write_json(run.lock_path, own | {"note": "as another tool would write it"})
    with pytest.raises(RecipeError, match=f"is in use by process {os.getpid()}"):
        taken(run)


def test_the_lock_of_another_host_is_broken_by_force_alone(run: Run) -> None:
    other = {"host": "elsewhere", "pid": 7, "started": 1.0, "boot_id": "x"}
    write_json(run.lock_path, other)
    with pytest.raises(RecipeError, match=r"process 7 on elsewhere, another host.*`--resume --force` breaks its lock"):
        taken(run)
    assert json.loads(run.lock_path.read_text()) == other
    assert taken(run, force=True) == ["note: --force: the lock of process 7 on elsewhere is broken"]


def test_a_second_run_in_one_directory_is_refused_and_changes_nothing(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    train(recipe, tmp_path / "run")
    (tmp_path / "run/status.json").write_text('{"state": "training", "step": 3}')
    with lock(Run(tmp_path / "run"), print, force=False):
        result = run_cli("train", recipe, "--output", tmp_path / "run", "--resume", "--force")
    assert (result.code, f"is in use by process {os.getpid()}" in result.err) == (2, True)
    assert json.loads((tmp_path / "run/status.json").read_text()) == {"state": "training", "step": 3}
