"""A valid recipe that needs no model on disk, and ways to load it and to collect what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import Problem, RecipeError
from peftkit.recipe import LoadedRecipe, load_recipe
from tests.conftest import write_jsonl

ROWS: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": {"instruction": "hello", "output": "hi"},
    "SEQ_2_SEQ_LM": {"source": "hello", "target": "hi"},
    "SEQ_CLS": {"text": "hello", "label": "greeting"},
}
Load = Callable[..., LoadedRecipe]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A valid recipe as a mapping; its model is a name on the hub, which validation does not look up."""
    write_jsonl(tmp_path / "train.jsonl", [ROWS["CAUSAL_LM"]])
    return {
        "task": "CAUSAL_LM",
        "model": {"name_or_path": "owner/name"},
        "adapter": {"method": "lora", "r": 4},
        "data": {"train": "train.jsonl", "validation": 0.1},
    }


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
