"""Every method on 4-bit and 8-bit bases: trained with evaluations in between, proved, merged; or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.methods import METHODS
from tests.contracts.matrix import Cell, experts_of, refusal, why_not_merged, write_recipe
from tests.runs import run_cli

ON_BERT = ("lora", "bitfit", "bottleneck", "head", "ia3", "ln_tuning", "prefix_tuning")
CELLS = [(name, "llama", "CAUSAL_LM", bits) for name in METHODS if name != "bitfit" for bits in (4, 8)]
CELLS += [(name, "bert", "SEQ_CLS", bits) for name in ON_BERT for bits in (4, 8)]
# Virtual tokens have nothing to do with what layers are made of: one of the two will do.
CELLS = [cell for cell in CELLS if METHODS[cell[0]].kind != "prompt" or cell[3] == 4]
TRAINING = {"max_steps": 2, "eval_steps": 1, "save_steps": 1000}


def quantised_recipe(cell: Cell, settings: dict[str, Any], models_dir: Path, folder: Path) -> Path:
    """The recipe of a cell, of two steps, on a quantised base."""
    experts = None
    if "adapters" in cell.facts.section.model_fields:
        experts = experts_of(cell, models_dir, folder) if cell.facts.trains_on else ["runs/a", "runs/b"]
    path = write_recipe(cell, models_dir, folder, experts)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["model"]["quantization"] = settings
    recipe["training"] |= TRAINING
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "model", "task", "bits"), CELLS)
def test_a_method_works_on_a_quantised_base_or_is_refused(
    name: str, model: str, task: str, bits: int, models_dir: Path, tmp_path: Path
) -> None:
    cell = Cell(name, task, model)
    recipe = quantised_recipe(cell, {"bits": bits}, models_dir, tmp_path)
    if f"{bits}bit" not in cell.facts.trains_on:
        assert cell.facts.why_not_quantized in refusal(recipe)
        return
    trained = run_cli("train", recipe, "--output", tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["certificate"]["passed"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["loss"] for line in lines if "metrics" in line]
    assert losses[0] != losses[-1]
    assert all(line["grad_norm"] > 0 for line in lines if "grad_norm" in line)
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    if reason := why_not_merged(cell):
        assert (merged.code, reason in merged.err) == (2, True)
        return
    assert merged.code == 0, merged.err
    assert merged.json["max_abs_diff"] < 5e-6
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_an_8_bit_optimizer_trains_on_a_4_bit_base(models_dir: Path, tmp_path: Path) -> None:
    recipe = quantised_recipe(Cell("lora", "CAUSAL_LM", "llama"), {"bits": 4}, models_dir, tmp_path)
    trained = run_cli("train", recipe, "--output", tmp_path / "run", "--json", "--set", "training.optim=adamw_bnb_8bit")
    assert trained.code == 0, trained.err
    assert trained.json["certificate"]["passed"]
