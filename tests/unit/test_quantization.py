"""Quantised bases without torch: which settings, methods and checkpoints go together, and what the plan decides."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.plan import Hardware, make_plan, quantized
from peftkit.recipe import load_recipe
from peftkit.recipe.fit import why_not
from peftkit.recipe.quantization import quantization_of, stored_quantization
from peftkit.resolved import resolved_yaml
from tests.unit.conftest import Load, Problems
from tests.unit.test_plan import CPU, GPU, MPS, OLD_GPU

STORED = {
    "4bit": {
        "load_in_4bit": True,
        "quant_method": "bitsandbytes",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "8bit": {"load_in_8bit": True, "load_in_4bit": False, "quant_method": "bitsandbytes"},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
}  # fmt: skip


def quantised(recipe: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The recipe with a quantised base."""
    return recipe | {"model": recipe["model"] | {"quantization": settings}}


@pytest.fixture
def stored(tmp_path: Path, recipe: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The recipe on a local model whose weights are quantised already, as `stored("4bit", quantization={...})`."""

    def build(kind: str, **model: Any) -> dict[str, Any]:
        (tmp_path / "model").mkdir()
        config = {"model_type": "llama", "quantization_config": STORED[kind]}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return recipe | {"model": {"name_or_path": "./model", **model}}

    return build


@pytest.mark.parametrize(
    ("settings", "key", "what"),
    [
        ({"bits": 3}, "bits", "is 3; PEFT trains on layers of bitsandbytes with 4 or 8 bits"),
        ({"bits": 8, "quant_type": "fp4"}, "quant_type", "has no effect with `method: bitsandbytes` and `bits: 8`"),
        ({"bits": 8, "double_quant": False}, "double_quant", "has no effect"),
        ({"bits": 8, "compute_dtype": "bfloat16"}, "compute_dtype", "has no effect"),
        ({"bits": 8, "quant_storage": "bfloat16"}, "quant_storage", "has no effect"),
        ({"bits": 4, "llm_int8_threshold": 3.0}, "llm_int8_threshold", "has no effect"),
        ({"bits": 4, "group_size": 32}, "group_size", "has no effect"),
        ({"bits": 4, "method": "torchao"}, "bits", "is 4; PEFT trains on layers of torchao with 8 bits"),
    ],
)
def test_a_setting_without_effect_is_refused(
    problems: Problems, recipe: dict[str, Any], settings: dict[str, Any], key: str, what: str
) -> None:
    (found,) = problems(quantised(recipe, **settings))
    assert (found.key, found.exit_code) == (f"model.quantization.{key}", 2)
    assert what in found.what


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "hqq"])
def test_a_missing_package_is_named_with_its_command(
    problems: Problems, recipe: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (found,) = problems(quantised(recipe, method=method, bits=8))
    assert found.what == f"{method} needs {method}; `pip install {method}` adds what is missing"


LEFT_OUT = [(name, bits) for name, method in METHODS.items() for bits in (4, 8) if f"{bits}bit" not in method.trains_on]


@pytest.mark.parametrize(("name", "bits"), LEFT_OUT)
def test_a_method_that_a_quantised_base_breaks_is_refused_with_the_reason(
    problems: Problems, recipe: dict[str, Any], name: str, bits: int
) -> None:
    adapter = {"method": name} | ({"adapters": ["a"]} if name == "xlora" else {})
    found = [problem for problem in problems(quantised(recipe, bits=bits) | {"adapter": adapter}) if "layers" in problem.what]
    assert METHODS[name].why_not_quantized
    assert METHODS[name].why_not_quantized in found[0].what
    assert "These do: lora, " in found[0].what


@pytest.mark.parametrize(
    ("field", "value", "bits"),
    [
        *[
            ("init_lora_weights", init, 4)
            for init in ("pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "corda", "lora_ga")
        ],
        ("kasa_config", {}, 4),
        ("monteclora_config", {}, 8),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}, 4),
        ("velora_config", {}, 8),
        ("use_dora", True, 8),
    ],
)
def test_choices_of_lora_that_quantised_layers_ignore_or_break_are_refused(
    problems: Problems, recipe: dict[str, Any], field: str, value: Any, bits: int
) -> None:
    (found,) = problems(quantised(recipe, bits=bits) | {"adapter": {"method": "lora", "r": 4, field: value}})
    assert found.key.startswith(f"adapter.{field}")


def test_dora_and_eva_are_allowed_on_four_bits(load: Load, recipe: dict[str, Any]) -> None:
    for field, value in {"use_dora": True, "init_lora_weights": "eva"}.items():
        load(quantised(recipe, bits=4) | {"adapter": {"method": "lora", field: value}})


@pytest.mark.parametrize(
    ("stated", "key"),
    [
        ({"bits": 8}, "bits"),
        ({"bits": 4, "quant_type": "fp4"}, "quant_type"),
        ({"bits": 4, "double_quant": False}, "double_quant"),
    ],
)
def test_a_recipe_that_states_another_quantisation_than_the_checkpoint_is_refused(
    problems: Problems, stored: Callable[..., dict[str, Any]], stated: dict[str, Any], key: str
) -> None:
    found = problems(stored("4bit", quantization=stated))[0]
    assert found.key == f"model.quantization.{key}"
    assert "the weights are quantised already: bitsandbytes, 4 bits (nf4, double)" in found.what


def test_a_recipe_may_state_what_the_checkpoint_has(load: Load, stored: Callable[..., dict[str, Any]]) -> None:
    load(stored("4bit", quantization={"bits": 4, "compute_dtype": "bfloat16"}))


def test_a_method_is_refused_on_a_checkpoint_that_is_quantised(
    problems: Problems, stored: Callable[..., dict[str, Any]]
) -> None:
    (found,) = problems(stored("8bit") | {"adapter": {"method": "unilora"}})
    assert "makes its gradient zero" in found.what


@pytest.mark.parametrize(("kind", "what"), [("gptq", "pip install gptqmodel optimum"), ("fp8", "quantised by `fp8`")])
def test_a_checkpoint_that_cannot_be_loaded_here_is_refused_as_a_model(
    problems: Problems, stored: Callable[..., dict[str, Any]], kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (found,) = problems(stored(kind))
    assert (found.key, found.exit_code) == ("model.name_or_path", 7)
    assert what in found.what


def test_random_weights_are_not_those_of_a_quantised_checkpoint(load: Load, stored: Callable[..., dict[str, Any]]) -> None:
    load(stored("fp8", init="random"))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_what_a_config_says_of_its_weights_is_read(kind: str) -> None:
    found = stored_quantization({"quantization_config": STORED[kind]})
    assert found is not None
    assert (found.layers, found.is_stored, found.double_quant) == (kind, True, True)


@pytest.mark.parametrize(
    ("hardware", "overrides", "dtype"),
    [
        (CPU, [], "float32"),
        (CPU, ["training.mixed_precision=bf16"], "bfloat16"),
        (CPU, ["model.dtype=bfloat16", "training.mixed_precision=no"], "bfloat16"),
        (GPU, [], "bfloat16"),
        (GPU, ["training.mixed_precision=fp16"], "float16"),
        (GPU, ["adapter.bias=all"], "float32"),
        (GPU, ["model.quantization.compute_dtype=float16"], "float16"),
        (OLD_GPU, [], "float32"),
    ],
)
def test_products_are_computed_in_what_fits_machine_and_recipe(
    load: Load, recipe: dict[str, Any], hardware: Hardware, overrides: list[str], dtype: str
) -> None:
    plan = make_plan(load(quantised(recipe, bits=4), *overrides), hardware)
    assert plan.quantization is not None
    assert plan.quantization.compute_dtype == dtype
    decided = [choice.value for choice in plan.choices if choice.key == "model.quantization.compute_dtype"]
    assert decided == ([] if "compute_dtype" in str(overrides) else [dtype])


@pytest.mark.parametrize(
    ("hardware", "settings", "overrides", "what"),
    [
        (MPS, {"bits": 4}, [], "CUDA GPUs and CPUs only"),
        (CPU, {"bits": 4, "compute_dtype": "float16"}, [], "float16 needs a GPU"),
        (OLD_GPU, {"bits": 4, "compute_dtype": "bfloat16"}, [], "T4 has no bfloat16"),
        (GPU, {"bits": 4, "compute_dtype": "bfloat16"}, ["adapter.bias=all"], "is bfloat16, but biases are trained"),
        (GPU, {"bits": 8}, ["adapter.bias=all"], "8 bits need `dtype: float32`"),
    ],
)
def test_a_machine_refuses_what_it_cannot_compute(
    load: Load, recipe: dict[str, Any], hardware: Hardware, settings: dict[str, Any], overrides: list[str], what: str
) -> None:
    with pytest.raises(RecipeError, match=r"model\.quantization") as caught:
        make_plan(load(quantised(recipe, **settings), *overrides), hardware)
    assert what in str(caught.value)


def test_the_resolved_recipe_says_what_products_are_computed_in_and_is_valid(
    load: Load, recipe: dict[str, Any], tmp_path: Path
) -> None:
    for bits, dtype in ((4, "bfloat16"), (8, "auto")):
        path = tmp_path / "resolved.yaml"
        path.write_text(resolved_yaml(make_plan(load(quantised(recipe, bits=bits)), GPU)), encoding="utf-8")
        section = load_recipe(path).recipe.model.quantization
        assert section is not None
        assert section.compute_dtype == dtype


def test_the_resolved_recipe_on_a_quantised_checkpoint_says_no_more_than_was_said(
    load: Load, stored: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    loaded = load(stored("4bit", quantization={"bits": 4}))
    config = {"quantization_config": STORED["4bit"] | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"} | config), encoding="utf-8")
    plan = quantized(make_plan(loaded, CPU), quantization_of(loaded.recipe, config))
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(plan), encoding="utf-8")
    section = load_recipe(path).recipe.model.quantization
    assert section is not None
    assert section.model_dump(include=section.model_fields_set) == {"bits": 4, "compute_dtype": "float32"}


@pytest.mark.parametrize("stated", [{"quant_type": "nf4"}, {"compute_dtype": "bfloat16"}, {"method": "bitsandbytes"}])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_settings_that_other_checkpoints_ignore_are_refused(
    problems: Problems,
    stored: Callable[..., dict[str, Any]],
    kind: str,
    stated: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (found,) = problems(stored(kind, quantization={"bits": 4} | stated))
    assert found.key == f"model.quantization.{next(iter(stated))}"
    assert f"has no effect on weights that are quantised already: {kind}, 4 bits" in found.what


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_dora_is_refused_where_peft_refuses_it(
    problems: Problems, stored: Callable[..., dict[str, Any]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (found,) = problems(stored(kind) | {"adapter": {"method": "lora", "use_dora": True}})
    assert (found.key, found.what) == ("adapter.use_dora", f"is not there on {kind} layers (PEFT 0.21); use false")


AWQ = {"quantization_config": STORED["awq"]}


def test_awq_is_planned_in_float16_on_a_gpu_as_it_is_loaded(load: Load, recipe: dict[str, Any]) -> None:
    plan = make_plan(load(recipe), GPU)
    assert (plan.dtype, plan.mixed_precision) == ("bfloat16", "bf16")
    plan = quantized(plan, quantization_of(plan.recipe, AWQ))
    assert (plan.dtype, plan.mixed_precision) == ("float16", "fp16")
    decided = {choice.key: choice.value for choice in plan.choices}
    assert (decided["model.dtype"], decided["training.mixed_precision"]) == ("float16", "fp16")


@pytest.mark.parametrize("override", ["model.dtype=bfloat16", "training.mixed_precision=bf16"])
def test_bfloat16_is_refused_where_awq_would_be_loaded_otherwise(load: Load, recipe: dict[str, Any], override: str) -> None:
    plan = make_plan(load(recipe, override), GPU)
    with pytest.raises(RecipeError, match="AWQ layers know no bfloat16 on a GPU"):
        quantized(plan, quantization_of(plan.recipe, AWQ))


def test_every_method_works_on_some_layers_or_says_why_not() -> None:
    for name, method in METHODS.items():
        assert set(method.quantizations) == {"4bit", "8bit"} or method.why_not_quantized, name
        assert not why_not(method, method.tasks[0], {})
