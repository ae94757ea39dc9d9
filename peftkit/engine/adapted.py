"""A base model with a PEFT adapter whose outputs are where the base model's would be, whatever the method.

PEFT's task classes hand virtual tokens on to heads and losses: pooled tokens, answer positions and labels are then shifted, and
position ids, token types and task ids get lost (peft 0.21). Here virtual tokens enter and leave at the transformer's layers:
what comes before and after, the heads among it, never sees them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.variants import get_alora_offsets_for_forward, get_alora_offsets_for_generate
from peft.tuners.poly.layer import PolyLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from peftkit.errors import RecipeError

Kwargs = dict[str, Any]
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")


class AdaptedModel(PeftModel):  # type: ignore[misc]  # peft is untyped here
    """`peft.PeftModel`, with the base model's own forward and generate, and `task_ids` for methods that learn several tasks."""

    task_ids: torch.Tensor | None = None
    only_task: int | None = None  # number of the task of rows that come without `task_ids`
    prompts_off = False
    prompt_states: torch.Tensor | None = None  # (B, tokens, D), for CPT's loss on its own context

    def __init__(self, model: PreTrainedModel, config: Any, adapter_name: str = "default", **options: Any) -> None:
        super().__init__(model, config, adapter_name, **options)
        if config.is_prompt_learning:
            _install(self, model)
        for module in model.modules():
            if isinstance(module, PolyLayer):
                module.register_forward_pre_hook(self._give_task_ids, with_kwargs=True)

    def forward(self, input_ids: torch.Tensor | None = None, *, task_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        """The base model's output.

        Args:
            input_ids: (B, T), unless the inputs have `inputs_embeds`.
            task_ids: (B,) number of the task of each row, for methods that need it.
            inputs: further ones of the base model.
        """
        inputs |= {} if input_ids is None else {"input_ids": input_ids}
        inputs |= get_alora_offsets_for_forward(self, **inputs)
        with self._tasks(task_ids), self._enable_peft_forward_hooks(**inputs):
            return self.get_base_model()(**_without_special(self, inputs))

    def generate(self, task_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        """What the base model generates; same arguments as `forward`, and those of transformers' generate."""
        inputs = get_alora_offsets_for_generate(self, **inputs)
        if self.peft_type == "XLORA":
            inputs["use_cache"] = False  # its scalings come from a pass over the whole sequence
        with self._tasks(task_ids), self._enable_peft_forward_hooks(**inputs):
            return self.get_base_model().generate(**_without_special(self, inputs))

    @contextlib.contextmanager
    def answering(self, task_ids: torch.Tensor | None = None, **inputs: Any) -> Iterator[None]:
        """What `generate` does around its passes, for those who make the passes themselves.

        Args:
            task_ids: (B,), see `forward`.
            inputs: `adapter_names`, one for each row; `alora_offsets`.
        """
        with self._tasks(task_ids), self._enable_peft_forward_hooks(**inputs):
            yield

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base model, for as long as the context lasts."""
        if not self.active_peft_config.is_prompt_learning:
            with super().disable_adapter():
                yield
            return
        self._switch_prompts(on=False)
        try:
            yield
        finally:
            self._switch_prompts(on=True)

    def _switch_prompts(self, *, on: bool) -> None:
        """Let virtual tokens in or keep them out, and take the trained or the base's own head."""
        self.prompts_off = not on
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(on)

    @contextlib.contextmanager
    def _tasks(self, task_ids: torch.Tensor | None) -> Iterator[None]:
        self.task_ids = task_ids
        try:
            yield
        finally:
            # Layers that are recomputed in the backward pass ask for them once more.
            if not (self.training and torch.is_grad_enabled()):
                self.task_ids = None

    def _give_task_ids(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, Kwargs]:
        return args, kwargs | {"task_ids": self.tasks_of(args[0].shape[0])}

    def tasks_of(self, batch_size: int) -> torch.Tensor | None:
        """`task_ids` for a batch that beams may have made larger."""
        if self.task_ids is None:
            return None if self.only_task is None else torch.full((batch_size,), self.only_task)
        return self.task_ids.repeat_interleave(batch_size // len(self.task_ids))


def _without_special(model: PeftModel, inputs: Kwargs) -> Kwargs:
    return {name: value for name, value in inputs.items() if name not in model.special_peft_forward_args}


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The transformer inside a model with a head; the model itself where it has none.

    A wrapper around one module that takes the same input is passed over: OPT's head calls what is in it.
    """
    backbone: nn.Module = model.base_model
    while len(inner := list(backbone.children())) == 1 and "input_ids" in inspect.signature(inner[0].forward).parameters:
        backbone = inner[0]
    return backbone


def encoder_and_decoder(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    """Both stacks of an encoder-decoder model; None for each that the model has not."""
    backbone = backbone_of(model)
    parts = [getattr(backbone, name, None) for name in ("encoder", "decoder")]
    encoder, decoder = [part if isinstance(part, nn.Module) else None for part in parts]
    return (encoder, decoder) if model.config.is_encoder_decoder else (None, None)


def layer_holder(backbone: nn.Module) -> nn.Module:
    """The module that holds the stack of layers: its output is the last hidden state, before any pooling."""
    lists = [(len(module), name) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return backbone
    longest = max(lists, key=lambda item: item[0])[1]
    return backbone.get_submodule(longest.rpartition(".")[0])


def _install(adapted: AdaptedModel, model: PreTrainedModel) -> None:
    """Let virtual tokens in and out of the base model by hooks.

    Raises:
        RecipeError: the model has no place for them.
    """
    encoder, decoder = encoder_and_decoder(model)
    if adapted.peft_type in KEYS_AND_VALUES:
        _KeysAndValues(adapted, decoder if decoder is not None else backbone_of(model))
        return
    reader = encoder if encoder is not None else backbone_of(model)
    hooks = _Embeddings(adapted, reader, model.get_input_embeddings())
    if decoder is None:
        layer_holder(reader).register_forward_hook(hooks.cut)
    else:
        decoder.register_forward_pre_hook(hooks.widen_cross_attention, with_kwargs=True)


class _Embeddings:
    """Virtual tokens in front of the embedded input of one transformer."""

    def __init__(self, adapted: AdaptedModel, reader: nn.Module, embedding: nn.Module) -> None:
        self.adapted, self.embedding = (adapted,), embedding  # a tuple, so that no cycle of modules arises
        self.names = list(inspect.signature(reader.forward).parameters)
        self.num_tokens = adapted.active_peft_config.num_virtual_tokens
        self.inserted = False
        if "inputs_embeds" not in self.names:
            raise RecipeError(
                f"adapter.method: {type(reader).__name__} takes no embeddings, so virtual tokens cannot be put in"
            )
        reader.register_forward_pre_hook(self.insert, with_kwargs=True)

    def insert(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, Kwargs]:
        """Before the transformer: put them in front, unless its cache holds them already."""
        (adapted,) = self.adapted
        self.inserted = False
        if adapted.prompts_off:
            return args, kwargs
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self.embedding(inputs["input_ids"])
        past = inputs.get("past_key_values")
        first = past is None or past.get_seq_length() == 0
        _widen_mask(inputs, "attention_mask", self.num_tokens)
        _shift_positions(inputs, self.num_tokens, add=first)
        if first:
            prompts = adapted.get_prompt(embeds.shape[0], adapted.tasks_of(embeds.shape[0])).to(embeds.dtype)
            prompts = prompts[:, : self.num_tokens]  # PEFT trains as many again for a decoder, and generates without them
            inputs |= {"inputs_embeds": torch.cat([prompts, embeds], dim=1), "input_ids": None}
            if inputs.get("token_type_ids") is not None:
                inputs["token_type_ids"] = nn.functional.pad(inputs["token_type_ids"], (self.num_tokens, 0))
            self.inserted = True
        return (), inputs

    def cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the layers: hidden states of the real tokens only."""
        if not self.inserted:
            return output
        (adapted,) = self.adapted
        if adapted.peft_type == "CPT":
            adapted.prompt_states = output.last_hidden_state[:, : self.num_tokens]
        if isinstance(output, torch.Tensor):
            return output[:, self.num_tokens :]
        if isinstance(output, tuple):
            return (output[0][:, self.num_tokens :], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, self.num_tokens :]
        if output.get("hidden_states") is not None:  # DeBERTa goes on with the last of these
            output.hidden_states = tuple(states[:, self.num_tokens :] for states in output.hidden_states)
        return output

    def widen_cross_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, Kwargs]:
        """Before a decoder: let it see the encoder's virtual tokens."""
        (adapted,) = self.adapted
        if not adapted.prompts_off:
            _widen_mask(kwargs, "encoder_attention_mask", self.num_tokens)
        return args, kwargs


class _KeysAndValues:
    """Keys and values in front of every layer's own, by way of the model's cache."""

    def __init__(self, adapted: AdaptedModel, reader: nn.Module) -> None:
        self.adapted = (adapted,)
        self.names = list(inspect.signature(reader.forward).parameters)
        self.num_tokens = adapted.active_peft_config.num_virtual_tokens
        if "past_key_values" not in self.names:
            raise RecipeError(
                f"adapter.method: {type(reader).__name__} keeps no keys and values, so none can be put in front of them"
            )
        if hasattr(adapted.base_model.config.get_text_config(), "kv_lora_rank"):  # multi-head latent attention (DeepSeek-V2)
            raise RecipeError(
                f"adapter.method: {type(reader).__name__} keeps one compressed vector in place of keys and values, before "
                "which none can be put"
            )
        reader.register_forward_pre_hook(self.insert, with_kwargs=True)

    def insert(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> tuple[Any, Kwargs]:
        """Before the transformer: fill an empty cache."""
        (adapted,) = self.adapted
        if adapted.prompts_off:
            return args, kwargs
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        past = inputs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            read = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            prefix = adapted.get_prompt(read.shape[0])
            inputs["past_key_values"] = prefix if past is None else _filled(past, prefix)
        _widen_mask(inputs, "attention_mask", self.num_tokens)
        _shift_positions(inputs, self.num_tokens, add=False)
        return (), inputs


def _filled(cache: Cache, prefix: Cache) -> Cache:
    """The empty cache that generate has made, with the prefix in it."""
    into, source = (part.self_attention_cache if isinstance(part, EncoderDecoderCache) else part for part in (cache, prefix))
    assert isinstance(source, DynamicCache)
    for number, layer in enumerate(source.layers):
        into.update(layer.keys, layer.values, number)
    return cache


def _widen_mask(inputs: Kwargs, name: str, num_tokens: int) -> None:
    mask = inputs.get(name)
    if mask is not None:
        inputs[name] = nn.functional.pad(mask, (num_tokens, 0), value=1)


def _shift_positions(inputs: Kwargs, num_tokens: int, *, add: bool) -> None:
    """Positions count the virtual tokens; with `add` these get their own."""
    positions = inputs.get("position_ids")
    if positions is None:
        return
    shifted = positions + num_tokens
    if add:
        own = torch.arange(num_tokens, device=positions.device).expand(positions.shape[0], -1)
        shifted = torch.cat([own, shifted], dim=1)
    inputs["position_ids"] = shifted
