"""`peftkit params`: trainable and all parameters of a recipe, from the model's config alone."""

from __future__ import annotations

from typing import Any

from peftkit import console
from peftkit.engine.blueprint import Blueprint, draw_blueprint, parameters_by_module
from peftkit.engine.data import num_outputs
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.model import base_of, load_config, load_tokenizer
from peftkit.engine.quantizing import settle_quantization
from peftkit.errors import LoadError, Problem, RecipeError
from peftkit.methods import METHODS
from peftkit.plan import Plan, make_plan
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.fit import why_not
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.quantization import why_not_quantized

_COLUMNS = ("method", "trainable_params", "all_params", "trainable_percent", "problem")


def params(loaded: LoadedRecipe, methods: list[str], by_module: bool, as_json: bool) -> None:
    """Print the counts of one recipe, or of one recipe by method."""
    plan = settle_quantization(make_plan(loaded, detect_hardware()))
    if methods:
        _compare(plan, methods, as_json)
        return
    blueprint = draw_blueprint(plan, num_outputs(plan), _tokenizer(plan))
    result = summary(plan, blueprint)
    if as_json:
        console.print_json(result | ({"modules": _modules(blueprint)} if by_module else {}))
        return
    console.print_text(line(result))
    if by_module:
        rows = [(row["module"], row["trainable_params"], row["all_params"]) for row in _modules(blueprint)]
        console.print_table("* stands for every layer", ["module", "trainable", "all"], rows)


def _compare(plan: Plan, methods: list[str], as_json: bool) -> None:
    """The counts of other methods at their default settings; of one that these do not fit here, why."""
    outputs, tokenizer = num_outputs(plan), _tokenizer(plan)
    config, rows = load_config(base_of(plan)).to_dict(), []
    for part in _by_method(plan, methods):
        try:
            if part is not plan:
                _require_fit(part, config)
            result = summary(part, draw_blueprint(part, outputs, tokenizer))
        except RecipeError as error:
            if part is plan:
                raise
            problem = error.problems[0]
            what = f"{problem.key.removeprefix('adapter.')} {problem.what}".strip()
            result = {"method": part.method.name, "task": part.task.name, "problem": what}
        if as_json:
            console.print_json(result)
        rows.append([result.get(key, "") for key in _COLUMNS])
    if not as_json:
        console.print_wide_table("", ["method", "trainable", "all", "%", "problem"], rows)


def _require_fit(plan: Plan, config: dict[str, Any]) -> None:
    """Raise what `validate` would say of the method's default settings."""
    if reason := why_not(plan.method, plan.task.name, config):
        raise RecipeError(reason)
    problems = list(plan.method.check(plan.recipe.adapter))
    if plan.quantization is not None:
        problems += why_not_quantized(plan.method, plan.recipe.adapter, plan.quantization.layers)
    for field, what in problems:
        raise RecipeError([Problem("", f"adapter.{field}", what)])


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
        known = ", ".join(METHODS) + did_you_mean(unknown[0], METHODS)
        raise RecipeError(f"--compare: no method is called `{unknown[0]}`; there are: {known}")
    plans = []
    for name in names:
        section = METHODS[name].section.model_validate({"method": name})
        other = Plan(**(plan.__dict__ | {"recipe": plan.recipe.model_copy(update={"adapter": section})}))
        plans.append(plan if name == plan.method.name else other)
    return plans
