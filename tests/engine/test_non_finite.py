"""NaN and infinity stop a run, and reach neither a checkpoint nor an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import tiny_recipe


def is_finite(path: Path) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_a_run_that_diverges_stops_with_its_rows_and_keeps_the_last_good_checkpoint(
    cli: Any, models_dir: Path, tmp_path: Path, task: str
) -> None:
    settings = {
        "optim": "sgd",
        "learning_rate": 1e30,
        "max_grad_norm": None,
        "warmup_steps": 3,
        "save_steps": 1,
        "max_steps": 9,
    }
    recipe = tiny_recipe(task, models_dir, tmp_path, training=settings)
    result = cli("train", recipe, "--output", tmp_path / "run", "--set", "training.max_grad_norm=null")
    assert result.code == 5
    assert f"{tmp_path / 'rows.jsonl'}:" in result.err
    assert not (tmp_path / "run/adapter").exists()
    checkpoints = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    assert f"the last good checkpoint is {checkpoints[-1]}" in result.err
    assert all(is_finite(path / "trainable.safetensors") for path in checkpoints)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)


@pytest.mark.parametrize(
    ("task", "model", "weight"),
    [("CAUSAL_LM", "llama", "model.layers.0.mlp.up_proj.weight"), ("SEQ_CLS", "bert", "encoder.layer.0.output.dense.weight")],
)
def test_a_base_with_nan_is_found_out_at_the_first_step(
    cli: Any, models_dir: Path, tmp_path: Path, task: str, model: str, weight: str
) -> None:
    poisoned = tmp_path / "poisoned"
    shutil.copytree(models_dir / model, poisoned)
    state = load_file(poisoned / "model.safetensors")
    state[weight][0, 0] = float("nan")
    save_file(state, poisoned / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny_recipe(task, models_dir, tmp_path, model={"name_or_path": str(poisoned)})
    result = cli("train", recipe, "--output", tmp_path / "run")
    assert result.code == 5
    assert "step 1: the loss is nan. Rows of the batch:\n" in result.err
    assert result.err.count("rows.jsonl:") == 8
    assert "there is no checkpoint before it" in result.err
    assert not (tmp_path / "run/adapter").exists()
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_only_the_rows_of_the_bad_micro_batch_are_named(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    poisoned = tmp_path / "poisoned"
    shutil.copytree(models_dir / "bert", poisoned)
    state = load_file(poisoned / "model.safetensors")
    state["embeddings.position_embeddings.weight"][9] = float("nan")  # only rows of ten tokens and more see it
    save_file(state, poisoned / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, model={"name_or_path": str(poisoned)})
    rows = [{"text": "the cat sat", "label": "a"}] * 7 + [{"text": "small dogs " * 5, "label": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli("train", recipe, "--output", tmp_path / "run", "--set", "training.micro_batch_size=1")
    assert result.code == 5
    assert result.err.count("rows.jsonl:") == 1
    assert "rows.jsonl:8" in result.err
