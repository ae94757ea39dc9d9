"""What a comparison is made of: variants, intervals, the Pareto front; without a trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkit.comparison.file import Comparison, Sweep, read_experiment, values_of
from peftkit.comparison.result import interval, mark_pareto
from peftkit.comparison.variants import grid_of, make_variant, make_variants, override_text, overrides_of, wanted_of
from peftkit.errors import RecipeError
from peftkit.launch import require_room, visible_gpus
from peftkit.methods import METHODS
from peftkit.recipe import load_recipe
from tests.unit.conftest import Load


def test_the_interval_is_student_s(recwarn: Any) -> None:
    found = interval([0.70, 0.74, 0.72])
    # t(0.975, 2) = 4.302653 (tables), s = 0.02, n = 3
    assert (found["mean"], found["high"] - found["mean"]) == pytest.approx((0.72, 4.302653 * 0.02 / 3**0.5))
    assert interval([0.7]) == {"mean": 0.7, "low": None, "high": None, "values": [0.7]}


def entry(accuracy: float | None, params: int, memory: int) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "trainable_params": params, "peak_memory_bytes": memory}
    return {"summary": {name: {"mean": value} for name, value in figures.items() if value is not None}}


def test_the_pareto_front_is_what_nothing_beats() -> None:
    variants = [
        entry(0.9, 100, 10),
        entry(0.8, 50, 10),
        entry(0.8, 60, 10),
        entry(0.7, 50, 9),
        entry(None, 1, 1),
        entry(0.9, 100, 10),
    ]
    mark_pareto(variants, "accuracy", greater_is_better=True)
    assert [variant["pareto"] for variant in variants] == [True, True, False, True, False, True]
    mark_pareto(variants, "accuracy", greater_is_better=False)
    assert [variant["pareto"] for variant in variants] == [False, False, False, True, False, False]


def test_where_an_adapter_goes_is_carried_over_to_methods_with_the_same_places(load: Load, recipe: dict[str, Any]) -> None:
    recipe["adapter"] |= {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    base = load(recipe).recipe
    vera, ia3 = ({"adapter.method": name} for name in ("vera", "ia3"))
    own_rate = {"training.learning_rate": "auto"}
    saved = {"adapter.modules_to_save": ["lm_head"]}
    assert overrides_of(base, vera) == vera | {"adapter.target_modules": ["q_proj"]} | saved | own_rate
    assert overrides_of(base, ia3) == ia3 | saved | own_rate
    assert next(iter(overrides_of(base, ia3 | {"adapter.target_modules": ["k"]}))) == "adapter.method"
    assert overrides_of(base, {"adapter.method": "LoRA", "adapter.r": 2}) == {"adapter.r": 2}


def test_a_stated_rate_wins_over_the_method_s_own(load: Load, recipe: dict[str, Any]) -> None:
    loaded = load(recipe | {"training": {"learning_rate": 3e-4}})
    stated = {"adapter.method": "ia3", "training.learning_rate": 0.5}
    rates = [make_variant(loaded, "v", keys) for keys in ({}, {"adapter.method": "ia3"}, stated)]
    assert [variant.learning_rate for variant in rates] == [3e-4, METHODS["ia3"].learning_rate, 0.5]
    assert [variant.learning_rate_source.partition(" (")[0] for variant in rates] == [
        "the recipe",
        "PEFT's method comparison",
        "the variant",
    ]


def test_an_override_is_read_back_as_it_was(load: Load, recipe: dict[str, Any]) -> None:
    values = {"adapter.r": 3, "training.learning_rate": 1e-5, "data.packing": False, "adapter.target_modules": ["a: b", "1e3"]}
    found = load(recipe, *(override_text(key, value) for key, value in values.items())).recipe
    assert (found.adapter.r, found.training.learning_rate, found.data.packing) == (3, 1e-5, False)
    assert found.adapter.target_modules == ["a: b", "1e3"]


def test_an_override_of_the_length_replaces_the_other_way_to_say_it(load: Load, recipe: dict[str, Any]) -> None:
    found = load(recipe | {"training": {"num_train_epochs": 2}}, "training.max_steps=9").recipe.training
    assert (found.max_steps, found.num_train_epochs) == (9, 3.0)
    assert load(recipe | {"training": {"max_steps": 2}}, "training.num_train_epochs=1").recipe.training.max_steps is None
    with pytest.raises(RecipeError, match="has no effect beside `max_steps`"):
        load(recipe, "training.num_train_epochs=1", "training.max_steps=9")


def test_a_grid_is_every_combination_with_a_name_that_says_it() -> None:
    found = grid_of({"adapter.r": [2, 4], "training.learning_rate": [1e-4], "adapter.target_modules": [["q", "v"]]})
    assert list(found) == [
        "000_r-2_learning_rate-0.0001_target_modules-q-v",
        "001_r-4_learning_rate-0.0001_target_modules-q-v",
    ]
    assert found["001_r-4_learning_rate-0.0001_target_modules-q-v"]["adapter.r"] == 4
    assert values_of("1e-4,[q],[q,v]") == [1e-4, ["q"], ["q", "v"]]
    assert wanted_of([" LoRA", ""], {"big": {"adapter.r": 64}}) == {
        "lora": {"adapter.method": "lora"},
        "big": {"adapter.r": 64},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("compare: {recipe: r.yaml, methods: [lora], seed: 3}", "compare.yaml:1: seed: no such key"),
        ("compare: {recipe: r.yaml, methods: [lora], seeds: 0}", "seeds: Input should be greater than 0"),
        ("compare: {recipe: r.yaml, methods: [lora], seeds: [1, 1]}", "names a seed twice"),
        ("compare: {recipe: r.yaml, methods: [lora], budget: {steps: 3, tokens: 4}}", "takes one of steps, tokens, seconds"),
        ("compare: {recipe: r.yaml, methods: [lora], budget: {step: 3}}", "did you mean `steps`?"),
        ("compare: {recipe: r.yaml, methods: [lora], variants: {lora: {adapter.r: 2}}}", "are called like methods"),
        ("compare: {recipe: r.yaml, variants: {a b: {adapter.r: 2}}}", "should match pattern"),
        ("compare: {recipe: none.yaml, methods: [lora]}", "there is no file `none.yaml`"),
        ("compare: [lora]", "takes a mapping with the keys recipe"),
        ("compare: {recipe: r.yaml}\ntask: CAUSAL_LM", "beside `compare` there can be nothing else; found task"),
        ("sweep: {recipe: r.yaml}", "is a file for `peftkit sweep`"),
    ],
)
def test_a_file_that_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text("task: CAUSAL_LM")
    (tmp_path / "compare.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_experiment(tmp_path / "compare.yaml", Comparison, {})
    assert words in str(caught.value)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("task: CAUSAL_LM")
    (tmp_path / "s.yaml").write_text("sweep: {recipe: r.yaml, grid: {adapter.r: [2]}, seeds: 5}")
    found = read_experiment(tmp_path / "s.yaml", Sweep, {"seeds": [7], "grid": {}, "metric": None})
    assert (found.seeds, found.grid, found.recipe) == ([7], {"adapter.r": [2]}, str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].size_fields])
def test_the_size_of_a_method_is_a_whole_number_of_its_section(name: str) -> None:
    method = METHODS[name]
    fields = method.section.model_fields
    assert set(method.size_fields) <= set(fields)
    start = dict.fromkeys(method.size_fields[:1], 4)
    assert getattr(method.section.model_validate({"method": name} | start), method.size_fields[0]) == 4


def test_every_trial_at_once_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFTKIT_DEVICE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ["2", "5"]
    with pytest.raises(RecipeError, match="there are 2; use 2"):
        require_room(3)
    monkeypatch.setenv("PEFTKIT_DEVICE", "cpu")
    require_room(3)


def test_best_yaml_and_the_like_are_recipes_of_their_own(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    loaded = load(recipe)
    assert (
        load_recipe(loaded.path, make_variant(loaded, "head", {"adapter.method": "head"}).texts()).recipe.adapter.method
        == "head"
    )


def test_the_file_in_the_guide_is_a_valid_one(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    guide = Path(__file__).parents[2] / "docs" / "comparing.md"
    loaded = load(recipe)
    (tmp_path / "file.yaml").write_text(guide.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0])
    found = read_experiment(tmp_path / "file.yaml", Comparison, {})
    variants, refused = make_variants(loaded, wanted_of(found.methods, found.variants), skip_refused=False)
    assert ([variant.name for variant in variants], refused) == (["ia3", "full", "lora-r4", "dora", "ia3-slow"], {})
    assert {variant.name: variant.learning_rate for variant in variants}["ia3-slow"] == 5e-3
