"""Quantised bases and 8-bit optimizers on the GPU: trained, certified, asked, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import curve, run_cli, tiny_recipe, train

BASES: list[dict[str, Any]] = [
    {"bits": 4},
    {"bits": 4, "quant_type": "fp4", "double_quant": False},
    {"bits": 4, "quant_storage": "bfloat16"},
    {"bits": 8},
]
OPTIMIZERS = ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]

CASES = [
    *((base, "bfloat16") for base in BASES),
    *(({"bits": bits}, dtype) for bits in (4, 8) for dtype in ("float16", "float32")),
]


@pytest.mark.parametrize(("quantization", "dtype"), CASES, ids=str)
def test_an_adapter_on_a_quantised_base_is_certified_asked_and_merged(
    models_dir: Path, tmp_path: Path, quantization: dict[str, Any], dtype: str
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"quantization": quantization, "dtype": dtype})
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]
    losses = [loss for (loss,) in curve(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0]
    asked = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", "a cat", "--json")
    assert "prediction" in json.loads(asked.out), asked.err
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["max_abs_diff_saved"] <= merged.json["tolerance"]


@pytest.mark.parametrize("method", ["dora", "ia3", "bottleneck", "ln_tuning"])
def test_a_method_on_four_bits_is_certified(models_dir: Path, tmp_path: Path, method: str) -> None:
    adapter = {"method": "lora", "use_dora": True} if method == "dora" else {"method": method}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter, model={"quantization": {"bits": 4}})
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_of_bitsandbytes_learns_like_torchs(models_dir: Path, tmp_path: Path, optim: str) -> None:
    curves = []
    for name in ("adamw_torch", optim):
        folder = tmp_path / name
        folder.mkdir()
        adapter = {"method": "lora", "r": 32, "target_modules": "all-linear"}
        training = {"optim": name, "learning_rate": 1e-3}
        train(tiny_recipe("CAUSAL_LM", models_dir, folder, adapter=adapter, training=training), folder / "run")
        curves.append(torch.tensor(curve(folder / "run", "loss")))
    torch.testing.assert_close(curves[1], curves[0], rtol=2e-2, atol=0.0)
