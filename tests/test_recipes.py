"""Every shipped recipe is a valid one: schema, rules and the files that it names."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from peftkit.methods import METHODS
from peftkit.recipe import load_recipe
from peftkit.recipe.paths import EMBEDDED_MODELS
from peftkit.recipe.yaml_file import read_yaml
from tests.conftest import write_adapter

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_there_are_shipped_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_shipped_recipe_is_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = read_yaml(path)[0]
    monkeypatch.chdir(tmp_path)  # where the adapters are that a recipe builds on
    for key, kind in METHODS[content["adapter"]["method"]].reads_adapters.items():
        names = content["adapter"].get(key, [])
        for name in [names] if isinstance(names, str) else names:
            write_adapter(tmp_path / name, kind)
    module = EMBEDDED_MODELS.get(content["model"]["name_or_path"])
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip("its embedded model is not installed")
    assert load_recipe(path).recipe.name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_shipped_recipe_says_what_to_expect_and_how_to_run_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").splitlines()[:8]
    for word in ("What:", "Expect:", "Needs:", "Run:"):
        assert any(line.startswith(f"# {word}") for line in head), word
    assert any(f"peftkit train recipes/{path.name}" in line for line in head)
