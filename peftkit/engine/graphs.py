"""What exported files compute: a model's inputs and outputs by the names that clients of ONNX and OpenVINO know.

The names are those of optimum and transformers.js: `past_key_values.N.key` go in, `present.N.key` come out. One graph serves a
prompt (with an empty past) and every further token.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from peftkit.engine.adapted import KEYS_AND_VALUES, AdaptedModel
from peftkit.engine.adapter import base_of_adapted
from peftkit.errors import RecipeError
from peftkit.tasks.example import Batch, Runtime

Layers = list[dict[str, torch.Tensor]]  # of each layer `key` and `value` (B, H, T, D)
BATCH, LENGTH, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
SOURCE, TARGET, TARGET_PAST = "encoder_sequence_length", "decoder_sequence_length", "past_decoder_sequence_length"
_TOKENS = {"input_ids": {0: BATCH, 1: LENGTH}, "attention_mask": {0: BATCH, 1: TOTAL}, "position_ids": {0: BATCH, 1: LENGTH}}


@dataclass(frozen=True)
class Graph:
    """A function of named tensors that can be traced.

    Attributes:
        name: of its file, without what stands for the format.
        module: takes the inputs by name.
        inputs: an example of each; layers as lists of mappings, whose names are joined by dots.
        axes: the same, with the names of the axes that may have any length.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Any]
    axes: dict[str, Any]

    @property
    def dynamic_shapes(self) -> dict[str, Any]:
        """The axes as torch.export wants them; how they hang together it finds out by itself."""
        shapes: dict[str, Any] = _without_names(self.axes)
        return shapes


def _without_names(axes: Any) -> Any:
    if isinstance(axes, list):
        return [_without_names(part) for part in axes]
    if all(isinstance(key, int) for key in axes):
        return dict.fromkeys(axes, Dim.AUTO)
    return {name: _without_names(part) for name, part in axes.items()}


def graphs_of(model: nn.Module, runtime: Runtime, example: Batch, *, generates: bool, cached: bool = True) -> list[Graph]:
    """The graphs that an exported model consists of.

    Args:
        model: merged, or with an adapter whose virtual tokens become constants; on the CPU, in evaluation mode.
        runtime: the task on tensors.
        example: inputs of at least two rows.
        generates: whether the task generates text.
        cached: whether the model may keep keys and values.

    Raises:
        RecipeError: the model keeps something else than keys and values.
    """
    if not generates:
        axes = {name: {0: BATCH, 1: LENGTH} for name in example}
        return [Graph("model", _SinglePass(model, runtime), dict(example), axes)]
    if _base(model).config.is_encoder_decoder:
        return [_encoder(model, example), *_decoders(model, example)]
    return [_decoder(model, example) if cached else _decoder_without_cache(model, example)]


class _SinglePass(nn.Module):
    """All outputs of a task that needs one pass."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__()
        self.model, self.runtime = model, runtime

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The task's outputs by name."""
        return self.runtime.graph_outputs(self.model, inputs)


class _Decoder(nn.Module):
    """Logits and the keys and values of all tokens, from new tokens and those of the tokens before."""

    def __init__(self, model: nn.Module, prefix: Layers) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def forward(self, past_key_values: Layers | None = None, **inputs: torch.Tensor) -> dict[str, Any]:
        """Logits (B, T, V), and the layers without their prefix."""
        num_tokens = _num_tokens(self.prefix)
        inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (num_tokens, 0), value=1)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + num_tokens
        if past_key_values is None:
            return {"logits": self.model(**inputs, use_cache=False).logits.float()}
        cache = _cache(_behind(self.prefix, past_key_values))
        with _without_prompts(self.model, self.prefix):
            output = self.model(**inputs, past_key_values=cache, use_cache=True)
        return {"logits": output.logits.float(), "present": _layers(output.past_key_values, num_tokens)}


def _decoder(model: nn.Module, example: Batch) -> Graph:
    prefix = _prefix(model)
    layers = _empty_layers(model)
    ids = example["input_ids"][:2, :3]
    past = [{name: torch.rand(2, part.shape[1], 5, part.shape[3]) for name, part in layer.items()} for layer in layers]
    inputs: dict[str, Any] = _token_inputs(model, ids, num_past=5) | {"past_key_values": past}
    axes: dict[str, Any] = {name: _TOKENS[name] for name in inputs if name in _TOKENS}
    axes["past_key_values"] = [{name: {0: BATCH, 2: PAST} for name in layer} for layer in layers]
    return Graph("model", _Decoder(model, prefix), inputs, axes)


def _decoder_without_cache(model: nn.Module, example: Batch) -> Graph:
    inputs = _token_inputs(model, example["input_ids"][:2, :5], num_past=0)
    axes = {name: {0: BATCH, 1: LENGTH} for name in inputs}
    return Graph("model", _Decoder(model, []), inputs, axes)


def _token_inputs(model: nn.Module, ids: torch.Tensor, *, num_past: int) -> dict[str, torch.Tensor]:
    """New tokens (B, T) of rows with so many tokens before; positions where the model can be told them."""
    batch, length = ids.shape
    inputs = {"input_ids": ids, "attention_mask": torch.ones(batch, num_past + length, dtype=torch.long)}
    if "position_ids" in inspect.signature(_base(model).forward).parameters:
        inputs["position_ids"] = torch.arange(num_past, num_past + length).repeat(batch, 1)
    return inputs


class _Encoder(nn.Module):
    """Hidden states of an encoder, virtual tokens in front where the adapter has some."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Hidden states (B, S, D)."""
        return {"last_hidden_state": _base(self.model).get_encoder()(**inputs).last_hidden_state}


def _encoder(model: nn.Module, example: Batch) -> Graph:
    inputs = {name: example[name] for name in ("input_ids", "attention_mask")}
    axes = {name: {0: BATCH, 1: SOURCE} for name in inputs}
    return Graph("encoder_model", _Encoder(model), inputs, axes)


class _FirstDecoder(nn.Module):
    """A decoder's first pass, which makes the keys and values of the encoder's tokens too."""

    def __init__(self, model: nn.Module, prefix: Layers) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def forward(
        self, encoder_attention_mask: torch.Tensor, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> dict[str, Any]:
        """Logits (B, T, V), and of each layer keys and values of both stacks."""
        heads = encoder_hidden_states.new_zeros(input_ids.shape[0], 1, 0, 1)
        nothing = [
            {name: heads.expand(-1, part.shape[1], -1, part.shape[3]) for name, part in layer.items()} for layer in self.prefix
        ]
        cache = EncoderDecoderCache(_cache(_behind(self.prefix, nothing)), DynamicCache())
        with _without_prompts(self.model, self.prefix):
            output = _answer(self.model, encoder_attention_mask, input_ids, encoder_hidden_states, cache)
        num_tokens = _num_tokens(self.prefix)
        own, cross = _layers(output.past_key_values.self_attention_cache, num_tokens), _layers(cache.cross_attention_cache, 0)
        present = [{"decoder": one, "encoder": other} for one, other in zip(own, cross, strict=True)]
        return {"logits": output.logits.float(), "present": present}


class _NextDecoder(nn.Module):
    """A decoder's further passes."""

    def __init__(self, model: nn.Module, prefix: Layers) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def forward(
        self, encoder_attention_mask: torch.Tensor, input_ids: torch.Tensor, past_key_values: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Logits (B, T, V), and of each layer the decoder's own keys and values; those of the encoder stay."""
        own = _behind(self.prefix, [layer["decoder"] for layer in past_key_values])
        cross = [layer["encoder"] for layer in past_key_values]
        cache = EncoderDecoderCache(_cache(own), _cache(cross))
        keys = cross[0]["key"]
        # Its length alone is read, for the mask: the keys and values are there already.
        states = keys.new_zeros(keys.shape[0], keys.shape[2], _base(self.model).config.hidden_size)
        with _without_prompts(self.model, self.prefix):
            output = _answer(self.model, encoder_attention_mask, input_ids, states, cache)
        own = _layers(output.past_key_values.self_attention_cache, _num_tokens(self.prefix))
        return {"logits": output.logits.float(), "present": [{"decoder": layer} for layer in own]}


def _answer(model: nn.Module, mask: torch.Tensor, ids: torch.Tensor, states: torch.Tensor, cache: Cache) -> Any:
    encoded = BaseModelOutput(last_hidden_state=states)
    return model(attention_mask=mask, encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)


def _decoders(model: nn.Module, example: Batch) -> list[Graph]:
    prefix = _prefix(model)
    source = {name: example[name][:2] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = _Encoder(model)(**source)["last_hidden_state"]
    ids = source["input_ids"][:, :3]
    tokens = {"encoder_attention_mask": source["attention_mask"], "input_ids": ids}
    axes = {"encoder_attention_mask": {0: BATCH, 1: SOURCE}, "input_ids": {0: BATCH, 1: TARGET}}
    first = _FirstDecoder(model, prefix)
    with torch.no_grad():
        present = first(**tokens, encoder_hidden_states=states)["present"]
    # Of a length of its own, so that it does not seem to be that of the new tokens.
    past = [
        {name: {key: torch.cat([part, part], dim=2) if name == "decoder" else part.clone() for key, part in parts.items()}
         for name, parts in layer.items()}
        for layer in present
    ]  # fmt: skip
    lengths = {"decoder": TARGET_PAST, "encoder": SOURCE}
    past_axes = [
        {name: {key: {0: BATCH, 2: lengths[name]} for key in parts} for name, parts in layer.items()} for layer in past
    ]
    return [
        Graph(
            "decoder_model",
            first,
            tokens | {"encoder_hidden_states": states},
            axes | {"encoder_hidden_states": {0: BATCH, 1: SOURCE}},
        ),
        Graph(
            "decoder_with_past_model",
            _NextDecoder(model, prefix),
            tokens | {"past_key_values": past},
            axes | {"past_key_values": past_axes},
        ),
    ]


def _base(model: nn.Module) -> Any:
    return base_of_adapted(model)


def _empty_layers(model: nn.Module) -> Layers:
    """Keys and values (1, H, 1, D) of some token, which say how many layers there are and how large.

    Raises:
        RecipeError: the model keeps something else.
    """
    ids = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return _layers(cache, 0)


def _layers(cache: Any, num_skipped: int) -> Layers:
    """Keys and values of a cache, from one place on.

    Raises:
        RecipeError: it holds something else.
    """
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise RecipeError("the model keeps no keys and values alone (a recurrent state?), which the graph's inputs would be")
    return [{"key": layer.keys[:, :, num_skipped:], "value": layer.values[:, :, num_skipped:]} for layer in layers]


def _cache(layers: Layers) -> DynamicCache:
    return DynamicCache([(layer["key"], layer["value"]) for layer in layers])


def _behind(prefix: Layers, layers: Layers) -> Layers:
    """Keys and values behind those of a prefix (1, H, P, D)."""
    if not prefix:
        return layers
    return [
        {
            name: torch.cat([front[name].to(part.dtype).expand(part.shape[0], -1, -1, -1), part], dim=2)
            for name, part in layer.items()
        }
        for front, layer in zip(prefix, layers, strict=True)
    ]


@contextlib.contextmanager
def _without_prompts(model: Any, prefix: Layers) -> Iterator[None]:
    """Let the adapter put in no virtual tokens where a prefix stands for them, for as long as the context lasts."""
    if not prefix:
        yield
        return
    model.prompts_off = True
    try:
        yield
    finally:
        model.prompts_off = False


def _num_tokens(prefix: Layers) -> int:
    return prefix[0]["key"].shape[2] if prefix else 0


def _prefix(model: nn.Module) -> Layers:
    """What a decoder's virtual tokens are to all that follow: keys and values (1, H, P, D).

    Virtual tokens in front of a decoder's embeddings see nothing but each other, so that their keys and values never change.
    """
    if not isinstance(model, AdaptedModel) or not model.active_peft_config.is_prompt_learning:
        return []
    in_cache = model.peft_type in KEYS_AND_VALUES
    if not in_cache and _base(model).config.is_encoder_decoder:
        return []  # the encoder reads them
    num_tokens = model.active_peft_config.num_virtual_tokens
    with torch.no_grad():
        prompt = model.get_prompt(1, model.tasks_of(1))
        if in_cache:
            return _layers(prompt.self_attention_cache if isinstance(prompt, EncoderDecoderCache) else prompt, 0)
        mask = torch.ones(1, num_tokens, dtype=torch.long)
        model.prompts_off = True
        output = _base(model)(inputs_embeds=prompt[:, :num_tokens], attention_mask=mask, use_cache=True)
        model.prompts_off = False
    return _layers(output.past_key_values, 0)


def in_float16(graph: Graph) -> Graph:
    """The same in float16, the outputs aside that are no keys and values."""
    return dataclasses.replace(graph, module=copy.deepcopy(graph.module).half())


def examples_batch(runtime: Runtime, examples: Sequence[Any]) -> Batch:
    """The model inputs of some rows, padded."""
    return {name: tensor for name, tensor in runtime.collate(examples).items() if name not in ("labels", "task_ids")}
