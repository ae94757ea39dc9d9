"""What a plan means for its model, found on the meta device before any weight is loaded: targets, counts, problems."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peftkit.engine.adapter import adapter_targets, attach_adapter, count_parameters, modules_to_save, targeted
from peftkit.engine.checks import ill_fitting, model_problems, unfit, unmatched
from peftkit.engine.fast import why_not_split
from peftkit.engine.hooks import Context
from peftkit.engine.model import base_of, load_config, meta_model
from peftkit.engine.modules import is_tied
from peftkit.engine.quantizing import quantization_notes
from peftkit.engine.targets import count_matches, fused_experts
from peftkit.engine.tensor_parallel import indivisible
from peftkit.engine.weight_names import missing_weights
from peftkit.errors import Problem, RecipeError
from peftkit.plan import Plan
from peftkit.recipe.quantization import why_not_plain
from peftkit.tasks.encoding import Encoding


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


def draw_blueprint(plan: Plan, num_labels: int = 0, tokenizer: Any = None, *, total_steps: int | None = None) -> Blueprint:
    """Build the model and its adapter on the meta device and check every name that the recipe mentions.

    Args:
        plan: the plan.
        num_labels: classes of a classifier, where they are known already.
        tokenizer: the model's, for methods that are given text.
        total_steps: optimizer steps of the run, where they are known, for methods that have a schedule of their own.

    Raises:
        LoadError: the model's config cannot be read.
        RecipeError: names that match nothing, and settings that this model cannot follow.
    """
    base = base_of(plan)
    config = load_config(base, Encoding(max_length=1, labels=tuple(f"LABEL_{number}" for number in range(num_labels))))
    model = meta_model(base, config)
    problems = [*model_problems(plan, model), *why_not_split(plan, model)]
    targets: dict[str, int] = {}
    reason = ""
    if "target_modules" in type(plan.recipe.adapter).model_fields:
        problems += list(unmatched(plan, model))
        if not problems:
            resolved = adapter_targets(model, plan)
            names = [name for name, _ in model.named_modules()]
            targets, reason = count_matches(names, resolved.modules), resolved.reason
            problems += list(ill_fitting(plan, model, resolved))
            if plan.hardware.divided_by > 1:
                problems += indivisible(model, plan.hardware.divided_by, targeted(plan, model, resolved, names))
    _refuse(problems)
    notes = quantization_notes(plan, model) + _expert_notes(plan, model)
    absent = missing_weights(base, model)  # looked for with every task: the hub may have no weights that can be loaded
    tied, missing = is_tied(model), absent if plan.task.has_head else set()
    adapted = attach_adapter(model, missing, Context(plan, tokenizer=tokenizer, total_steps=total_steps))
    if isinstance(adapted, peft.PeftModel):
        _refuse(list(unfit(plan, adapted)))
        targets = _real_counts(adapted, targets)
    trainable, total = count_parameters(adapted)
    saved = _saved_modules(adapted, model, plan)
    return Blueprint(config, adapted, trainable, total, targets, reason, saved, notes + _notes(plan, adapted, tied, missing))


def _refuse(problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        raise RecipeError([Problem("", key, what) for key, what in problems])


def _real_counts(adapted: peft.PeftModel, targets: dict[str, int]) -> dict[str, int]:
    """Matches that PEFT really adapted (excluded modules and other layers do not count)."""
    hit = getattr(adapted.base_model, "targeted_module_names", None)
    counts = targets
    if len(targets) == 1 and hit:  # a single entry may be a regular expression or a name
        counts = {entry: len(hit) for entry in targets}
    elif hit:
        counts = {entry: count_matches(hit, [entry])[entry] for entry in targets}
    parameters = getattr(adapted.base_model, "targeted_parameter_names", [])
    for entry in getattr(adapted.active_peft_config, "target_parameters", None) or []:
        counts[entry] = sum(name == entry or name.endswith(f".{entry}") for name in parameters)
    return counts


def _saved_modules(adapted: nn.Module, model: PreTrainedModel, plan: Plan) -> list[str]:
    if isinstance(adapted, peft.PeftModel):
        found = [name for name, module in adapted.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
        return [name.removeprefix("base_model.model.") for name in found]
    return [] if plan.method.stands_alone else modules_to_save(model, set(), plan)


def _expert_notes(plan: Plan, model: PreTrainedModel) -> list[str]:
    """What default targets leave out where the experts are no linear layers."""
    section: Any = plan.recipe.adapter
    if getattr(section, "target_modules", "") not in (None, "all-linear") or getattr(section, "target_parameters", None):
        return []
    experts = fused_experts(model)
    what = f"the experts of {type(model).__name__} are parameters, not linear layers, and stay as they are"
    return [f"{what}; LoRA reaches them by `target_parameters: [{', '.join(experts)}]`"] if experts else []


def _notes(plan: Plan, adapted: nn.Module, tied: bool, missing: set[str]) -> list[str]:
    notes = []
    reason = plan.method.not_mergeable or plan.method.not_mergeable_with(plan.recipe.adapter)
    reason = reason or why_not_plain(plan.quantization)
    if reason:
        notes.append(f"the adapter cannot be merged: {reason}")
    if isinstance(adapted, peft.PeftModel) and tied:
        embeddings = ("embed_tokens", "lm_head", "wte", "shared", "word_embeddings", "embed_out")
        targeted = getattr(adapted.base_model, "targeted_module_names", [])
        hit = [name for name in targeted if name.rpartition(".")[2] in embeddings]
        if hit:
            notes.append(
                f"{', '.join(hit)} is tied to another embedding, which is not adapted: the merged model will have "
                "one more matrix of that size; `trainable_token_indices` keeps the two tied"
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
