"""Every method on every task of a decoder whose layers are Conv1D."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.matrix import Cell, cells, run_cell

CELLS = cells("gpt2")


@pytest.mark.parametrize("cell", CELLS, ids=[f"{cell.task}-{cell.method}" for cell in CELLS])
def test_a_method_works_on_conv1d_layers_or_is_refused(cell: Cell, models_dir: Path, tmp_path: Path) -> None:
    run_cell(cell, models_dir, tmp_path)
