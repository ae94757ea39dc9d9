"""Variants of a recipe: which keys each of them changes, checked as recipes before anything is started."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.comparison.file import Budget
from peftkit.errors import Problem, RecipeError
from peftkit.methods import METHODS
from peftkit.recipe import LoadedRecipe, Recipe, load_recipe
from peftkit.recipe.load import did_you_mean

# Where an adapter goes is carried over to methods that go to the same places by default; whole modules to every method.
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_DECIDED_HERE = {"training.seed": "seeds", "name": "its name", "output.dir": "--output"}
_LENGTH = ("training.max_steps", "training.num_train_epochs")


@dataclass(frozen=True)
class Variant:
    """One column of a comparison.

    Attributes:
        name: its folder.
        method: the adapter method.
        overrides: dotted key -> value.
        learning_rate: the peak learning rate that it is trained with.
        learning_rate_source: who says so.
        stated: the part of `overrides` that was asked for.
    """

    name: str
    method: str
    overrides: Mapping[str, Any]
    learning_rate: float
    learning_rate_source: str
    stated: Mapping[str, Any]

    def texts(self, common: Iterable[str] = (), **further: Any) -> list[str]:
        """What `--set` takes: first the changes common to all, then its own, then further ones (`__` for a dot)."""
        own = dict(self.overrides) | {key.replace("__", "."): value for key, value in further.items()}
        return [*common, *(override_text(key, value) for key, value in own.items())]


def override_text(key: str, value: Any) -> str:
    """An override as `--set` takes it; JSON is YAML."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def overrides_of(recipe: Recipe, stated: Mapping[str, Any]) -> dict[str, Any]:
    """All that a variant changes: what is stated and, where that is another method, what goes with it.

    Another method has its own learning rate, and of the recipe's adapter only what means the same to both.
    """
    own = recipe.adapter.method
    name = str(stated.get("adapter.method", own)).lower()
    if name not in METHODS:
        raise RecipeError(f"no method is called `{name}`; there are: {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    if name == own:
        return {key: value for key, value in stated.items() if key != "adapter.method"}
    places = _PLACES if METHODS[own].targets and METHODS[own].targets == METHODS[name].targets else ()
    fields = [field for field in (*places, "modules_to_save") if field in METHODS[name].section.model_fields]
    written = [field for field in fields if field in recipe.adapter.model_fields_set]
    carried = {f"adapter.{field}": getattr(recipe.adapter, field) for field in written}
    # The method first: it takes the fields of the other one away.
    return {"adapter.method": name} | carried | {"training.learning_rate": "auto"} | dict(stated) | {"adapter.method": name}


def make_variant(loaded: LoadedRecipe, name: str, stated: Mapping[str, Any]) -> Variant:
    """One variant of a recipe.

    Raises:
        RecipeError: with everything that is wrong with it as a recipe.
    """
    if wrong := [f"`{key}` is decided by {by}" for key, by in _DECIDED_HERE.items() if key in stated]:
        raise RecipeError("; ".join(wrong))
    overrides = overrides_of(loaded.recipe, stated)
    changed = load_recipe(loaded.path, [*loaded.overrides, *(override_text(key, value) for key, value in overrides.items())])
    rate, source = changed.recipe.training.learning_rate, "the recipe"
    method = METHODS[changed.recipe.adapter.method]
    if rate == "auto":
        rate, source = method.learning_rate_for(changed.recipe.task)
    elif "training.learning_rate" in overrides:
        source = "the variant"
    return Variant(name, method.name, overrides, float(rate), source, dict(stated))


def make_variants(
    loaded: LoadedRecipe, wanted: Mapping[str, Mapping[str, Any]], *, skip_refused: bool
) -> tuple[list[Variant], dict[str, str]]:
    """The variants, and those that cannot work with the reason.

    Raises:
        RecipeError: with the reasons of all that cannot work, unless they are to be skipped.
    """
    variants, refused, problems = [], {}, []
    for name, stated in wanted.items():
        try:
            variants.append(make_variant(loaded, name, stated))
        except RecipeError as error:
            refused[name] = "; ".join(f"{problem.key}: {problem.what}".removeprefix(": ") for problem in error.problems)
            problems += [Problem(f"variant `{name}`", found.key, found.what, found.exit_code) for found in error.problems]
    if problems and not (skip_refused and variants):
        raise RecipeError(problems)
    return variants, refused


def wanted_of(methods: Sequence[str], variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> keys: the methods, then the variants."""
    names = [method.strip().lower() for method in methods if method.strip()]
    return {name: {"adapter.method": name} for name in names} | {name: dict(stated) for name, stated in variants.items()}


def grid_of(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Name -> keys: every combination of the values."""
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return {name_of(values, number): values for number, values in enumerate(combinations)}


def name_of(values: Mapping[str, Any], number: int) -> str:
    """A folder's name that says what is in it: `003_r-8_learning_rate-0.001`."""
    parts = [f"{number:03}"]
    for key, value in values.items():
        text = re.sub(r"[^\w.\-]+", "-", f"{value:.4g}" if isinstance(value, float) else str(value)).strip("-")
        parts.append(f"{key.rpartition('.')[2]}-{text}"[:40])
    return "_".join(parts)[:120]


def check_recipe(loaded: LoadedRecipe, budget: Budget | None, metric: str | None) -> None:
    """Refuse a recipe whose trials would not end, or could not be compared.

    Raises:
        RecipeError: with what is in the way.
    """
    from peftkit.tasks import TASKS

    recipe, problems = loaded.recipe, []
    metrics = TASKS[recipe.task].metrics
    if recipe.training.max_seconds is not None:
        what = "would leave every trial unfinished; leave it out, `--budget seconds N` gives each the same time"
        problems.append(loaded.problem("training.max_seconds", what))
    if recipe.data is not None and recipe.data.validation is None and recipe.data.test is None:
        problems.append(loaded.problem("data", "has neither `validation` nor `test`: nothing could be compared"))
    if budget is not None and budget.tokens is not None and recipe.data is not None and recipe.data.streams:
        problems.append(loaded.problem("data.train", "is a stream, whose tokens are not known before; use `--budget steps N`"))
    if metric is not None and metric not in metrics:
        what = f"--metric {metric}: {recipe.task} has {', '.join(metrics)}{did_you_mean(metric, metrics)}"
        problems.append(Problem("", "", what))
    if problems:
        raise RecipeError(problems)


def refuse_lengths(wanted: Mapping[str, Mapping[str, Any]], budget: Budget | None) -> None:
    """Refuse variants that say how long they train where a budget says it."""
    wrong = [(name, key) for name, stated in wanted.items() for key in _LENGTH if key in stated]
    if budget is not None and wrong:
        raise RecipeError([Problem(f"variant `{name}`", key, "has no effect beside the budget") for name, key in wrong])


def list_seeds(seeds: int | list[int], first: int) -> list[int]:
    """The seeds: as many as that, from the recipe's own on, or those named."""
    return list(range(first, first + seeds)) if isinstance(seeds, int) else seeds


def load_base(path: str, common: Sequence[str]) -> LoadedRecipe:
    """The recipe that is varied."""
    return load_recipe(Path(path), common)
