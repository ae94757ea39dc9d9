"""`peftkit params`: trainable and all parameters of a recipe, from the model's config alone."""

from __future__ import annotations

from typing import Any

from peftkit import console
from peftkit.engine.blueprint import Blueprint, draw_blueprint, parameters_by_module
from peftkit.engine.data import num_outputs
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.model import load_tokenizer
from peftkit.errors import LoadError, RecipeError
from peftkit.methods import METHODS
from peftkit.plan import Plan, make_plan
from peftkit.recipe import LoadedRecipe


def params(loaded: LoadedRecipe, methods: list[str], by_module: bool, as_json: bool) -> None:
    """Print the counts of one recipe, or of one recipe by method."""
    plan = make_plan(loaded, detect_hardware())
    outputs = num_outputs(plan)
    plans = _by_method(plan, methods) if methods else [plan]
    tokenizer = _tokenizer(plan)
    blueprints = [draw_blueprint(part, outputs, tokenizer) for part in plans]
    results = [summary(part, blueprint) for part, blueprint in zip(plans, blueprints, strict=True)]
    if as_json:
        for result, blueprint in zip(results, blueprints, strict=True):
            modules = {"modules": _modules(blueprint)} if by_module else {}
            console.print_json(result | modules)
        return
    if methods:
        rows = [(r["method"], r["trainable_params"], r["all_params"], r["trainable_percent"]) for r in results]
        console.print_table("", ["method", "trainable", "all", "%"], rows)
    else:
        console.print_text(line(results[0]))
    for blueprint in blueprints if by_module else []:
        module_rows = [(row["module"], row["trainable_params"], row["all_params"]) for row in _modules(blueprint)]
        console.print_table("* stands for every layer", ["module", "trainable", "all"], module_rows)


def _tokenizer(plan: Plan) -> Any:
    """The model's tokenizer where it has one: counting needs only its config, except for methods that are given text."""
    try:
        return load_tokenizer(plan)
    except LoadError:
        return None


def summary(plan: Plan, blueprint: Blueprint) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "trainable_params": blueprint.trainable_params,
        "all_params": blueprint.all_params,
        "trainable_percent": blueprint.trainable_percent,
        "method": plan.method.name,
        "task": plan.task.name,
    }


def line(result: dict[str, Any]) -> str:
    """The line of PEFT's `print_trainable_parameters`."""
    return (
        f"trainable params: {result['trainable_params']} || all params: {result['all_params']} || "
        f"trainable%: {result['trainable_percent']:.4f}"
    )


def _modules(blueprint: Blueprint) -> list[dict[str, Any]]:
    rows = parameters_by_module(blueprint.model)
    return [{"module": name, "trainable_params": trainable, "all_params": total} for name, trainable, total in rows]


def _by_method(plan: Plan, names: list[str]) -> list[Plan]:
    """The plan with other methods, each at its default settings; the recipe's own keeps its settings."""
    if unknown := [name for name in names if name not in METHODS]:
        raise RecipeError(f"--compare: no method is called `{unknown[0]}`; there are: {', '.join(METHODS)}")
    plans = []
    for name in names:
        section = plan.recipe.adapter if name == plan.method.name else METHODS[name].section(method=name)  # type: ignore[call-arg]
        plans.append(Plan(**(plan.__dict__ | {"recipe": plan.recipe.model_copy(update={"adapter": section})})))
    return plans
