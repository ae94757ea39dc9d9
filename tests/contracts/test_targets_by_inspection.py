"""Targets of adapters on many architectures, drawn on the meta device: PEFT's tables know 29 of 189 causal types."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peftkit.engine.blueprint import Blueprint, draw_blueprint
from peftkit.engine.hardware import detect_hardware
from peftkit.errors import RecipeError
from peftkit.plan import make_plan
from peftkit.recipe import load_recipe
from tests.conftest import write_jsonl

CAUSAL = """
phi3 phimoe qwen2_moe qwen3 qwen3_moe qwen3_next mixtral gpt_oss deepseek_v2 deepseek_v3 gemma3_text gemma3 gemma4_text olmo2
cohere granite granitemoe starcoder2 smollm3 glm4 glm4_moe mpt codegen gpt_bigcode falcon llama4_text stablelm exaone4 xglm
persimmon ctrl mamba mamba2 falcon_h1 jamba jetmoe
""".split()  # noqa: SIM905 - a list of them would be one name a line
ENCODERS = ("modernbert", "distilbert", "albert", "longformer", "xlnet", "roformer", "eurobert", "roberta-prelayernorm")
SEQ_2_SEQ = ("mbart", "marian", "pegasus", "led", "umt5", "m2m_100", "blenderbot", "switch_transformers", "t5gemma", "t5gemma2")
MODELS = {
    **dict.fromkeys(CAUSAL, "CAUSAL_LM"),
    **dict.fromkeys(ENCODERS, "SEQ_CLS"),
    **dict.fromkeys(SEQ_2_SEQ, "SEQ_2_SEQ_LM"),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "all-linear": {"method": "lora", "target_modules": "all-linear"},
    "ia3": {"method": "ia3"},
    "ln_tuning": {"method": "ln_tuning"},
    "beft": {"method": "beft"},
}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_NOT_MEANT = re.compile(
    r"router|(^|\.)(gate|shared_expert_gate|pooler|lm_head|embed_out|classifier|pre_classifier|score|head|sequence_summary|"
    r"logits_proj)(\.|$)|vision|image|audio|multi_modal"
)


@pytest.fixture(scope="session")
def configs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each model type, with its default config of two layers and no weights."""
    root = tmp_path_factory.mktemp("configs")
    write_jsonl(root / "rows.jsonl", [{"text": "hello", "label": "greeting"}])
    for name in {*MODELS, "olmo"}:
        config = CONFIG_MAPPING[name]()
        two = {key: 2 for key in _LAYERS if isinstance(getattr(config, key, None), int)}
        type(config)(**two).save_pretrained(root / name)
    return root


def drawn(configs_dir: Path, model_type: str, adapter: dict[str, Any]) -> Blueprint:
    """The blueprint of an adapter on a model type."""
    recipe = {
        "task": MODELS.get(model_type, "CAUSAL_LM"),
        "model": {"name_or_path": str(configs_dir / model_type), "init": "random"},
        "adapter": adapter,
        "data": {"train": str(configs_dir / "rows.jsonl")},
    }
    path = configs_dir / f"{model_type}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return draw_blueprint(make_plan(load_recipe(path), detect_hardware()), 2)


def adapted_modules(blueprint: Blueprint) -> list[str]:
    """Full names of the modules that PEFT has adapted."""
    names: list[str] = blueprint.model.base_model.targeted_module_names  # type: ignore[union-attr, assignment]
    return names


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", MODELS)
def test_layers_are_found_and_routers_poolers_heads_and_towers_left_out(
    configs_dir: Path, model_type: str, adapter: str
) -> None:
    blueprint = drawn(configs_dir, model_type, ADAPTERS[adapter])
    names = adapted_modules(blueprint)
    assert names
    assert [name for name in names if _NOT_MEANT.search(name)] == []
    assert sum(blueprint.targets.values()) >= 1
    assert blueprint.trainable_params > 0


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("qwen2_moe", "shared_expert_gate"), ("albert", "pooler"), ("gemma3", "vision_tower.encoder.layers.0.self_attn.q_proj")],
)
def test_what_is_left_out_is_adapted_where_it_is_named(configs_dir: Path, model_type: str, named: str) -> None:
    names = adapted_modules(drawn(configs_dir, model_type, {"method": "lora", "target_modules": [named]}))
    assert names
    assert all(name.endswith(named) for name in names)


EXPERTS = {
    "mixtral": "mlp.experts.down_proj, mlp.experts.gate_up_proj",
    "qwen3_moe": "mlp.experts.down_proj, mlp.experts.gate_up_proj",
    "gpt_oss": "mlp.experts.down_proj, mlp.experts.gate_up_proj",
    "llama4_text": "feed_forward.experts.down_proj, feed_forward.experts.gate_up_proj",
    "granitemoe": "block_sparse_moe.experts.down_proj, block_sparse_moe.experts.gate_up_proj",
}


@pytest.mark.parametrize("model_type", EXPERTS)
def test_a_note_tells_how_to_reach_experts_that_are_no_linear_layers(configs_dir: Path, model_type: str) -> None:
    notes = drawn(configs_dir, model_type, ADAPTERS["all-linear"]).notes
    assert any(f"LoRA reaches them by `target_parameters: [{EXPERTS[model_type]}]`" in note for note in notes)
    parameters = EXPERTS[model_type].split(", ")
    named = drawn(configs_dir, model_type, {"method": "lora", "target_parameters": parameters})
    assert set(named.targets) >= set(parameters)
    assert not any("target_parameters" in note for note in named.notes)


TAKEN = ("deepseek_v2", "deepseek_v3", "glm4_moe")  # PEFT takes names of their dense layers for those of experts


@pytest.mark.parametrize("model_type", TAKEN)
def test_dense_layers_that_peft_takes_for_experts_are_left_out(configs_dir: Path, model_type: str) -> None:
    blueprint = drawn(configs_dir, model_type, ADAPTERS["all-linear"])
    assert blueprint.model.base_model.targeted_parameter_names == []  # type: ignore[union-attr]
    assert min(blueprint.targets.values()) > 0
    assert "every linear layer of the backbone but down_proj, gate_proj, up_proj" in blueprint.targets_reason
    for targets in (["o_proj", "gate_proj", "up_proj"], r".*\.(gate|up)_proj"):
        with pytest.raises(RecipeError, match=r"gate_proj, up_proj of \w+ cannot be adapted: .* those of its experts"):
            drawn(configs_dir, model_type, {"method": "lora", "target_modules": targets})


def test_who_names_such_layers_is_told_of_the_experts(configs_dir: Path) -> None:
    with pytest.raises(RecipeError, match=r"`target_parameters: \[mlp.experts.down_proj, mlp.experts.gate_up_proj\]`"):
        drawn(configs_dir, "glm4_moe", {"method": "lora", "target_modules": ["gate_proj"]})


def test_methods_that_know_no_experts_adapt_those_layers(configs_dir: Path) -> None:
    blueprint = drawn(configs_dir, "glm4_moe", {"method": "loha", "target_modules": ["gate_proj"]})
    assert blueprint.targets == {"gate_proj": 2}


def test_models_without_experts_get_no_note_of_them(configs_dir: Path) -> None:
    assert drawn(configs_dir, "xlnet", ADAPTERS["all-linear"]).notes == []  # which has parameters of three dimensions


@pytest.mark.parametrize("model_type", ["smollm3", "glm4", "qwen3_moe", "gemma3", "starcoder2"])
def test_keys_and_values_of_grouped_attention_are_no_feed_forward_layers_to_ia3(configs_dir: Path, model_type: str) -> None:
    blueprint = drawn(configs_dir, model_type, ADAPTERS["ia3"])
    layers = dict(blueprint.model.named_modules())
    names = [name for name in layers if re.search(r"[kv]_proj$", name) and "vision" not in name]
    assert names
    assert not any(layers[name].is_feedforward for name in names)  # type: ignore[union-attr]
    ends = [layer.is_feedforward for name, layer in layers.items() if name.endswith((".down_proj", ".c_proj"))]
    assert all(ends)


def test_a_model_whose_norms_have_no_weights_is_refused_with_the_reason(configs_dir: Path) -> None:
    with pytest.raises(RecipeError, match="OlmoForCausalLM has no normalisation layers with weights for `ln_tuning`"):
        drawn(configs_dir, "olmo", ADAPTERS["ln_tuning"])
