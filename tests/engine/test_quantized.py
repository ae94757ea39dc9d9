"""Quantised layers: which are made, that nothing re-packs them, and that they and their full weights give the same numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from peftkit.engine.blueprint import draw_blueprint
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.loaded import load_adapter, with_full_weights
from peftkit.engine.model import base_of, load_base_model
from peftkit.engine.quantized import bitsandbytes_layers, compute_in_float32, dequantized
from peftkit.engine.quantizing import settle_quantization
from peftkit.errors import LoadError, RecipeError
from peftkit.plan import Plan, make_plan
from peftkit.recipe import load_recipe
from peftkit.recipe.quantization import Quantization
from tests.runs import curve, run_cli, tiny_recipe, train

IDS = torch.arange(20)[None, :]
NF4 = {"bits": 4}
INT8 = {"bits": 8}
PlanOf = Callable[..., Plan]


@pytest.fixture
def plan_of(models_dir: Path, tmp_path: Path) -> PlanOf:
    """The plan of a tiny recipe with a quantised base: `plan_of("CAUSAL_LM", {"bits": 4}, adapter={...})`."""

    def build(task: str, quantization: dict[str, Any] | None, name: str = "", **sections: Any) -> Plan:
        model = sections.pop("model", {}) | ({"name_or_path": name} if name else {})
        recipe = tiny_recipe(task, models_dir, tmp_path, model=model | {"quantization": quantization}, **sections)
        return settle_quantization(make_plan(load_recipe(recipe), detect_hardware()))

    return build


def base(plan: Plan) -> Any:
    """The base model of a plan, loaded."""
    return load_base_model(base_of(plan))[0]


def logits(model: Any) -> torch.Tensor:
    """What a model says of fixed tokens, in evaluation."""
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.fixture(scope="session")
def stored_model(models_dir: Path) -> str:
    """A tiny Llama whose checkpoint holds 4-bit weights, saved by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(models_dir / "llama", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(models_dir / "llama_nf4")
    AutoTokenizer.from_pretrained(models_dir / "llama").save_pretrained(models_dir / "llama_nf4")
    return str(models_dir / "llama_nf4")


def test_a_layer_of_bitsandbytes_re_packs_itself_on_cpus_with_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap itself: where this fails, a newer bitsandbytes has mended it and `make_safe` can go."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb, "matmul_4bit", lambda x, weight, **rest: x)  # the kernel for packed weights is not on every CPU
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    before = layer.weight.data.clone()
    layer(torch.ones(1, 64))
    assert layer.weight.data.shape != before.shape


def test_no_layer_of_ours_re_packs_itself(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = base(plan_of("CAUSAL_LM", NF4))
    layers = list(bitsandbytes_layers(model))
    before = [layer.weight.data.clone() for layer in layers]
    logits(model)
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert all(torch.equal(old, layer.weight.data) for old, layer in zip(before, layers, strict=True))


def test_nothing_that_is_loaded_for_a_run_can_re_pack_itself(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    training = {"max_steps": 2, "eval_steps": 1}
    recipe = tiny_recipe(
        "CAUSAL_LM", models_dir, tmp_path, model={"quantization": NF4}, training=training, data={"validation": 0.2}
    )
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]
    layers = list(bitsandbytes_layers(load_adapter(tmp_path / "run").model))
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert merged.json["max_abs_diff"] < 1e-6


@pytest.mark.parametrize(
    ("task", "adapter", "kept"),
    [
        ("CAUSAL_LM", {"method": "lora"}, {"lm_head"}),
        ("SEQ_CLS", {"method": "lora"}, {"classifier"}),
        ("TOKEN_CLS", {"method": "lora"}, {"classifier"}),
        ("SEQ_CLS", {"method": "lora", "modules_to_save": ["1.output"]}, {"classifier", "bert.encoder.layer.1.output"}),
    ],
)
def test_heads_and_what_is_trained_whole_are_not_quantised(
    plan_of: PlanOf, task: str, adapter: dict[str, Any], kept: set[str]
) -> None:
    plan = plan_of(task, NF4, adapter=adapter)
    assert plan.quantization is not None
    assert kept <= set(plan.quantization.skip_modules)
    inside = [name for name, module in base(plan).named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert inside
    assert not any(f"{name}.".startswith(tuple(f"{part}." for part in plan.quantization.skip_modules)) for name in inside)


@pytest.mark.parametrize("settings", [NF4, INT8, {"bits": 4, "quant_type": "fp4"}, {"bits": 4, "double_quant": False}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_give_the_logits_of_the_quantised_model(plan_of: PlanOf, settings: dict[str, Any], dtype: str) -> None:
    plan = plan_of("CAUSAL_LM", settings, model={"dtype": dtype})
    reference = logits(compute_in_float32(base(plan)))
    plain: Any = dequantized(base(plan)).float()
    torch.testing.assert_close(logits(plain), reference, rtol=0, atol=1e-6)
    assert all(type(module) is nn.Linear for module in plain.modules() if isinstance(module, nn.Linear))
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize("settings", [NF4, INT8], ids=["4bit", "8bit"])
def test_gradients_are_those_of_the_full_weights_biases_included(plan_of: PlanOf, settings: dict[str, Any]) -> None:
    plan = plan_of("SEQ_CLS", settings, model={"config_overrides": {"num_labels": 2}}, adapter={"method": "bitfit"})
    gradients = []
    for model in (base(plan), dequantized(base(plan))):
        biases = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith("query.bias")]
        model.train()(input_ids=IDS, labels=torch.tensor([1])).loss.backward()
        gradients.append([bias.grad for bias in biases])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_random_weights_are_quantised_to_the_same_each_time(plan_of: PlanOf, models_dir: Path, name: str) -> None:
    plan = plan_of("CAUSAL_LM", NF4, str(models_dir / name), model={"init": "random"})
    first, again = base(plan), base(plan)
    assert sum(1 for _ in bitsandbytes_layers(first)) in (8, 14)
    assert torch.equal(logits(first), logits(again))


@pytest.mark.parametrize("settings", [NF4, INT8, {"bits": 4, "quant_storage": "bfloat16"}])
def test_parameters_are_counted_as_peft_counts_them_after_loading(
    plan_of: PlanOf, models_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    blueprint = draw_blueprint(plan_of("CAUSAL_LM", settings))
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"quantization": settings}, training={"max_steps": 1})
    train(recipe, tmp_path / "run")
    model: Any = load_adapter(tmp_path / "run").model
    assert model.get_nb_trainable_parameters()[1] == blueprint.all_params
    assert "14 linear layers are quantised" in blueprint.notes[0]


def test_gradient_checkpointing_changes_no_number(models_dir: Path, tmp_path: Path) -> None:
    curves = []
    for checkpointing in (False, True):
        training = {"max_steps": 3, "gradient_checkpointing": checkpointing}
        recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"quantization": NF4}, training=training)
        train(recipe, tmp_path / f"run-{checkpointing}")
        curves.append(curve(tmp_path / f"run-{checkpointing}", "loss", "grad_norm"))
    assert curves[0] == curves[1]


def test_a_checkpoint_that_is_quantised_is_said_to_be_and_trained_on(
    stored_model: str, models_dir: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"name_or_path": stored_model}, training={"max_steps": 2})
    planned = run_cli("plan", recipe, "--json").json
    assert planned["choices"]["model.quantization"]["value"] == "bitsandbytes, 4 bits (nf4)"
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert merged.json["max_abs_diff"] < 1e-6
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_an_adapter_of_plain_peft_on_a_quantised_checkpoint_merges_into_full_weights(
    stored_model: str, models_dir: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"name_or_path": stored_model}, training={"max_steps": 2})
    train(recipe, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "peftkit.json").unlink()
    arguments = ("--adapter", tmp_path / "run" / "adapter", "--output", tmp_path / "merged", "--json")
    merged = run_cli("merge", *arguments)
    assert merged.code == 0, merged.err
    assert merged.json["max_abs_diff"] < 1e-6


def test_a_quantised_checkpoint_serves_a_task_whose_class_names_its_backbone_otherwise(
    plan_of: PlanOf, stored_model: str
) -> None:
    model, missing = load_base_model(base_of(plan_of("QUESTION_ANS", None, stored_model)))
    assert missing == {"qa_outputs.weight", "qa_outputs.bias"}
    assert sum(1 for _ in bitsandbytes_layers(model)) == 14


def test_what_a_checkpoint_has_quantised_cannot_be_trained_whole(plan_of: PlanOf, stored_model: str) -> None:
    with pytest.raises(LoadError, match=r"stores `model.layers.0.mlp.down_proj` quantised"):
        plan_of("CAUSAL_LM", None, stored_model, adapter={"method": "lora", "modules_to_save": ["down_proj"]})


def test_a_model_without_a_layer_to_quantise_is_refused(plan_of: PlanOf, models_dir: Path) -> None:
    adapter = {"method": "lora", "modules_to_save": ["self_attn", "mlp"]}
    with pytest.raises(RecipeError, match="no linear layer of LlamaForCausalLM would be quantised"):
        plan_of("CAUSAL_LM", NF4, str(models_dir / "llama"), adapter=adapter)


def test_an_adapter_is_turned_into_a_lora_for_the_same_quantised_base(models_dir: Path, tmp_path: Path) -> None:
    adapter = {"method": "miss", "r": 8}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"quantization": NF4}, adapter=adapter)
    train(recipe, tmp_path / "run")
    result = run_cli("convert", "--adapter", tmp_path / "run", "--output", tmp_path / "lora", "--rank", "16", "--json")
    assert result.code == 0, result.err
    assert result.json["relative_diff"] < 1e-4
    loaded = load_adapter(tmp_path / "lora")
    assert sum(1 for _ in bitsandbytes_layers(loaded.model)) == 14
    assert not list(bitsandbytes_layers(with_full_weights(loaded)))
    answered = run_cli("infer", "--adapter", tmp_path / "lora", "--prompt", "the cat", "--json")
    assert answered.code == 0, answered.err


@pytest.mark.parametrize("settings", [{"method": "torchao", "bits": 8}, {"method": "hqq", "bits": 4, "group_size": 32}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_other_libraries_train_and_merge_exactly(
    models_dir: Path, tmp_path: Path, settings: dict[str, Any], dtype: str
) -> None:
    pytest.importorskip(settings["method"])
    model = {"quantization": settings, "dtype": dtype}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model=model, training={"max_steps": 2})
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["max_abs_diff"] < 1e-6


@pytest.mark.parametrize("settings", [NF4, INT8])
def test_merging_and_converting_are_work_of_the_cpu_from_the_beginning(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    adapter, training = {"method": "miss", "r": 8}, {"max_steps": 1}
    recipe = tiny_recipe(
        "CAUSAL_LM", models_dir, tmp_path, model={"quantization": settings}, adapter=adapter, training=training
    )
    train(recipe, tmp_path / "run")

    def gpu() -> torch.device:
        raise AssertionError("the GPU is asked for")

    monkeypatch.setattr("peftkit.engine.quantized.quantizing_device", gpu)
    for arguments in (("merge",), ("convert", "--rank", "4")):
        result = run_cli(*arguments, "--adapter", tmp_path / "run", "--output", tmp_path / arguments[0], "--json")
        assert result.code == 0, result.err


def test_a_plain_model_is_no_base_for_an_adapter_of_a_quantised_checkpoint(
    stored_model: str, models_dir: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"name_or_path": stored_model}, training={"max_steps": 1})
    train(recipe, tmp_path / "run")
    plain = models_dir / "llama"
    result = run_cli("merge", "--adapter", tmp_path / "run", "--base", plain, "--output", tmp_path / "merged")
    assert result.code == 7
    assert f"`{plain}` has plain weights, and the adapter was trained on a checkpoint that stores them quantised" in result.err


def test_a_library_that_is_too_old_for_a_checkpoint_is_named(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*arguments: Any, **options: Any) -> None:
        raise ImportError("The gptqmodel version should be >= 1.4.3")

    plan = plan_of("CAUSAL_LM", None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", too_old)
    with pytest.raises(LoadError, match=r"cannot be loaded: The gptqmodel version should be"):
        base(plan)


def test_the_plan_says_that_an_adapter_on_gptq_layers_cannot_be_merged(plan_of: PlanOf) -> None:
    plan = dataclasses.replace(plan_of("CAUSAL_LM", None), quantization=Quantization("gptq", 4, is_stored=True))
    assert any(note.startswith("the adapter cannot be merged: gptq layers cannot") for note in draw_blueprint(plan).notes)
