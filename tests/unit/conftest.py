"""A valid recipe that needs no model on disk, and ways to load it and to collect what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import Problem, RecipeError
from peftkit.recipe import LoadedRecipe, load_recipe

Load = Callable[..., LoadedRecipe]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def load(write_recipe: Callable[..., Path]) -> Load:
    """Load a mapping or text with overrides: `load(recipe, "training.seed=1")`."""
    return lambda content, *overrides: load_recipe(write_recipe(content), overrides)


@pytest.fixture
def problems(load: Load, tmp_path: Path) -> Problems:
    """The problems of a mapping or text; `where` without the folder."""

    def collect(content: Any, *overrides: str) -> list[Problem]:
        with pytest.raises(RecipeError) as caught:
            load(content, *overrides)
        found = caught.value.problems
        return [Problem(p.where.replace(f"{tmp_path}/", ""), p.key, p.what, p.exit_code) for p in found]

    return collect
