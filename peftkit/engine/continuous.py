"""Batches of answers that rows join and leave while they are generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from peftkit.engine.decode import RoomyLayer, RunningBatch, make_roomy

# What `generate` hands to a loop (transformers 5.23), and how it is put together; with anything else batches stay apart.
_BY_TOKEN = ("attention_mask", "position_ids")
_PLAIN = ("use_cache", "logits_to_keep")


def start(model: Any, inputs: Mapping[str, Any], config: GenerationConfig) -> RunningBatch:
    """A batch of prompts before its first token, prepared by transformers' own `generate`.

    Args:
        model: the model, with an adapter or without.
        inputs: the prompts, padded, as its `generate` takes them.
        config: of the model; what is said about sampling is not used.
    """

    def prepared(
        model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **rest: Any
    ) -> RunningBatch:
        make_roomy(rest.get("past_key_values"))
        return RunningBatch(model, rest, input_ids, generation_config._pad_token_tensor)

    batch: RunningBatch = model.generate(**inputs, generation_config=config, custom_generate=prepared)
    return batch


def can_join(batch: RunningBatch) -> bool:
    """Whether rows of this batch and of others can go on together: keys and values that are kept whole, and nothing else.

    Virtual tokens stand in the cache and not among the ids, encoders have masks of their own, and windows, recurrent states
    and positions of several dimensions cannot be shifted.
    """
    cache, positions = batch.inputs.get("past_key_values"), batch.inputs.get("position_ids")
    return (
        {*batch.inputs} <= {"past_key_values", *_BY_TOKEN, *_PLAIN}
        and isinstance(cache, DynamicCache)
        and all(type(layer) is RoomyLayer for layer in cache.layers)
        and cache.get_seq_length() == batch.ids.shape[1] - 1
        and (positions is None or positions.dim() == 2)
    )


def join(batch: RunningBatch, other: RunningBatch) -> None:
    """Let the rows of another batch follow those of this one, all padded on the left to one length.

    Both have made their first token, and `can_join` holds for both.
    """
    width = max(batch.ids.shape[1], other.ids.shape[1])
    for part in (batch, other):
        part.inputs["attention_mask"] = _mask(part)
        _pad_left(part, width - part.ids.shape[1])
    ours, theirs = batch.inputs["past_key_values"], other.inputs["past_key_values"]
    for layer, further in zip(ours.layers, theirs.layers, strict=True):
        layer.replace(torch.cat([layer.keys, further.keys]), torch.cat([layer.values, further.values]))
    for name in _BY_TOKEN:
        if batch.inputs.get(name) is not None:
            batch.inputs[name] = torch.cat([_of_rows(batch, name), _of_rows(other, name)])
    batch.ids = torch.cat([batch.ids, other.ids])
    batch.rows = torch.arange(len(batch.ids), device=batch.ids.device)
    batch.ended = torch.zeros_like(batch.rows, dtype=torch.bool)


def trim(batch: RunningBatch) -> None:
    """Cut columns that are padding in every row: the longest row may have left."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or not can_join(batch):
        return
    num_empty = int((mask.cumsum(1) == 0).all(0).sum())
    if num_empty:
        _pad_left(batch, -num_empty)


def _mask(batch: RunningBatch) -> torch.Tensor:
    """The attention mask (B, T), which transformers leaves out where nothing is masked."""
    mask = batch.inputs.get("attention_mask")
    return torch.ones_like(batch.ids) if mask is None else mask


def _of_rows(batch: RunningBatch, name: str) -> torch.Tensor:
    tensor: torch.Tensor = batch.inputs[name]
    return tensor.expand(len(batch.ids), -1)  # positions may be one row for all


def _pad_left(batch: RunningBatch, count: int) -> None:
    """Put so many columns in front of everything, or cut as many where it is negative."""
    if not count:
        return
    batch.ids = nn.functional.pad(batch.ids, (count, 0), value=int(batch.pad_token))
    for name in _BY_TOKEN:
        if batch.inputs.get(name) is not None:
            batch.inputs[name] = nn.functional.pad(batch.inputs[name], (count, 0))
    for layer in batch.inputs["past_key_values"].layers:
        shape = (0, 0, count, 0)
        layer.replace(nn.functional.pad(layer.keys, shape), nn.functional.pad(layer.values, shape))
