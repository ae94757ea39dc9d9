"""A small version of benchmarks/reliability.py, and a disk that is full or may not be written to."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftkit.engine import checkpoint
from tests.runs import peftkit_process, run_cli, tiny_recipe, train

PATH = Path(__file__).parents[2] / "benchmarks" / "reliability.py"
spec = importlib.util.spec_from_file_location("reliability", PATH)
assert spec is not None
assert spec.loader is not None
reliability = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reliability)


def test_a_run_that_is_killed_five_times_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_DEVICE", "cpu")
    recipe = reliability.write_recipe(tmp_path, 200)
    train(recipe, tmp_path / "whole")
    monkeypatch.setattr(random.Random, "uniform", lambda draw, low, high: low + draw.random() * (high - low) / 3)
    monkeypatch.setattr(
        reliability, "start", lambda recipe, run, *more: peftkit_process("train", recipe, "--output", run, *more)
    )
    found = reliability.kill_many(recipe, tmp_path / "killed", tmp_path / "whole", 5, startup=2.0)
    wanted = {"damaged_checkpoints_listed": 0, "exit_code_at_the_end": 0, "lines_equal": True, "adapter_equal": True}
    assert {name: found[name] for name in wanted} == wanted


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_a_run_in_words_and_what_is_there_is_whole(models_dir: Path, tmp_path: Path, small_disk: Path) -> None:
    steps = {"save_steps": 1, "save_total_limit": 99, "max_steps": 60, "logging_steps": 1}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=steps)
    result = run_cli("train", recipe, "--output", small_disk / "run")
    assert (result.code, "the disk is full" in result.err) == (4, True)
    listed = reliability.checkpoints(small_disk / "run")
    assert listed
    assert [path.name for path in listed if reliability.damage(path)] == []
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    train(recipe, small_disk / "run", "--resume")
    train(recipe, tmp_path / "whole")
    assert reliability.compare(small_disk / "run", tmp_path / "whole") == {"lines_equal": True, "adapter_equal": True}


@pytest.mark.parametrize("name", ["save_file", "write_json", "remove_folder"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training={"save_steps": 1, "save_total_limit": 1})

    def fail(*arguments: Any) -> None:
        if (tmp_path / "run/checkpoints/step-000002").exists():
            raise OSError(28, os.strerror(28), "place")
        return getattr(real, name)(*arguments)

    real = type("Real", (), {name: staticmethod(getattr(checkpoint, name))})
    monkeypatch.setattr(checkpoint, name, fail)
    result = run_cli("train", recipe, "--output", tmp_path / "run")
    assert (result.code, "the disk is full: place could not be written" in result.err) == (4, True), result.err
    assert [reliability.damage(path) for path in reliability.checkpoints(tmp_path / "run")[-1:]] == [[]]


def test_a_read_only_file_system_is_told_in_words(models_dir: Path, tmp_path: Path, small_disk: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    train(recipe, small_disk / "run")
    (small_disk / "run/status.json").write_text('{"state": "stopped", "step": 6}')
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = run_cli("train", recipe, "--output", small_disk / "run", "--resume")
    assert (result.code, "cannot be used: Read-only file system" in result.err) == (4, True), result.err
