"""Rows whose tokens processes share out (context parallelism): each computes its part of every row.

Keys and values are gathered from all of them in each layer, queries stay where they are (Dubey et al. 2024, arXiv:2407.21783,
section 3.3.2). Of a sequence in 2 P pieces, process p of P has the p-th from either end: causal attention is as much work for
all. The base model runs on the part as it is; the layout comes to the attention layers in the mask's place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftkit.engine.packing import Forward, block_mask, for_model, untouched
from peftkit.engine.segments import CONTEXT, attention_of, segments_attention, segments_mask
from peftkit.errors import Problem, RecipeError
from peftkit.tasks.example import IGNORE_INDEX, Batch


class Piece(NamedTuple):
    """Queries that see the same keys up to their own place: `[start, stop)` of the sequence, from the place `first` on."""

    first: int
    start: int
    stop: int


def group_of(cp_size: int) -> Any:
    """The processes that share tokens with this one: neighbours by rank. All processes must come here together."""
    return _groups(cp_size, dist.get_world_size())


@functools.lru_cache(maxsize=4)
def _groups(cp_size: int, world: int) -> Any:
    return dist.new_subgroups(group_size=cp_size)[0]


def own_places(length: int, cp_size: int, part: int) -> list[slice]:
    """The two pieces of a sequence that a process has, of a length that 2 * cp_size divides."""
    size = length // (2 * cp_size)
    return [slice(place * size, (place + 1) * size) for place in (part, 2 * cp_size - 1 - part)]


def split_batch(batch: Batch, model: nn.Module, cp_size: int, part: int) -> dict[str, Any]:
    """This process's part of rows that lie end to end.

    Args:
        batch: `input_ids`, `position_ids` (P, T) and `labels` (P, T) or (P, T, 2), the same in all processes of a group.
        model: the model, adapted or not, with the attention `CONTEXT`.
        cp_size: processes that share tokens.
        part: which of them this is.

    Returns:
        `input_ids` and `position_ids` (1, N); the layout as `attention_mask`; `labels` (1, 1 + N), each one place to the right
        of what predicts it and one more in front, for the last token of a piece predicts the first of the next one.
    """
    whole = {name: tensor.reshape(1, -1, *tensor.shape[2:]) for name, tensor in batch.items()}
    length = whole["input_ids"].shape[1]
    rest = 2 * cp_size - length % (2 * cp_size)  # at least one: a row of padding, so that the mask tells of rows
    fill = {"labels": IGNORE_INDEX}
    whole = {name: _longer(tensor, rest, fill.get(name, 0)) for name, tensor in whole.items()}
    mask = tree_map(lambda layout: _with_part(layout, cp_size, part), block_mask(model, whole["position_ids"]))
    places = own_places(length + rest, cp_size, part)
    targets = _longer(whole.pop("labels")[:, 1:], 1, IGNORE_INDEX)
    own = {name: torch.cat([tensor[:, place] for place in places], dim=1) for name, tensor in whole.items()}
    labels = torch.cat([targets[:, :1], *(targets[:, place] for place in places)], dim=1)
    return own | {"labels": labels, "attention_mask": mask}


def _longer(tensor: torch.Tensor, count: int, value: int) -> torch.Tensor:
    """(1, T, ...) with so many more places at the end."""
    return torch.cat([tensor, tensor.new_full((1, count, *tensor.shape[2:]), value)], dim=1)


def _with_part(layout: torch.Tensor | None, cp_size: int, part: int) -> torch.Tensor:
    """What `segments_mask` says of a sequence (1, 1, 1, 1 + rows), and below it whose part of it this is."""
    assert layout is not None, "there is no mask"
    assert layout.dtype == torch.int64, "the mask does not tell where rows begin"
    whose = torch.zeros_like(layout)
    whose[..., 0], whose[..., 1] = cp_size, part
    return torch.cat([layout, whose], dim=2)


def context_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output (1, N, H, D) of this process's part of a sequence; of all else, what `segments_attention` gives."""
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.shape[2] != 2:
        return segments_attention(module, query, key, value, attention_mask, dropout, **options)
    (window, *lengths), (cp_size, part, *_) = attention_mask[0, 0].tolist()
    keys, values = (_Gathered.apply(states, group_of(cp_size)) for states in (key, value))
    return attend_part(module, query, keys, values, (window, lengths, cp_size, part), dropout, **options), None


def attend_part(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: tuple[int, list[int], int, int],
    dropout: float = 0.0,
    **options: Any,
) -> torch.Tensor:
    """Attention output (1, N, H, D) of this process's queries over the keys that are in front of them in their rows.

    Args:
        module: the attention layer.
        query: (1, H, N, D), its own.
        key, value: (1, H, 2 P, n, D), the pieces of all, process after process; perhaps with fewer heads.
        layout: window (0: none), lengths of the rows, processes, which of them this is.
        dropout: of attention weights.
        options: of the layer.
    """
    window, lengths, cp_size, part = layout
    keys, values = (_in_order(states, cp_size) for states in (key, value))
    pieces = pieces_of(lengths, cp_size, part, window)
    outputs = []
    for own, piece in zip(query.split([piece.stop - piece.start for piece in pieces], dim=2), pieces, strict=True):
        seen = [states[:, :, piece.first : piece.stop] for states in (keys, values)]
        outputs.append(_attend_last(module, own, *seen, window=window, dropout=dropout, **options))
    return torch.cat(outputs, dim=1)


def _attend_last(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int,
    dropout: float,
    **options: Any,
) -> torch.Tensor:
    """Attention output (1, T, H, D) of queries (1, H, T, D) that are the last places of the keys (1, H, S, D)."""
    attend, count, seen = attention_of(module, options), query.shape[2], key.shape[2]
    banded = count > 1 and 0 < window < seen
    if not banded and count in (1, seen) and attend is sdpa_attention_forward:
        mask = None  # sdpa's own
    elif not banded and query.is_cuda and attend is sdpa_attention_forward:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        q, k, v = (part.to(dtype) for part in (query, key, value))  # autocast does not know what the bias stands for
        bias, scale, grouped = causal_lower_right(count, seen), options.get("scaling"), query.shape[1] != key.shape[1]
        output = functional.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale, enable_gqa=grouped)
        return output.transpose(1, 2)
    else:
        mask = _mask(count, seen, window if banded else seen, query.dtype, query.device)
    attended: torch.Tensor = attend(module, query, key, value, mask, dropout=dropout, **options)[0]
    return attended


def pieces_of(lengths: Sequence[int], cp_size: int, part: int, window: int = 0) -> list[Piece]:
    """What a process computes of rows that lie end to end, in the order of its tokens."""
    found, total = [], sum(lengths)
    for place in own_places(total, cp_size, part):
        first = 0
        for length in lengths:
            start, stop = max(first, place.start), min(first + length, place.stop)
            if start < stop:
                found.append(Piece(max(first, start - window + 1) if window else first, start, stop))
            first += length
    return found


@functools.lru_cache(maxsize=8)  # the layers of a pass share them
def _mask(count: int, seen: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What is added to the scores (1, 1, count, seen) of the last places among so many, which see `window` places."""
    distance = torch.arange(seen - count, seen, device=device)[:, None] - torch.arange(seen, device=device)[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


def _in_order(states: torch.Tensor, cp_size: int) -> torch.Tensor:
    """(1, H, P, 2, n, D) as they are gathered -> (1, H, 2 P n, D) as the tokens are."""
    early, late = states.unbind(dim=3)
    return torch.cat([early, late.flip(2)], dim=2).flatten(2, 3)


def prove_split(model: nn.Module, batch: Batch, forward: Forward, cp_size: int, tolerance: float) -> None:
    """Compare logits of this process's part of a few rows with those that it computes alone; all processes come here together.

    Args:
        model: the model with its adapter and the attention `CONTEXT`.
        batch: rows end to end, as of `split_batch`.
        forward: (model, batch) -> logits (B, T, V), as in training.
        cp_size: processes that share tokens.
        tolerance: largest difference, as a share of the largest logit.

    Raises:
        RecipeError: they are not the same.
    """
    part = dist.get_rank() % cp_size
    own = split_batch(batch, model, cp_size, part)
    length = own["input_ids"].shape[1] * cp_size
    rows = {
        name: _longer(batch[name].reshape(1, -1), length - batch[name].numel(), 0) for name in ("input_ids", "position_ids")
    }
    with untouched(model):
        whole = forward(model, for_model(rows, model, "rows")).float()
        logits = forward(model, own).float()
    expected = torch.cat([whole[:, place] for place in own_places(length, cp_size, part)], dim=1)
    difference, scale = float((logits - expected).abs().max()), float(whole.abs().max())
    if not difference <= tolerance * scale:
        what = f"logits change by {difference:.3g} where processes share out a row's tokens (allowed {tolerance * scale:.3g})"
        raise RecipeError([Problem("", "parallelism_config_cp_size", f"{what}: leave cp_size out for this model")])


class _Gathered(torch.autograd.Function):
    """The tensors of all processes of a group, one behind the other; gradients go back to whose they are, summed."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, group: Any) -> torch.Tensor:
        """(1, H, 2 n, D) -> (1, H, P, 2, n, D)."""
        ctx.group = group
        states = states.contiguous()
        parts = [torch.empty_like(states) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, states, group=group)
        return torch.stack(parts, dim=2).unflatten(3, (2, -1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The reverse."""
        parts = [part.flatten(2, 3).contiguous() for part in gradients[0].unbind(2)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


AttentionInterface.register(CONTEXT, context_attention)
AttentionMaskInterface.register(CONTEXT, segments_mask)
