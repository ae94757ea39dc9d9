"""What the plan says of a GPU, where none is: checked against one by `tests/gpu/test_memory.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.engine import token_loss
from peftkit.engine.blueprint import draw_blueprint
from peftkit.engine.fast import find_fast_paths
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.kernels import Kernels, attention
from peftkit.engine.quantizing import settle_quantization
from peftkit.engine.token_loss import Head, chunked_loss
from peftkit.engine.trace import trace_training
from peftkit.plan import make_plan
from peftkit.recipe import load_recipe
from tests.runs import tiny_recipe


@pytest.mark.parametrize(("quantization", "expected"), [(None, 4), ({"bits": 4}, 0), ({"bits": 8}, 0)])
def test_layers_that_will_be_quantised_are_not_planned_as_fused(
    models_dir: Path, tmp_path: Path, quantization: Any, expected: int
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"quantization": quantization})
    plan = settle_quantization(make_plan(load_recipe(recipe), detect_hardware()))
    kinds = [kind for kind, _ in find_fast_paths(plan, draw_blueprint(plan).model).fused]
    assert kinds.count("LoRA layers") == expected
    assert kinds.count("RMS norms") == 5


@pytest.mark.parametrize(("states", "rows"), [(2329, 128), (64 * 32, 64), (1, 1)])
def test_chunks_are_ligers_where_it_will_be_taken(monkeypatch: pytest.MonkeyPatch, states: int, rows: int) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "liger_kernel")
    sizes = []
    monkeypatch.setattr(token_loss._ChunkedLoss, "apply", lambda *parts: sizes.append(parts[3].chunk_size))
    head = Head(nn.Linear(1024, 32_000, bias=False, device="meta"), 32_000, "cuda")
    chunked_loss(torch.empty(states, 1024, device="meta"), torch.empty(states, device="meta"), None, head, 0.0)
    assert sizes == [rows]


@pytest.mark.parametrize(
    ("heads", "dtype", "is_whole"), [(2, torch.float32, True), (4, torch.float32, False), (2, torch.bfloat16, False)]
)
def test_scores_are_whole_where_no_kernel_of_the_gpu_takes_fewer_heads_of_keys(heads: int, dtype: Any, is_whole: bool) -> None:
    layer = nn.Linear(8, 8, device="meta", dtype=dtype)
    kernels = Kernels("cuda")

    def loss() -> torch.Tensor:
        query = layer(torch.empty(1, 4, 512, 8, device="meta", dtype=dtype))
        key = layer(torch.empty(1, heads, 512, 8, device="meta", dtype=dtype))
        return attention(kernels, query, key, key, is_causal=True, enable_gqa=heads != 4).sum()

    held = trace_training(layer, loss, kernels)
    assert (held.total > 4 * 512 * 512 * 4) == is_whole
