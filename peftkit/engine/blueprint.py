"""What a plan means for its model, found on the meta device before any weight is loaded: targets, counts, problems."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftkit.engine.adapter import adapter_targets, attach_adapter, count_parameters
from peftkit.engine.model import base_of, head_modules, is_tied, load_config, meta_model, missing_weights
from peftkit.engine.targets import count_matches, linear_leaf_names, matches
from peftkit.errors import Problem, RecipeError
from peftkit.methods.lora import LoraSection
from peftkit.plan import Plan

_INITS_BY_WEIGHT = ("pissa", "olora", "orthogonal", "mica")  # ranks beyond the matrix's own have nothing to start from


@dataclass(frozen=True)
class Blueprint:
    """A model and its adapter, by shape alone.

    Attributes:
        config: the model's config.
        model: the model with its adapter, on the meta device.
        trainable_params: parameters that are trained.
        all_params: all parameters, as PEFT counts them.
        targets: entry of `target_modules` -> number of modules it matches.
        targets_reason: how the targets were chosen.
        saved_modules: modules that are trained and saved whole, the head among them.
        notes: what the user should know and need not change.
    """

    config: PretrainedConfig
    model: nn.Module
    trainable_params: int
    all_params: int
    targets: dict[str, int]
    targets_reason: str
    saved_modules: list[str]
    notes: list[str]

    @property
    def trainable_percent(self) -> float:
        """Share of trained parameters, in percent."""
        return 100 * self.trainable_params / self.all_params


def draw_blueprint(plan: Plan, num_labels: int = 0) -> Blueprint:
    """Build the model and its adapter on the meta device and check every name that the recipe mentions.

    Args:
        plan: the plan.
        num_labels: classes of a classifier, where they are known already.

    Raises:
        LoadError: the model's config cannot be read.
        RecipeError: names that match nothing, and settings that this model cannot follow.
    """
    labels = tuple(f"LABEL_{number}" for number in range(num_labels))
    base = base_of(plan)
    config = load_config(base, labels)
    model = meta_model(base, config)
    problems = list(_model_problems(plan, model))
    targets: dict[str, int] = {}
    reason = ""
    if plan.method.kind == "peft":
        problems += list(_unmatched(plan, model))
        if not problems:
            resolved = adapter_targets(model, plan)
            names = [name for name, _ in model.named_modules()]
            targets, reason = count_matches(names, resolved.modules), resolved.reason
    if problems:
        raise RecipeError([Problem("", key, what) for key, what in problems])
    tied, missing = is_tied(model), missing_weights(base, model) if plan.task.has_labels else set()
    adapted = attach_adapter(model, plan, missing, meta=True)
    if isinstance(adapted, peft.PeftModel):
        if unfit := list(_unfit(plan, adapted)):
            raise RecipeError([Problem("", key, what) for key, what in unfit])
        targets = _real_counts(adapted, targets)
    trainable, total = count_parameters(adapted)
    saved = _saved_modules(adapted, model, plan)
    return Blueprint(config, adapted, trainable, total, targets, reason, saved, _notes(plan, adapted, tied, missing))


def _model_problems(plan: Plan, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    if plan.recipe.training.gradient_checkpointing and not model.supports_gradient_checkpointing:
        yield "training.gradient_checkpointing", f"{type(model).__name__} does not support it"


def _unmatched(plan: Plan, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Every name in the adapter section that matches no module: PEFT passes over most of them in silence."""
    section: Any = plan.recipe.adapter
    assert isinstance(section, LoraSection)
    modules = [name for name, _ in model.named_modules() if name]
    checks = {
        "target_modules": (section.target_modules if section.target_modules != "all-linear" else None, modules),
        "exclude_modules": (section.exclude_modules, modules),
        "modules_to_save": (section.modules_to_save, modules),
        "target_parameters": (section.target_parameters, [name for name, _ in model.named_parameters()]),
    }
    for field, (entries, names) in checks.items():
        if entries is None:
            continue
        for entry, count in count_matches(names, entries).items():
            if count == 0:
                yield f"adapter.{field}", f"`{entry}` matches nothing in {type(model).__name__}{_suggest(entry, names, model)}"
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, field):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules):
                yield (
                    f"adapter.{field}.{pattern}",
                    f"matches nothing in {type(model).__name__}{_suggest(pattern, modules, model)}",
                )
    yield from _bad_indices(section, model)


def _bad_indices(section: LoraSection, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    wanted = section.layers_to_transform
    for index in [wanted] if isinstance(wanted, int) else wanted or []:
        if layers is not None and not 0 <= index < layers:
            yield (
                "adapter.layers_to_transform",
                f"there is no layer {index}; {type(model).__name__} has layers 0 to {layers - 1}",
            )
    tokens = section.trainable_token_indices or []
    embedding = model.get_input_embeddings()
    for index in tokens if isinstance(tokens, list) else [i for part in tokens.values() for i in part]:
        if not 0 <= index < embedding.weight.shape[0]:
            yield "adapter.trainable_token_indices", f"there is no token {index}; the model has {embedding.weight.shape[0]}"
    modules = [name for name, _ in model.named_modules()]
    for name in tokens if isinstance(tokens, dict) else []:
        if not any(matches(module, [name]) for module in modules):
            yield "adapter.trainable_token_indices", f"no embedding is called `{name}`{_suggest(name, modules, model)}"


def _unfit(plan: Plan, adapted: peft.PeftModel) -> Iterator[tuple[str, str]]:
    """Settings that only the adapted layers can tell to be impossible or without effect."""
    section: Any = plan.recipe.adapter
    if section.bias != "none" and not any(_is_base_bias(name) and p.requires_grad for name, p in adapted.named_parameters()):
        what = "the adapted layers have no bias" if section.bias == "lora_only" else "the model has no bias"
        yield "adapter.bias", f"`{section.bias}` has no effect: {what}"
    init = str(section.init_lora_weights).partition("_")[0]
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
    return name.endswith(".bias") and not any(part in name for part in (".lora_", ".modules_to_save."))


def _suggest(entry: str, names: list[str], model: PreTrainedModel) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(entry, leaves, n=1, cutoff=0.7)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    return f"{hint}; its linear layers: {', '.join(linear_leaf_names(model))}"


def _real_counts(adapted: peft.PeftModel, targets: dict[str, int]) -> dict[str, int]:
    """Matches that PEFT really adapted (excluded modules and other layers do not count)."""
    hit = adapted.base_model.targeted_module_names
    counts = {entry: count_matches(hit, entry if len(targets) == 1 else [entry])[entry] for entry in targets}
    if len(targets) == 1:  # a single entry may be a regular expression or a name
        counts = {entry: len(hit) for entry in targets}
    parameters = getattr(adapted.base_model, "targeted_parameter_names", [])
    for entry in adapted.active_peft_config.target_parameters or []:
        counts[entry] = sum(name == entry or name.endswith(f".{entry}") for name in parameters)
    return counts


def _saved_modules(adapted: nn.Module, model: PreTrainedModel, plan: Plan) -> list[str]:
    if isinstance(adapted, peft.PeftModel):
        found = [name for name, module in adapted.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
        return [name.removeprefix("base_model.model.") for name in found]
    return head_modules(model, plan.task) if plan.method.kind == "head" else []


def _notes(plan: Plan, adapted: nn.Module, tied: bool, missing: set[str]) -> list[str]:
    notes = []
    reason = plan.method.not_mergeable_with(plan.recipe.adapter)
    if reason:
        notes.append(f"the adapter cannot be merged: {reason}")
    if isinstance(adapted, peft.PeftModel) and tied:
        embeddings = ("embed_tokens", "lm_head", "wte", "shared", "word_embeddings", "embed_out")
        hit = [name for name in adapted.base_model.targeted_module_names if name.rpartition(".")[2] in embeddings]
        if hit:
            notes.append(
                f"{', '.join(hit)} is tied to another embedding: the adapter works, but merging it would be wrong; "
                "`modules_to_save` or `trainable_token_indices` can be merged"
            )
    if missing:
        notes.append(
            f"the checkpoint has no weights for {', '.join(sorted(missing))}: they start at random and are trained and saved"
        )
    return notes


def parameters_by_module(model: nn.Module) -> list[tuple[str, int, int]]:
    """Rows (module, trainable, all): layers of a stack are summed into one row each name, numbers shown as `*`."""
    rows: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        module = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.").rpartition(".")[0])
        row = rows.setdefault(module, [0, 0])
        row[0] += parameter.numel() * parameter.requires_grad
        row[1] += parameter.numel()
    return [(name, trainable, total) for name, (trainable, total) in rows.items()]
