"""Which modules an adapter goes to: what a recipe's entries match, and what is meant when it names none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_QUERY_VALUE = ("q_proj", "v_proj", "q", "v", "query", "value", "query_proj", "value_proj", "q_lin", "v_lin")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj", "qkv", "attn_qkv", "att_proj")
_ROUTERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate|wg)(\.|$)")
_LAYER = re.compile(r"\.\d+\.")


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
    return sorted({name.rpartition(".")[2] for name in linear_modules(model)})


def resolve_targets(
    model: PreTrainedModel, wanted: list[str] | str | None, exclude: list[str] | str | None, head: Sequence[str]
) -> Targets:
    """Turn `all-linear` and a missing value into names; routers, poolers and heads are left out unless named."""
    if wanted is not None and wanted != "all-linear":
        return Targets(wanted, exclude, "as the recipe says")
    if wanted is None:
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
        if known and any(matches(name, known) for name in linear_modules(model)):
            return Targets(list(known), exclude, f"PEFT's table for `{model.config.model_type}`")
    layers = [name for name in linear_modules(model) if _in_layers(name, head)]
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    reason = "every linear layer of the backbone"
    if wanted is None:
        chosen = [name for name in leaves if name in _QUERY_VALUE] or [name for name in leaves if name in _FUSED]
        leaves, reason = (chosen, "query and value projections, found by inspection") if chosen else (leaves, reason)
    left_out = [name for name in linear_modules(model) if name not in layers and matches(name, leaves)]
    return Targets(leaves, _join(exclude, left_out), reason)


def _in_layers(name: str, head: Sequence[str]) -> bool:
    return bool(_LAYER.search(f".{name}.")) and name.partition(".")[0] not in head and not _ROUTERS.search(name)


def _join(exclude: list[str] | str | None, more: list[str]) -> list[str] | str | None:
    if not more:
        return exclude
    if isinstance(exclude, str):
        return "|".join([f"(?:{exclude})", *map(re.escape, more)])
    return [*(exclude or []), *more]


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
