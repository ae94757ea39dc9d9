"""Generating the answers of a batch: no work for rows that have ended, and no copy of the keys and values at every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import ModelOutput

# These look at each row alone and know nothing of its place in the batch, as a repetition penalty does.
_ROW_BY_ROW = (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
_SHARE_ENDED = 8  # rows are dropped when an eighth of those that are left has ended: dropping copies the cache
_ROOM = 64  # places by which keys and values grow at least


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values (B, H, T, D) of one layer in memory with room for more; transformers' own are copied at every token."""

    all_keys: torch.Tensor
    all_values: torch.Tensor

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write new keys and values behind those that are there; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = _roomy(key_states), _roomy(value_states)
            self.keys, self.values = self.all_keys[:, :, : key_states.shape[2]], self.all_values[:, :, : key_states.shape[2]]
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self.all_keys.shape[2]:
            self.all_keys, self.all_values = (
                _roomy(self.keys, end + end // 4),
                _roomy(self.values, end + end // 4),
            )
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        if self.is_initialized:
            self.replace(self.keys[indices], self.values[indices], self.all_keys.shape[2])

    def replace(self, keys: torch.Tensor, values: torch.Tensor, room: int = 0) -> None:
        """Hold other keys and values, with places for at least `room`."""
        length = keys.shape[2]
        self.all_keys, self.all_values = _roomy(keys, room), _roomy(values, room)
        self.keys, self.values = self.all_keys[:, :, :length], self.all_values[:, :, :length]


def _roomy(states: torch.Tensor, length: int = 0) -> torch.Tensor:
    """The states at the beginning of a tensor of at least this length."""
    batch, heads, filled, width = states.shape
    room = states.new_empty(batch, heads, max(length, filled + _ROOM), width)
    room[:, :, :filled] = states
    return room


class Decoder:
    """Greedy search or sampling as transformers' `generate` does it, which this is given to as `custom_generate`.

    Args:
        drops: whether rows that have ended may leave the batch; not where something else counts the rows.
        interval: tokens after which it is looked which rows have ended; a GPU has to be waited for then.
    """

    def __init__(self, *, drops: bool = True, interval: int = 1) -> None:
        self.drops, self.interval = drops, interval

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> torch.Tensor:
        """Token ids of prompts (B, P) and answers (B, T), filled with padding after the end of each."""
        make_roomy(model_inputs.get("past_key_values"))
        batch = RunningBatch(model, model_inputs, input_ids, generation_config._pad_token_tensor)
        drops = self.drops and all(isinstance(part, _ROW_BY_ROW) for part in logits_processor)
        for number in range(stopping_criteria.max_length - input_ids.shape[1]):
            scores = logits_processor(batch.ids, batch.next_logits(is_first=number == 0))
            batch.append(_chosen(scores, generation_config.do_sample))
            batch.ended |= stopping_criteria(batch.ids, None)
            if (number + 1) % self.interval == 0:
                num_ended = int(batch.ended.sum())
                if num_ended == len(batch.ended):
                    break
                if drops and num_ended * _SHARE_ENDED >= len(batch.ended):
                    batch.drop_ended()
        return batch.all_ids()


def _chosen(scores: torch.Tensor, do_sample: bool) -> torch.Tensor:
    """The next token of each row (B,), from scores (B, V)."""
    return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0] if do_sample else scores.argmax(-1)


class RunningBatch:
    """The rows that are being answered, and the answers of those that have left."""

    def __init__(self, model: Any, inputs: dict[str, Any], ids: torch.Tensor, pad_token: torch.Tensor | None) -> None:
        self.model, self.inputs, self.ids = model, inputs, ids
        self.pad_token = torch.zeros_like(ids[0, 0]) if pad_token is None else pad_token.to(ids.device)
        self.rows = torch.arange(len(ids), device=ids.device)
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)
        self.left: list[tuple[torch.Tensor, torch.Tensor]] = []

    def next_logits(self, *, is_first: bool) -> torch.Tensor:
        """Logits (B, V) of the next token, in float32."""
        reads = 1 if self.inputs.get("use_cache") and not is_first else None
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=reads, is_first_iteration=is_first, **self.inputs
        )
        outputs = self.model(**inputs, return_dict=True)
        is_encoder_decoder = self.model.config.is_encoder_decoder
        self.inputs = self.model._update_model_kwargs_for_generation(outputs, self.inputs, is_encoder_decoder)
        return outputs.logits[:, -1].float()

    def append(self, tokens: torch.Tensor) -> None:
        """A token (B,) for each row; rows that have ended get padding."""
        self.ids = torch.cat([self.ids, torch.where(self.ended, self.pad_token, tokens)[:, None]], dim=1)

    def drop_ended(self) -> None:
        """Go on with the other rows alone, where all that is kept of the rows can be divided."""
        if not self.is_divisible:
            return
        self.left.append((self.rows[self.ended], self.ids[self.ended]))
        self.keep((~self.ended).nonzero()[:, 0])

    @property
    def is_divisible(self) -> bool:
        """Whether rows can be taken out of all that is kept of them."""
        return _divisible(self.inputs.get("past_key_values"))

    def keep(self, keep: torch.Tensor) -> None:
        """Go on with the rows of these places alone."""
        self.inputs = {name: _kept(name, value, keep, len(self.rows)) for name, value in self.inputs.items()}
        self.rows, self.ids, self.ended = self.rows[keep], self.ids[keep], self.ended[keep]

    def all_ids(self) -> torch.Tensor:
        """The ids of all rows (B, T), in their first order."""
        parts = [*self.left, (self.rows, self.ids)]
        width = self.ids.shape[1]
        filled = [nn.functional.pad(ids, (0, width - ids.shape[1]), value=int(self.pad_token)) for _, ids in parts]
        return torch.cat(filled)[torch.cat([rows for rows, _ in parts]).argsort()]


def _divisible(cache: Any) -> bool:
    """Whether rows can be taken out of a cache; recurrent states cannot be divided (transformers 5.23)."""
    if isinstance(cache, EncoderDecoderCache):
        return _divisible(cache.self_attention_cache) and _divisible(cache.cross_attention_cache)
    if cache is None:
        return True
    return isinstance(cache, DynamicCache) and all(type(layer) in _DIVISIBLE for layer in cache.layers)


def _kept(name: str, value: Any, keep: torch.Tensor, num_rows: int) -> Any:
    """An input of the model for some of its rows."""
    if isinstance(value, DynamicCache | EncoderDecoderCache):
        value.batch_select_indices(keep)
        return value
    if isinstance(value, ModelOutput):  # of the encoder
        return type(value)(**{part: _kept(part, inner, keep, num_rows) for part, inner in value.items()})
    rows_first = not (name == "position_ids" and isinstance(value, torch.Tensor) and value.dim() == 3)
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0 if rows_first else 1] == num_rows:
        return value.index_select(0 if rows_first else 1, keep)
    return value


def make_roomy(cache: Any) -> None:
    """Let the layers of an empty cache grow without being copied; those with a window or a recurrent state stay."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if isinstance(cache, DynamicCache) and not cache.get_seq_length():
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = RoomyLayer


_DIVISIBLE = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)
