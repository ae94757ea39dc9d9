"""The tables of the speed benchmark: figures from made-up runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "speed_tables.py"
spec = importlib.util.spec_from_file_location("speed_tables", PATH)
assert spec is not None
assert spec.loader is not None
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def run_of(tool: str, seconds: list[float], **changes: Any) -> dict[str, Any]:
    """A run of three steps of 100, 200 and 300 tokens."""
    row = {
        "job": "job",
        "tool": tool,
        "round": 0,
        "start": "",
        "device": "cpu",
        "dtype": "float32",
        "cpu_seconds": seconds,
        "wall_seconds": [2 * second for second in seconds],
        "losses": [3.0, 2.0, 1.0],
        "memory_of_step": 2**20,
        "memory_peak": 2**21,
        "seconds_before_step_1": 1.0,
        "cpu_seconds_before_step_1": 0.5,
        "tokens": {"real": [100, 200, 300], "cells": [160, 320, 480], "targets": [10, 20, 30]},
    }
    return row | changes


def test_the_first_step_is_not_measured() -> None:
    found = tables.figures(run_of("plain", [10.0, 11.0, 12.0]))
    assert (found["tokens_per_cpu_second"], found["targets_per_cpu_second"], found["tokens_per_second"]) == (250, 25, 125)


def test_a_ratio_is_taken_within_a_round() -> None:
    plain = [run_of("plain", [0.0, 1.0, 2.0]), run_of("plain", [0.0, 1.0, 4.0], round=1)]
    ours = [run_of("peftkit", [0.0, 0.5, 1.0]), run_of("peftkit", [0.0, 1.0, 1.0], round=1)]
    assert tables.ratios(ours, plain, "tokens_per_cpu_second") == [2.0, 4.0]


def test_a_sum_of_losses_is_divided_by_the_targets() -> None:
    summed = run_of("torchtune", [0.0, 1.0, 2.0], losses=[30.0, 40.0, 33.0])
    assert tables.loss_gap(summed, run_of("plain", [0.0, 1.0, 2.0])) == pytest.approx(0.1)


def test_a_tool_that_never_ran_is_named_with_its_last_words(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_tables([run_of("plain", [0.0, 1.0, 2.0]), {"tool": "trl", "error": "exit 1", "log": "a\nNo module"}])
    assert "TRL: exit 1: No module" in capsys.readouterr().out
