"""What is quantised of a base model, decided before its weights are loaded: by the recipe, by its checkpoint, by its head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from transformers import PreTrainedModel

from peftkit.engine.model import Base, base_of, load_config, meta_model
from peftkit.engine.modules import head_modules
from peftkit.engine.quantized import is_skipped, linear_names
from peftkit.engine.targets import fused_experts, matches
from peftkit.engine.weight_names import missing_weights, weight_names
from peftkit.errors import LoadError, Problem, RecipeError
from peftkit.plan import Choice, Plan, quantized
from peftkit.recipe.quantization import Quantization, check_quantization, quantization_of


def settle_quantization(plan: Plan) -> Plan:
    """The plan with what its checkpoint says of quantisation, and with the layers that must stay as they are.

    Raises:
        RecipeError: the checkpoint is quantised otherwise than the recipe says, or the method cannot be trained on it.
        LoadError: the checkpoint is quantised in a way that cannot be loaded here.
    """
    base = base_of(plan)
    config = load_config(base)
    raw = getattr(config, "quantization_config", None)
    config_json = {"quantization_config": raw if isinstance(raw, dict) else raw.to_dict()} if raw is not None else {}
    found = quantization_of(plan.recipe, config_json)
    if found is None:
        return plan
    problems = list(check_quantization(plan.recipe, config_json))
    if any(code == 7 for _, _, code in problems):
        raise LoadError("; ".join(what for _, what, code in problems if code == 7))
    if problems:
        raise RecipeError([Problem("", key, what) for key, what, _ in problems])
    if found.is_stored:
        choice = Choice("model.quantization", str(found), "config.json says that the weights are stored so")
        plan = dataclasses.replace(plan, choices=(*plan.choices, choice))
    model = meta_model(base, config)
    stored = _stored_layers(base, model) if found.is_stored else set()
    plain = [name for name in linear_names(model) if name not in stored] if stored else []
    skipped = tuple(dict.fromkeys([*_kept(base, model, plan), *plain]))
    found = dataclasses.replace(found, skip_modules=skipped)
    _require_quantizable(base, model, found, stored)
    return quantized(plan, found)


def _kept(base: Base, model: PreTrainedModel, plan: Plan) -> Iterator[str]:
    """Full names of modules that must not be quantised: heads, the output embedding, and all that is trained whole or new."""
    yield from head_modules(model, plan.task)
    yield from sorted({name.rpartition(".")[0] for name in missing_weights(base, model)})
    wanted = getattr(plan.recipe.adapter, "modules_to_save", None) or []
    yield from (name for name, _ in model.named_modules() if name and matches(name, wanted))


def _stored_layers(base: Base, model: PreTrainedModel) -> set[str]:
    """Names of the linear layers that the checkpoint holds quantised, by the model's names for them."""
    marked = {name.rpartition(".weight.")[0] or name.rpartition(".")[0] for name in weight_names(base) or () if _is_mark(name)}
    known = marked | {name.partition(".")[2] for name in marked}  # another class calls its backbone otherwise
    return {name for name in linear_names(model) if {name, name.removeprefix(f"{model.base_model_prefix}.")} & known}


def _is_mark(name: str) -> bool:
    return name.endswith((".weight.absmax", ".SCB", ".qweight"))


def _require_quantizable(base: Base, model: PreTrainedModel, found: Quantization, stored: set[str]) -> None:
    """Raise where nothing would be quantised, or where the checkpoint has quantised what must not be."""
    names = [name for name in linear_names(model) if not is_skipped(name, found)]
    if not names:
        what = f"has no effect: no linear layer of {type(model).__name__} would be quantised"
        raise RecipeError([Problem("", "model.quantization", what)])
    uneven = [name for name in names if model.get_submodule(name).weight.numel() % found.group_size]
    if found.method == "hqq" and uneven:
        size = tuple(model.get_submodule(uneven[0]).weight.shape)
        what = f"is {found.group_size}, into which the weights of `{uneven[0]}` {size} cannot be split"
        raise RecipeError([Problem("", "model.quantization.group_size", what)])
    for name in sorted(stored):
        if is_skipped(name, found):
            raise LoadError(f"`{base.path}` stores `{name}` quantised, so that it cannot be trained or saved whole")


def quantization_notes(plan: Plan, model: PreTrainedModel) -> list[str]:
    """How much of the model is quantised, for the plan."""
    quantization = plan.quantization
    if quantization is None:
        return []
    names = [name for name in linear_names(model) if not is_skipped(name, quantization)]
    count = sum(model.get_submodule(name).weight.numel() for name in names)
    share = 100 * count / sum(parameter.numel() for parameter in model.parameters())
    kept = ", ".join(quantization.skip_modules)
    rest = f"; {kept} and all that is no linear layer stay {plan.dtype}" if kept else f"; all else stays {plan.dtype}"
    experts = "; experts are no linear layers and stay too" if fused_experts(model) else ""
    return [f"{len(names)} linear layers are quantised ({quantization}): {share:.0f}% of the parameters{rest}{experts}"]
