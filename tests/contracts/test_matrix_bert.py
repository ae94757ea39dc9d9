"""Every method on every task of an encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.matrix import Cell, cells, run_cell

CELLS = cells("bert")


@pytest.mark.parametrize("cell", CELLS, ids=[f"{cell.task}-{cell.method}" for cell in CELLS])
def test_a_method_works_on_an_encoder_or_is_refused(cell: Cell, models_dir: Path, tmp_path: Path) -> None:
    run_cell(cell, models_dir, tmp_path)
