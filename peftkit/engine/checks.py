"""Settings of an adapter that a model cannot follow, would ignore or would change in silence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

import peft
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkit.engine.adapter import targeted
from peftkit.engine.compiled import compile_problem
from peftkit.engine.savings import checkpoint_problem
from peftkit.engine.targets import (
    Targets,
    count_matches,
    fused_experts,
    leaf_names,
    linear_leaf_names,
    linear_sizes,
    matches,
    taken_for_experts,
)
from peftkit.plan import Plan

_OVERRIDES = (
    ("rank_pattern", "r"),
    ("rank_pattern", "effective_rank"),
    ("block_size_pattern", "block_size"),
    ("n_frequency_pattern", "n_frequency"),
)
_INITS_BY_WEIGHT = ("pissa", "olora", "orthogonal", "mica")  # ranks beyond the matrix's own have nothing to start from


def model_problems(plan: Plan, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Settings of the recipe that this model cannot follow."""
    training = plan.recipe.training
    if what := checkpoint_problem(model, training.gradient_checkpointing):
        yield "training.gradient_checkpointing", what
    if plan.recipe.generation.cache_implementation == "static" and not model._can_compile_fullgraph:
        yield "generation.cache_implementation", f"{type(model).__name__} has no static cache; use dynamic"
    if training.torch_compile and (what := compile_problem(model, plan.hardware.device)):
        yield "training.torch_compile", what


def unmatched(plan: Plan, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Every name in the adapter section that matches no module: PEFT passes over most of them in silence."""
    section: Any = plan.recipe.adapter
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for field in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "target_parameters"):
        entries, names = getattr(section, field, None), parameters if field == "target_parameters" else modules
        if entries is None or entries == "all-linear":
            continue
        if plan.method.targets == "suffix":
            entries = [entries]
        for entry, count in count_matches(names, entries).items():
            if count == 0:
                yield f"adapter.{field}", f"`{entry}` matches nothing in {type(model).__name__}{_suggest(entry, names, model)}"
    yield from _taken_for_experts(plan, model)
    for field in [name for name in type(section).model_fields if name.endswith("_pattern")]:
        patterns = getattr(section, field)
        for pattern in patterns if isinstance(patterns, dict) else []:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules):
                yield (
                    f"adapter.{field}.{pattern}",
                    f"matches nothing in {type(model).__name__}{_suggest(pattern, modules, model)}",
                )
    yield from _bad_indices(section, model)


def _taken_for_experts(plan: Plan, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    entries = getattr(plan.recipe.adapter, "target_modules", None)
    if entries is None or entries == "all-linear":
        return
    hit = [name for name in taken_for_experts(model, plan.method) if matches(name, entries)]
    if not hit:
        return
    leaves = ", ".join(leaf_names(hit))
    experts = ", ".join(fused_experts(model))
    hint = f"; for these, `target_parameters: [{experts}]`" if experts else ""
    what = f"{leaves} of {type(model).__name__} cannot be adapted: PEFT (0.21) takes such names for those of its experts"
    yield "adapter.target_modules", f"{what}{hint}"


def ill_fitting(plan: Plan, model: PreTrainedModel, targets: Targets) -> Iterator[tuple[str, str]]:
    """Settings that a layer cannot take by its size, each with the smallest such layer: what it can take, most others can."""
    linear = {name: linear_sizes(module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    seen = set()
    for name in sorted(targeted(plan, model, targets, linear), key=lambda name: sorted(linear[name])):
        inputs, outputs = linear[name]
        section, patterns = _settings_of(plan.recipe.adapter, name)
        for field, what in plan.method.fits(section, inputs, outputs):
            key = patterns.get(field, field)
            if key not in seen:
                seen.add(key)
                yield f"adapter.{key}", f"{what} (`{name}`: {inputs} inputs, {outputs} outputs)"


def _settings_of(section: Any, module: str) -> tuple[Any, dict[str, str]]:
    """The section as its patterns make it for one module, and field -> key of the pattern that set it."""
    changes, keys = {}, {}
    for patterns, field in _OVERRIDES:
        values = (getattr(section, patterns, None) or {}) if field in type(section).model_fields else {}
        for pattern, value in values.items():
            # PEFT looks for OSF's patterns anywhere in the name, for the others at its end
            if field not in keys and re.search(pattern if field == "effective_rank" else rf"^(.*\.)?({pattern})$", module):
                changes[field], keys[field] = value, f"{patterns}.{pattern}"
    return section.model_copy(update=changes), keys


def _bad_indices(section: Any, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    wanted = getattr(section, "layers_to_transform", None)
    for index in [wanted] if isinstance(wanted, int) else wanted or []:
        if layers is not None and not 0 <= index < layers:
            yield (
                "adapter.layers_to_transform",
                f"there is no layer {index}; {type(model).__name__} has layers 0 to {layers - 1}",
            )
    if layers is not None and (getattr(section, "adapter_layers", None) or 0) > layers:
        yield "adapter.adapter_layers", f"is {section.adapter_layers}; {type(model).__name__} has {layers} layers"
    tokens = getattr(section, "trainable_token_indices", None) or getattr(section, "token_indices", None) or []
    token_field = f"adapter.{'token_indices' if 'token_indices' in type(section).model_fields else 'trainable_token_indices'}"
    embedding = model.get_input_embeddings()
    for index in tokens if isinstance(tokens, list) else [i for part in tokens.values() for i in part]:
        if not 0 <= index < embedding.weight.shape[0]:
            yield token_field, f"there is no token {index}; the model has {embedding.weight.shape[0]}"
    modules = [name for name, _ in model.named_modules()]
    for name in tokens if isinstance(tokens, dict) else []:
        if not any(matches(module, [name]) for module in modules):
            yield "adapter.trainable_token_indices", f"no embedding is called `{name}`{_suggest(name, modules, model)}"


def unfit(plan: Plan, adapted: peft.PeftModel) -> Iterator[tuple[str, str]]:
    """Settings that only the adapted layers can tell to be impossible or without effect."""
    section: Any = plan.recipe.adapter
    bias = getattr(section, "bias", "none")
    if bias != "none" and not any(_is_base_bias(name) and p.requires_grad for name, p in adapted.named_parameters()):
        what = "the model has no bias" if bias == "all" else "the adapted layers have no bias"
        yield "adapter.bias", f"`{bias}` has no effect: {what}"
    init = str(getattr(section, "init_lora_weights", "")).partition("_")[0]
    layers = [(name, layer) for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers if init in _INITS_BY_WEIGHT else []:
        if what := _why_not_init(init, layer):
            module = name.removeprefix("base_model.model.")
            yield "adapter.init_lora_weights", f"`{init}` cannot start from `{module}`: {what}"
            return  # the other layers are like it


def _why_not_init(init: str, layer: LoraLayer) -> str:
    """Why an initialisation from the base weight does not fit this layer; empty where it does."""
    base, smaller = layer.get_base_layer(), min(layer.in_features, layer.out_features)
    if isinstance(layer, ParamWrapper):
        return "it holds a parameter that is no linear layer's"
    if isinstance(base, nn.Embedding) and init != "mica":
        return "it is an embedding"
    if isinstance(base, Conv1D) and init == "olora":
        return "PEFT 0.21 takes the transposed weight of GPT-2's layers for the weight itself; use pissa"
    return f"`r` is {layer.r['default']}, its smaller side {smaller}" if layer.r["default"] > smaller else ""


def _is_base_bias(name: str) -> bool:
    return name.endswith(".bias") and not re.search(r"\.(modules_to_save|default)\.", name)


def _suggest(entry: str, names: list[str], model: PreTrainedModel) -> str:
    close = difflib.get_close_matches(entry, leaf_names(names), n=1, cutoff=0.7)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    return f"{hint}; its linear layers: {', '.join(linear_leaf_names(model))}"
