"""Which modules an adapter goes to: what a recipe's entries match, and what is meant when it names none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkit.errors import RecipeError
from peftkit.methods.base import Method

_QUERY = ("q_proj", "q", "query", "query_proj", "q_lin")
_KEY = ("k_proj", "k", "key", "key_proj", "k_lin")
_VALUE = ("v_proj", "v", "value", "value_proj", "v_lin")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj", "qkv", "attn_qkv", "att_proj")
_ROUTERS = re.compile(r"(^|\.)(\w*router\w*|gate|shared_expert_gate|wg)(\.|$)")
_NO_TEXT = re.compile(r"(^|[._])(vision|visual|image|audio|speech|multi_?modal)")  # towers that see or hear
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_LAYER = re.compile(r"\.\d+\.")
# Mamba's kernels read the weight of `out_proj` themselves, past any adapter; PEFT refuses it for LoRA (0.21).
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True)
class Targets:
    """Resolved targets: what PEFT gets, and why."""

    modules: list[str] | str
    exclude: list[str] | str | None
    reason: str


def linear_modules(model: nn.Module) -> list[str]:
    """Full names of all linear layers (GPT-2's Conv1D included)."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def linear_leaf_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers, for messages."""
    return leaf_names(linear_modules(model))


def leaf_names(names: Iterable[str]) -> list[str]:
    """Last parts of names, each once, sorted."""
    return sorted({name.rpartition(".")[2] for name in names})


def resolve_targets(
    model: PreTrainedModel,
    wanted: list[str] | str | None,
    exclude: list[str] | str | None,
    head: Sequence[str],
    method: Method,
) -> Targets:
    """Turn `all-linear` and a missing value into names; routers, poolers and heads are left out unless named.

    Raises:
        RecipeError: the model has no layer for the method.
    """
    if wanted is not None and wanted != "all-linear":
        return Targets(wanted, exclude, "as the recipe says")
    names = linear_modules(model)
    if wanted is None:
        known = _peft_table(method).get(model.config.model_type)
        modules = [name for name, _ in model.named_modules()]
        if known and any(matches(name, known) for name in modules):
            reason = f"PEFT's table for `{model.config.model_type}`"
            hit = [name for name in modules if matches(name, known)]
            outside = [name for name in hit if not _in_layers(name, head) and name in names]
            return _without(known, hit, outside, exclude, reason)
        if method.targets in ("", "suffix", "embedding"):
            return Targets([], exclude, "as PEFT chooses")
    if wanted is None and method.targets == "norms":
        chosen, reason = _norms(model, head), "every normalisation layer, found by inspection"
    else:
        unfit = taken_for_experts(model, method)
        layers = [name for name in names if _in_layers(name, head) and not _read_by_kernel(model, name) and name not in unfit]
        chosen, reason = (layers, "every linear layer of the backbone") if wanted else _by_inspection(model, layers, method)
        if unfit and chosen == layers:
            reason += f" but {', '.join(leaf_names(unfit))}, which PEFT (0.21) takes for the experts"
    if not chosen:
        what = "normalisation layers with weights" if method.targets == "norms" else "linear layers"
        raise RecipeError(f"adapter.method: {type(model).__name__} has no {what} for `{method.name}` to adapt")
    leaves = leaf_names(chosen)
    hit = [name for name, _ in model.named_modules() if matches(name, leaves)]
    return _without(leaves, hit, [name for name in hit if name not in chosen], exclude, reason)


def _peft_table(method: Method) -> dict[str, list[str] | str]:
    """PEFT's own default targets of a method, by model type: names, or (Gemma 4) a regular expression."""
    if method.targets == "key_value_feedforward":
        return dict(TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(method.name.upper())
    return dict(getattr(tuner, "target_module_mapping", None) or {})


def _by_inspection(model: PreTrainedModel, layers: list[str], method: Method) -> tuple[list[str], str]:
    leaves = {name.rpartition(".")[2] for name in layers}
    if method.targets == "all_linear":
        return layers, "every linear layer of the backbone"
    groups = {
        "query_value": (_QUERY + _VALUE, "query and value projections"),
        "key_value_feedforward": (_KEY + _VALUE, "key and value projections and the feed-forward layers' last one"),
        "value": (_VALUE, "value projections"),
    }
    wanted, what = groups[method.targets]
    chosen = [leaf for leaf in leaves if leaf in wanted] or [leaf for leaf in leaves if leaf in _FUSED]
    if not chosen:
        return layers, "every linear layer of the backbone"
    full = [name for name in layers if name.rpartition(".")[2] in chosen]
    if method.targets == "key_value_feedforward":
        full += [name for name in layers if _ends_feedforward(model, name) and name not in full]
    return full, f"{what}, found by inspection"


def feedforward_modules(model: PreTrainedModel, targets: list[str] | str) -> list[str]:
    """Those of the targets that are a feed-forward block's last layer (IA3 scales their inputs)."""
    names = linear_modules(model)
    if isinstance(targets, str):
        return [name for name in names if matches(name, targets) and _ends_feedforward(model, name)]
    known = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, [])
    if known and set(known) <= set(targets):
        return list(known)
    hit = {entry: [name for name in names if matches(name, [entry])] for entry in targets}
    return [entry for entry, found in hit.items() if found and all(_ends_feedforward(model, name) for name in found)]


def _read_by_kernel(model: PreTrainedModel, name: str) -> bool:
    return model.config.model_type in _MAMBA and name.endswith(".out_proj")


def taken_for_experts(model: PreTrainedModel, method: Method) -> list[str]:
    """Linear layers with names that experts had before transformers 5: PEFT's LoRA adapts the fused experts instead (0.21)."""
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, "")
    fused = _MOE_TARGET_MODULE_MAPPING.get(pattern, {}) if "target_parameters" in method.section.model_fields else {}
    names = {old for old, new in fused.items() if not new.endswith(".weight")}  # a router's goes to the same weight
    return [name for name in linear_modules(model) if name.rpartition(".")[2] in names]


def fused_experts(model: PreTrainedModel) -> list[str]:
    """Ends of the names of parameters that hold one matrix per expert and belong to no linear layer."""
    numbers = {value for name, value in model.config.get_text_config().to_dict().items() if "expert" in name}
    found = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and parameter.shape[0] in numbers]
    return sorted({_LAYER.split(name)[-1] for name in found})


def linear_sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; the weight of a quantised one has another shape."""
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


def _ends_feedforward(model: nn.Module, name: str) -> bool:
    """Whether a linear layer is a feed-forward block's last one: one with fewer outputs than inputs, outside the attention."""
    inputs, outputs = linear_sizes(model.get_submodule(name))
    leaf = name.rpartition(".")[2]
    projects = leaf in (*_QUERY, *_KEY, *_VALUE, *_FUSED) or leaf.endswith("gate") or bool(_ATTENTION.search(name))
    return outputs < inputs and not projects


def _norms(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Full names of the normalisation layers that have weights, the one after the last layer included."""
    found = [name for name, module in model.named_modules() if _is_norm(module)]
    return [name for name in found if name.partition(".")[0] not in head and not _set_apart(name)]


def _is_norm(module: nn.Module) -> bool:
    leaf = not any(True for _ in module.children())  # `RobertaPreLayerNormModel` is none
    return leaf and "norm" in type(module).__name__.lower() and any(True for _ in module.parameters())


def _without(
    entries: list[str] | str, hit: list[str], outside: list[str], exclude: list[str] | str | None, reason: str
) -> Targets:
    """Targets without modules that are hit by name but not meant; by full name, as not every PEFT config can exclude."""
    if not outside:
        return Targets(entries, exclude, reason)
    return Targets([name for name in hit if name not in outside], exclude, reason)


def _in_layers(name: str, head: Sequence[str]) -> bool:
    return bool(_LAYER.search(f".{name}.")) and name.partition(".")[0] not in head and not _set_apart(name)


def _set_apart(name: str) -> bool:
    """Whether a module is a router of experts, or belongs to a tower that reads no text."""
    return bool(_ROUTERS.search(name) or _NO_TEXT.search(name))


def matches(name: str, entries: Iterable[str] | str) -> bool:
    """Whether a module name is hit, by PEFT's rule: a regular expression over the whole name, or a list of suffixes."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def count_matches(names: Iterable[str], entries: list[str] | str) -> dict[str, int]:
    """How many of the names each entry hits."""
    names = list(names)
    separate = [entries] if isinstance(entries, str) else [[entry] for entry in entries]
    keys = [entries] if isinstance(entries, str) else entries
    return {key: sum(matches(name, entry) for name in names) for key, entry in zip(keys, separate, strict=True)}
