"""Sizes of methods that train as many parameters as another."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkit.engine.sizes import survey_variant
from peftkit.errors import RecipeError
from tests.runs import tiny_recipe

TARGET = 3000


@pytest.fixture(scope="module")
def recipe(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on the tiny Llama."""
    return tiny_recipe("CAUSAL_LM", models_dir, tmp_path_factory.mktemp("sizes"))


@pytest.mark.parametrize("method", ["lora", "adalora", "hra", "loha", "prefix_tuning", "bottleneck", "p_tuning"])
def test_the_chosen_size_trains_about_as_many_parameters(recipe: Path, method: str) -> None:
    changes = [f"adapter.method={method}"]
    found = survey_variant(recipe, changes, TARGET)
    assert (abs(found["trainable_params"] / TARGET - 1) < 0.12, bool(found["size"])) == (True, True), found
    sized = [*changes, *(f"{key}={value}" for key, value in found["size"].items())]
    assert survey_variant(recipe, sized, None)["trainable_params"] == found["trainable_params"]


def test_scales_that_are_divided_by_the_rank_go_with_it(recipe: Path) -> None:
    size = survey_variant(recipe, [], TARGET)["size"]
    assert size["adapter.lora_alpha"] / size["adapter.r"] == 2  # as in the recipe: 8 / 4


def test_what_cannot_come_near_says_so(recipe: Path) -> None:
    found = survey_variant(recipe, ["adapter.method=loha"], 10)
    assert found["size"]["adapter.r"] == 1
    assert found["size_note"].startswith("matched to +")
    most = survey_variant(recipe, ["adapter.method=fourierft", "adapter.n_frequency=100"], TARGET)
    assert 475 <= most["size"]["adapter.n_frequency"] <= 512  # as many as the smallest weight has
    assert survey_variant(recipe, ["adapter.method=ia3"], 10)["size_note"].startswith("not matched: the method has no size")


def test_a_variant_that_cannot_work_is_told_before_the_weights(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter.target_modules.*nowhere"):
        survey_variant(recipe, ["adapter.target_modules=[nowhere]"], None)
