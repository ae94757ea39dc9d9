"""Variants of a recipe before they are trained: checked up to the weights, counted, and brought to one number of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftkit.engine.blueprint import draw_blueprint
from peftkit.engine.examples import step_rows
from peftkit.engine.survey import Survey, survey
from peftkit.errors import LoadError, RecipeError
from peftkit.plan import Plan
from peftkit.recipe import LoadedRecipe, load_recipe

MAX_TRIES = 10  # sizes that are counted for one variant
CLOSE = 0.01  # a count this near to the target, as a share of it, is not improved on


def survey_variant(path: Path, overrides: Sequence[str], target: int | None) -> dict[str, Any]:
    """What is known of a variant before a weight is loaded: its parameters, its metric, the size that fits `target`.

    Args:
        path: the recipe.
        overrides: what the variant changes.
        target: trained parameters to come near to; None: leave the size as it is.

    Raises:
        RecipeError, DataError, LoadError: what would stop its runs.
    """
    loaded = load_recipe(path, overrides)
    with loaded.located():
        found = survey(loaded)
    size: dict[str, Any] = {}
    note, blueprint = "", found.blueprint
    if target is not None:
        size, count, note = match_size(found, target)
        blueprint = dataclasses.replace(blueprint, trainable_params=count)
    return {
        "trainable_params": blueprint.trainable_params,
        "all_params": blueprint.all_params,
        "metric": found.plan.task.default_metric_for(found.data.encoding),
        "splits": list(found.data.held_out),
        "size": {f"adapter.{field}": value for field, value in size.items()},
        "size_note": note,
    }


def match_size(found: Survey, target: int) -> tuple[dict[str, Any], int, str]:
    """Fields of the method that train as nearly `target` parameters as it can, their number, and why it is no nearer.

    Counts grow with the size in a straight line for most methods, so that two of them give a guess; each guess is counted, and
    the line drawn anew through the two that are nearest.
    """
    plan, start = found.plan, found.blueprint.trainable_params
    if not plan.method.size_fields:
        return {}, start, "not matched: the method has no size to choose"
    counts: dict[int, int] = {}
    refused: set[int] = set()
    for size in _guesses(plan, target, start, counts, refused):
        try:
            counts[size] = draw_blueprint(sized(plan, size), found.data.encoding.num_outputs, found.tokenizer).trainable_params
        except (RecipeError, LoadError):
            refused.add(size)
    if not counts:
        return {}, start, "not matched: no size but the default one works here"
    best = min(counts, key=lambda size: abs(counts[size] - target))
    gap = counts[best] / target - 1
    note = "" if abs(gap) <= 0.05 else f"matched to {gap:+.0%} only: {plan.method.size_fields[0]} {best} is the nearest"
    return size_values(plan, best), counts[best], note


def _guesses(plan: Plan, target: int, start: int, counts: dict[int, int], refused: set[int]) -> Iterator[int]:
    """Sizes to count, one after the other; `counts` and `refused` have the outcome of those before."""
    first = getattr(plan.recipe.adapter, plan.method.size_fields[0]) or 16
    yield first
    counts.setdefault(first, start)
    yield 2 * first if counts[first] < target else max(1, first // 2)
    for _ in range(MAX_TRIES):
        near = sorted(counts, key=lambda size: abs(counts[size] - target))[:2]
        if abs(counts[near[0]] - target) <= CLOSE * target or len(near) < 2 or counts[near[0]] == counts[near[1]]:
            return
        slope = (counts[near[0]] - counts[near[1]]) / (near[0] - near[1])
        guess = max(1, round(near[0] + (target - counts[near[0]]) / slope))
        tried = counts.keys() | refused
        # What is refused may be odd, or too large: its neighbours, then half the way to the nearest refused one.
        barred = [size for size in refused if (size - near[0]) * (guess - near[0]) > 0]
        halfway = (near[0] + min(barred, key=lambda size: abs(size - near[0]), default=guess)) // 2
        free = [size for size in (guess, guess - 1, guess + 1, halfway) if size > 0 and size not in tried]
        if not free:
            return
        yield free[0]


def size_values(plan: Plan, size: int) -> dict[str, Any]:
    """The fields of a size: the first is the size itself, the others keep their proportion to it."""
    section, (field, *others) = plan.recipe.adapter, plan.method.size_fields
    values: dict[str, Any] = {field: size}
    was = getattr(section, field)
    for other in others:
        value = getattr(section, other)
        scaled = value * size / was
        values[other] = max(1, round(scaled)) if isinstance(value, int) and other.endswith("_r") else scaled
    return values


def sized(plan: Plan, size: int) -> Plan:
    """The plan with an adapter of another size.

    Raises:
        RecipeError: the method does not allow it.
    """
    old = plan.recipe.adapter
    stated = {name: getattr(old, name) for name in old.model_fields_set}
    section = type(old).model_validate(stated | size_values(plan, size))
    for field, what in plan.method.check(section):
        raise RecipeError(f"adapter.{field}: {what}")
    return dataclasses.replace(plan, recipe=plan.recipe.model_copy(update={"adapter": section}))


def steps_for_tokens(loaded: LoadedRecipe, tokens: int) -> int:
    """Steps until so many target tokens are trained on: the order of the rows is known before."""
    found = survey(loaded)
    per_row, training = found.data.sample.column("num_target_tokens"), found.plan.recipe.training
    if not per_row.sum():
        raise RecipeError("--budget tokens: no row has a target token")
    step = 0
    while tokens > 0:
        rows = step_rows(len(per_row), training.batch_size, training.seed, step)
        tokens -= int(per_row[rows].sum())
        step += 1
    return step
