"""`peftkit init`: a commented starter recipe."""

from __future__ import annotations

from pathlib import Path

from peftkit import console
from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.recipe.fit import methods_for, why_not
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.starter import starter_recipe
from peftkit.run import write_text
from peftkit.tasks import TASKS


def init(path: Path, task: str, method: str, model: str | None, force: bool) -> None:
    """Write a commented starter recipe."""
    if task.upper() not in TASKS:
        raise RecipeError(f"--task: no task is called `{task}`; there are: {', '.join(TASKS)}")
    if method.lower() not in METHODS:
        known = ", ".join(METHODS) + did_you_mean(method, METHODS)
        raise RecipeError(f"--method: no method is called `{method}`; there are: {known}")
    if reason := why_not(METHODS[method.lower()], task.upper(), {}):
        raise RecipeError(f"--method: {reason}. These do: {', '.join(methods_for(task.upper(), {}))}")
    if path.exists() and not force:
        raise RecipeError(f"{path} exists already; name another file, or add --force to replace it")
    write_text(path, starter_recipe(TASKS[task.upper()], METHODS[method.lower()], model))
    console.print_text(f"{path} written; put your rows into `data.train`, then: peftkit validate {path}")
