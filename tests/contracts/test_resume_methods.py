"""Resuming is exact for methods whose saved adapter is not all of their state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.matrix import SETTINGS
from tests.runs import curve, run_cli, tiny_recipe, train

STEPS = {"max_steps": 8, "save_steps": 4, "save_total_limit": 3, "logging_steps": 1}
ADAPTERS: list[dict[str, Any]] = [
    {"method": "p_tuning", "num_virtual_tokens": 3},
    {"method": "prefix_tuning", "num_virtual_tokens": 3, "prefix_projection": True},
    {"method": "cpt", **SETTINGS["cpt"]},
    {"method": "adalora", "init_r": 4, "target_r": 2, "tfinal": 1},
    {"method": "adalora", "init_r": 4, "target_r": 2, "deltaT": 3},
    {
        "method": "adamss", "r": 8, "num_subspaces": 4, "use_asa": True, "asa_target_subspaces": 2, "init_warmup": 1,
        "final_warmup": 7, "mask_interval": 2,
    },
    {"method": "pvera", "r": 16},
    {"method": "shira", "r": 4},
    {"method": "lora", "r": 4, "init_lora_weights": "corda", "lora_dropout": 0.1},
    {"method": "lora", "r": 4, "monteclora_config": {}},
    {"method": "bottleneck", "dropout": 0.1},
    {"method": "shadow"},
    {"method": "osf"},
]  # fmt: skip


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: "-".join(str(value) for value in adapter.values())[:40])
def test_a_run_that_goes_on_ends_as_if_it_had_never_stopped(models_dir: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter, training=STEPS)
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for path in (tmp_path / "stopped" / "checkpoints").iterdir():
        if path.name != "step-000004":
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "stopped" / "adapter")
    (tmp_path / "stopped" / "status.json").write_text(json.dumps({"state": "stopped", "step": 4}))
    result = run_cli("train", recipe, "--output", tmp_path / "stopped", "--resume", "--json")
    assert result.code == 0, result.err
    assert curve(tmp_path / "stopped", "loss", "grad_norm") == curve(tmp_path / "whole", "loss", "grad_norm")
    states = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
