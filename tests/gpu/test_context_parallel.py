"""Attention of parts of rows by CUDA kernels, as processes that share tokens compute it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from peftkit.engine.context_parallel import attend_part, own_places

pytestmark = pytest.mark.gpu

LENGTHS = [700, 1400, 300]


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """Attention output (1, N, H, D) with a mask for the whole sequence."""
    places, rows = torch.arange(sum(LENGTHS)), torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    distance = places[:, None] - places[None]
    seen = (distance >= 0) & (distance < (window or len(places))) & (rows[:, None] == rows[None])
    keys, values = (states.repeat_interleave(4, dim=1) for states in (key, value))
    return functional.scaled_dot_product_attention(query, keys, values, seen.to(query.device)).transpose(1, 2)


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_parts_of_rows_get_the_attention_of_whole_rows(window: int, dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    length, cp_size = sum(LENGTHS), 2
    module: Any = nn.Module()
    module.num_key_value_groups = 4
    query, key, value = (
        torch.randn(1, heads, length, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2)
    )
    whole = by_hand(query, key, value, window)
    expected = torch.autograd.grad(whole.float().square().sum(), (query, key, value))
    places = [own_places(length, cp_size, part) for part in range(cp_size)]
    of_all = [
        torch.stack([torch.cat([states[:, :, place] for place in own], 2) for own in places], 2).unflatten(3, (2, -1))
        for states in (key, value)
    ]
    outputs = []
    for part, own in enumerate(places):
        mine = torch.cat([query[:, :, place] for place in own], dim=2)
        outputs.append(attend_part(module, mine, *of_all, (window, LENGTHS, cp_size, part)))
        torch.testing.assert_close(outputs[-1], torch.cat([whole[:, place] for place in own], dim=1), rtol=close, atol=close)
    found = torch.autograd.grad(torch.cat(outputs, dim=1).float().square().sum(), (query, key, value))
    for gradient, other in zip(found, expected, strict=True):
        assert float((gradient - other).norm() / other.norm()) < close
