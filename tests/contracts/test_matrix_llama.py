"""Every method on every task of a decoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkit.engine.memory import plan_memory
from tests.contracts.matrix import Cell, cells, run_cell

CELLS = cells("llama")


@pytest.mark.parametrize("cell", CELLS, ids=[f"{cell.task}-{cell.method}" for cell in CELLS])
def test_a_method_works_on_a_decoder_or_is_refused_with_a_reason(
    cell: Cell, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cell.task == "CAUSAL_LM":  # elsewhere the memory of a run is not planned, see conftest.py
        monkeypatch.setattr("peftkit.commands.train.plan_memory", plan_memory)
    run_cell(cell, models_dir, tmp_path)
