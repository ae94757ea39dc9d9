"""Attention within the rows of one sequence: a causal kernel for each row, no mask and no work between rows.

Rows lie end to end in a sequence (1, N) with position ids that start over with each of them. transformers then builds a mask
(N, N) that keeps them apart; here the mask is only asked where rows begin, and the attention kernel runs on one row after the
other: the same numbers, for the sum of the rows' squares instead of the square of their sum.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTS = "peftkit_segments"
CONTEXT = "peftkit_context"  # the same where processes share out tokens, see `engine.context_parallel`
BY_ROW = (SEGMENTS, CONTEXT)


def segments_mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, mask_function: Any = None, **options: Any
) -> torch.Tensor | None:
    """In place of a mask: (1, 1, 1, 1 + rows) int64, the window (0: none) and the rows' lengths; else what sdpa takes.

    Arguments are those of transformers' `sdpa_mask`. Whether a token is the first of its row is asked of `mask_function`: it
    then does not see the token before.
    """
    options |= {"mask_function": mask_function} if mask_function is not None else {}
    packed = not options.get("allow_is_causal_skip", True) and options.get("attention_mask") is None
    if not packed or mask_function is None or batch_size != 1 or q_length != kv_length or options.get("use_vmap"):
        return sdpa_mask(batch_size, q_length, kv_length, *args, **options)
    places = torch.arange(1, q_length, device=options.get("device", "cpu"))
    zero = torch.zeros_like(places)
    sees_previous = mask_function(zero, zero, places, places - 1)
    starts = torch.cat([places.new_zeros(1), places[~sees_previous], places.new_full((1,), q_length)])
    window = options.get("local_size") or 0
    lengths = torch.cat([starts.new_full((1,), window), starts.diff()])
    return lengths.view(1, 1, 1, -1).cpu()  # read by every layer: one wait for the device, not one a layer


def segments_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output (1, N, H, D) of rows laid end to end; of everything else what sdpa gives.

    Args:
        module: the attention layer.
        query, key, value: (1, H, N, D), keys and values perhaps with fewer heads.
        attention_mask: what `segments_mask` returned.
        dropout: of attention weights.
        options: of the layer. With `softcap` or sinks (`s_aux`), which sdpa lacks, its own eager attention is taken.
    """
    attend = attention_of(module, options)
    adds = attend is not sdpa_attention_forward
    if attention_mask is None or attention_mask.dtype != torch.int64:
        mask = _additive(attention_mask, query, key) if adds else attention_mask
        return attend(module, query, key, value, mask, dropout=dropout, **options)
    window, *lengths = attention_mask.flatten().tolist()
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    if not dropout and not adds and _has_kernel_of_rows(query, value, dtype):
        states = [part.to(dtype) for part in (query, key, value)]  # autocast does not know the kernel
        return _all_rows(states, lengths, window, options.get("scaling")), None
    outputs = []
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        mask = _banded(q, window) if 0 < window < q.shape[2] else None
        mask = _additive(mask, q, k) if adds else mask
        outputs.append(attend(module, q, k, v, mask, dropout=dropout, **options)[0])
    return torch.cat(outputs, dim=1), None


def _has_kernel_of_rows(query: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention for rows of different lengths takes these: 16 bits, Ampere or newer, small heads."""
    size = query.shape[-1]
    if not query.is_cuda or dtype not in (torch.bfloat16, torch.float16) or size != value.shape[-1]:
        return False
    return size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _all_rows(states: list[torch.Tensor], lengths: list[int], window: int, scale: float | None) -> torch.Tensor:
    """All rows by one launch of that kernel; queries, keys, values and result as of `segments_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (part[0].transpose(0, 1) for part in states)
    places = _places(tuple(lengths), q.device)
    output = varlen_attn(
        q,
        k,
        v,
        cu_seq_q=places,
        cu_seq_k=places,
        max_q=max(lengths),
        max_k=max(lengths),
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None]  # (1, N, H, D)


@functools.lru_cache(maxsize=1)
def _places(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each row begins, and where the last one ends."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def attention_of(module: nn.Module, options: dict[str, Any]) -> Any:
    """transformers' sdpa attention or, for what that lacks (`softcap`, sinks), the eager attention of the layer's model."""
    if options.get("softcap") is None and options.get("s_aux") is None:
        return sdpa_attention_forward
    return sys.modules[type(module).__module__].eager_attention_forward


def _banded(query: torch.Tensor, window: int) -> torch.Tensor:
    """What a row's tokens see of it (1, 1, T, T): themselves and the `window - 1` before."""
    places = torch.arange(query.shape[2], device=query.device)
    distance = places[:, None] - places[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask (B, 1, T, S) as the eager attention of models adds it to scores; without one, the causal one."""
    if mask is None:
        ends = torch.arange(query.shape[2], device=query.device) + key.shape[2] - query.shape[2]
        mask = (ends[:, None] >= torch.arange(key.shape[2], device=query.device)[None, :])[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, torch.finfo(query.dtype).min)


AttentionInterface.register(SEGMENTS, segments_attention)
AttentionMaskInterface.register(SEGMENTS, segments_mask)
