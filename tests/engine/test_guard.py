"""What the certificate has the memory of: a trained model lets go of every weight, wherever its layers keep them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.engine.guard import release
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.model import base_of, load_base_model
from peftkit.engine.quantizing import settle_quantization
from peftkit.plan import make_plan
from peftkit.recipe import load_recipe
from tests.runs import tiny_recipe

KINDS: list[dict[str, Any] | None] = [
    None,
    {"bits": 4},
    {"bits": 8},
    {"method": "torchao", "bits": 8},
    {"method": "hqq", "bits": 4},
]


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Every tensor that is in a module or in what it holds beside its parameters."""
    held: list[Any] = list(model.parameters())
    for module in model.modules():
        for value in vars(module).values():
            fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            held += [value, *fields.values()]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("quantization", KINDS, ids=["plain", "4bit", "8bit", "torchao", "hqq"])
def test_no_weight_outlives_its_release(models_dir: Path, tmp_path: Path, quantization: dict[str, Any] | None) -> None:
    if quantization and "method" in quantization:
        pytest.importorskip(quantization["method"])
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"quantization": quantization})
    plan = settle_quantization(make_plan(load_recipe(recipe), detect_hardware()))
    model: Any = load_base_model(base_of(plan))[0]
    embedding = model.get_input_embeddings().weight.requires_grad_()
    optimizer = torch.optim.SGD([embedding], lr=1.0)
    model.train()(input_ids=torch.arange(20)[None, :]).logits.sum().backward()
    held = [weakref.ref(tensor) for tensor in tensors_of(model) if tensor is not embedding]
    release(model, optimizer)
    assert len(held) > 20
    assert not [reference() for reference in held if reference() is not None and reference().numel()]  # type: ignore[union-attr]
    assert (embedding.numel(), embedding.grad) == (0, None)
