"""Kernels of the GPU, and what saves time or memory there: the same losses as the plain way."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.engine import segments
from peftkit.engine.prefetch import Prefetcher
from peftkit.engine.savings import Offload
from peftkit.engine.token_loss import Head, chunked_loss, liger_loss
from tests.runs import curve, tiny_recipe, train

LENGTHS = [5, 1, 40, 17]


def losses(models_dir: Path, folder: Path, dtype: str, training: dict[str, Any], **sections: Any) -> torch.Tensor:
    """Loss and gradient norm of each step."""
    folder.mkdir()
    recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, model={"dtype": dtype}, training=training, **sections)
    assert train(recipe, folder / "run")["certificate"]["passed"]
    return torch.tensor(curve(folder / "run", "loss", "grad_norm"))


@pytest.fixture(scope="module")
def plain(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.Tensor]:
    """Losses of the plain way, with padded rows, by dtype."""

    @functools.cache
    def run(dtype: str) -> torch.Tensor:
        folder = tmp_path_factory.mktemp("plain") / dtype
        return losses(models_dir, folder, dtype, {"fast_paths": False}, data={"packing": False})

    return run


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": 1},
        {"activation_offloading": True},
        {"torch_compile": True},
        {"optim": "adamw_torch"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ways_and_savings_leave_the_losses_as_they_are(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Any, training: dict[str, Any], dtype: str
) -> None:
    expected, moved = plain(dtype), []
    move_out = Offload.move_out
    monkeypatch.setattr(Offload, "move_out", lambda self, tensor: moved.append(tensor.shape) or move_out(self, tensor))
    monkeypatch.setattr(Offload.__init__, "__defaults__", (1,))
    found = losses(models_dir, tmp_path / "found", dtype, training)
    tolerance = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert bool(moved) == ("activation_offloading" in training)


@pytest.mark.parametrize("packing", ["auto", True])
def test_rows_end_to_end_go_through_one_kernel(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Any, packing: Any
) -> None:
    expected, launches = plain("bfloat16"), []
    real = segments._all_rows
    monkeypatch.setattr(segments, "_all_rows", lambda *parts: launches.append(parts[1]) or real(*parts))
    found = losses(models_dir, tmp_path / "found", "bfloat16", {}, data={"packing": packing})
    assert max(map(len, launches)) > 1
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_for_rows_gives_what_each_row_alone_gives(dtype: torch.dtype, heads: int, window: int) -> None:
    torch.manual_seed(0)
    size = sum(LENGTHS)
    states = [torch.randn(1, count, size, 16, device="cuda") for count in (4, heads, heads)]
    lengths = torch.tensor([window, *LENGTHS])[None, None, None]
    module = nn.Module()
    module.num_key_value_groups = 4 // heads  # type: ignore[assignment]
    found, expected = [], []
    for kind, results in ((dtype, found), (torch.float32, expected)):
        own = [part.to(kind).requires_grad_(True) for part in states]
        output, _ = segments.segments_attention(module, *own, lengths, scaling=0.3, is_causal=True)
        output.float().square().sum().backward()
        results += [output.float(), *(part.grad.float() for part in own if part.grad is not None)]
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="Liger is not installed")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("trains_head", [False, True])
def test_ligers_kernel_gives_the_loss_of_the_chunks(smoothing: float, softcap: float | None, trains_head: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 3000, bias=False, device="cuda").requires_grad_(trains_head)
    head = Head(layer, 3000, "cuda", softcap=softcap)
    states, targets = torch.randn(700, 64, device="cuda", requires_grad=True), torch.randint(3000, (700,), device="cuda")
    inputs = [states, *(part for part in layer.parameters() if trains_head)]
    by_chunks = chunked_loss(states, targets, torch.ones(700, device="cuda"), head, smoothing)
    by_liger = liger_loss(states, targets, head, smoothing)
    torch.testing.assert_close(by_liger, by_chunks, rtol=1e-4, atol=1e-3)
    found, expected = (torch.autograd.grad(loss, inputs) for loss in (by_liger, by_chunks))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_rows_are_prepared_by_a_thread_in_pinned_memory(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    get = Prefetcher.get
    monkeypatch.setattr(Prefetcher, "get", lambda self, step: seen.append(get(self, step)) or seen[-1])
    losses(models_dir, tmp_path / "found", "float32", {})
    assert len(seen) == 6
    assert all(tensor.is_pinned() for step in seen for batch in step.batches for tensor in batch.values())
