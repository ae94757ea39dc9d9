"""`plan` and `params`: what a recipe means for its model, told before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import label_rows, write_jsonl
from tests.runs import run_cli, tiny_recipe, train

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
CLASSIFIERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "distilbert": (
        {"vocab_size": 300, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        ["pre_classifier", "classifier"],
    ),
    "deberta-v2": (SMALL, ["pooler", "classifier"]),
    "modernbert": (SMALL | {"pad_token_id": 0}, ["head", "classifier"]),
    "roberta": (SMALL, ["classifier"]),
    "bert": (SMALL, ["classifier"]),
    "gpt2": ({"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4}, ["score"]),
    "llama": (GQA, ["score"]),
    "t5": ({"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, ["classification_head"]),
    "bart": (
        {"vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
         "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        ["classification_head"],
    ),
}  # fmt: skip
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "phi3": GQA | {"pad_token_id": 0},
    "gemma3_text": GQA,
    "qwen3": GQA,
    "qwen3_moe": GQA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": GQA | {"num_local_experts": 4},
    "falcon": SMALL,
    "opt": {
        "vocab_size": 300,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": SMALL,
}
MT5_LARGE = {
    "model_type": "mt5", "d_ff": 2816, "d_kv": 64, "d_model": 1024, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16,
    "feed_forward_proj": "gated-gelu", "vocab_size": 250112, "tie_word_embeddings": False,
}  # fmt: skip
BLOOMZ_560M = {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}


def config_only(folder: Path, model_type: str, config: dict[str, Any]) -> Path:
    """A model folder that holds nothing but its config.json."""
    path = folder / model_type.replace("/", "-")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    return path


def params(cli: Any, write_recipe: Any, recipe: dict[str, Any], *arguments: str) -> Any:
    result = cli("params", write_recipe(recipe), "--json", *arguments)
    assert result.code == 0, result.err
    return result.json


def recipe_for(model: Path, task: str = "CAUSAL_LM", **adapter: Any) -> dict[str, Any]:
    return {"task": task, "model": {"name_or_path": str(model)}, "adapter": {"method": "lora"} | adapter}


def test_mt5_large_is_counted_from_its_config_alone(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    recipe = recipe_for(config_only(tmp_path, "mt5", MT5_LARGE), "SEQ_2_SEQ_LM")
    result = cli("params", write_recipe(recipe))
    assert result.out == "trainable params: 2359296 || all params: 1231940608 || trainable%: 0.1915\n"


@pytest.mark.parametrize(
    ("adapter", "trainable"),
    [
        ({"r": 8}, 786432),
        ({"r": 16}, 1572864),
        ({"r": 8, "target_modules": "all-linear"}, 3145728),
        ({"r": 8, "use_dora": True}, 860160),
    ],
    ids=["r8", "r16", "all-linear", "dora"],
)
def test_bloomz_560m_is_counted_from_its_config_alone(
    cli: Any, write_recipe: Any, tmp_path: Path, adapter: dict[str, Any], trainable: int
) -> None:
    found = params(cli, write_recipe, recipe_for(config_only(tmp_path, "bloom", BLOOMZ_560M), **adapter))
    assert found["trainable_params"] == trainable
    assert found["all_params"] == 559214592 + trainable
    assert found["trainable_percent"] == pytest.approx(100 * trainable / (559214592 + trainable))


def test_rows_by_module_sum_to_the_totals(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    recipe = recipe_for(config_only(tmp_path, "llama", GQA), target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = params(cli, write_recipe, recipe, "--by-module")
    for name in ("trainable_params", "all_params"):
        assert sum(row[name] for row in found["modules"]) == found[name]
    rows = {row["module"]: row["trainable_params"] for row in found["modules"]}
    assert rows["model.layers.*.self_attn.q_proj.lora_A.default"] == 2 * 8 * 32
    assert rows["lm_head.modules_to_save.default"] == 300 * 32


def test_compare_counts_other_methods_on_the_same_model(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    recipe = recipe_for(config_only(tmp_path, "llama", GQA), r=2)
    result = cli("params", write_recipe(recipe), "--compare", "lora,full,head", "--json")
    found = {row["method"]: row for row in map(json.loads, result.out.splitlines())}
    assert list(found) == ["lora", "full", "head"]
    assert found["lora"]["trainable_params"] == 2 * 2 * ((32 + 32) + (32 + 16))  # layers x r x (q_proj + v_proj)
    assert found["full"]["trainable_params"] == found["full"]["all_params"] == found["head"]["all_params"]
    assert found["head"]["trainable_params"] == 300 * 32


def test_compare_says_why_a_method_does_not_fit_and_counts_the_others(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    recipe = recipe_for(config_only(tmp_path, "llama", GQA), r=2)
    result = cli("params", write_recipe(recipe), "--compare", "c3a,bitfit,cpt,ia3", "--json")
    found = {row["method"]: row for row in map(json.loads, result.out.splitlines())}
    assert found["c3a"]["problem"].startswith("block_size is 256, which does not divide the inputs and the outputs; 16, 8")
    assert found["bitfit"]["problem"] == "`bitfit` does not work on `llama`: its layers have no biases"
    assert found["cpt"]["problem"].startswith("examples is missing")
    assert found["ia3"]["trainable_params"] == 2 * (16 + 16 + 64)  # layers x (k_proj + v_proj + inputs of down_proj)


def test_an_unknown_method_to_compare_is_refused(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    result = cli("params", write_recipe(recipe_for(config_only(tmp_path, "llama", GQA))), "--compare", "lorra")
    assert result.code == 2
    assert "--compare: no method is called `lorra`; there are: " in result.err


def test_several_recipes_give_one_json_line_each(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    model = config_only(tmp_path, "llama", GQA)
    first, second = (write_recipe(recipe_for(model, r=rank), name=f"r{rank}.yaml") for rank in (4, 8))
    lines = [json.loads(line) for line in cli("params", first, second, "--json").out.splitlines()]
    assert 2 * lines[0]["trainable_params"] == lines[1]["trainable_params"]


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_the_head_of_a_classifier_is_found_and_saved(cli: Any, write_recipe: Any, tmp_path: Path, model_type: str) -> None:
    config, heads = CLASSIFIERS[model_type]
    recipe = recipe_for(config_only(tmp_path, model_type, config), "SEQ_CLS")
    rows = params(cli, write_recipe, recipe, "--by-module")["modules"]
    saved = {row["module"].split(".modules_to_save")[0] for row in rows if ".modules_to_save" in row["module"]}
    assert saved == set(heads)
    assert any(row["trainable_params"] for row in rows if "lora_A" in row["module"])


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_the_head_method_trains_the_head_alone(cli: Any, write_recipe: Any, tmp_path: Path, model_type: str) -> None:
    config, heads = CLASSIFIERS[model_type]
    recipe = recipe_for(config_only(tmp_path, model_type, config), "SEQ_CLS") | {"adapter": {"method": "head"}}
    rows = params(cli, write_recipe, recipe, "--by-module")["modules"]
    assert {row["module"].split(".")[0] for row in rows if row["trainable_params"]} == set(heads)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_lora_finds_its_targets_in_every_architecture(cli: Any, write_recipe: Any, tmp_path: Path, model_type: str) -> None:
    rows = params(cli, write_recipe, recipe_for(config_only(tmp_path, model_type, LANGUAGE_MODELS[model_type])), "--by-module")[
        "modules"
    ]
    trained = [row["module"] for row in rows if row["trainable_params"]]
    assert trained
    assert all(".lora_" in name and ".*." in name for name in trained)  # nothing but LoRA, and only in the layers


ALL_MODELS = [*((name, "SEQ_CLS") for name in CLASSIFIERS), *((name, "CAUSAL_LM") for name in LANGUAGE_MODELS)]


@pytest.mark.parametrize(("model_type", "task"), ALL_MODELS)
def test_all_linear_leaves_routers_poolers_and_heads_alone(
    cli: Any, write_recipe: Any, tmp_path: Path, model_type: str, task: str
) -> None:
    config = CLASSIFIERS[model_type][0] if task == "SEQ_CLS" else LANGUAGE_MODELS[model_type]
    recipe = recipe_for(config_only(tmp_path, model_type, config), task, target_modules="all-linear")
    rows = params(cli, write_recipe, recipe, "--by-module")["modules"]
    adapted = {row["module"].partition(".lora_")[0] for row in rows if ".lora_A" in row["module"]}
    assert len(adapted) >= 2
    words = ("pooler", "classifier", "classification_head", "score", "lm_head", "embed_out", "router")
    assert not [name for name in adapted if any(word in name.split(".") for word in words) or name.endswith(".gate")]


def test_all_linear_means_every_linear_layer_of_the_layers(cli: Any, write_recipe: Any, lm_recipe: Any) -> None:
    lm_recipe["adapter"] |= {"target_modules": "all-linear"}
    targets = cli("plan", write_recipe(lm_recipe), "--json").json["targets"]
    assert targets == dict.fromkeys(("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"), 2)


@pytest.mark.parametrize(
    ("adapter", "targets"),
    [
        ({"target_modules": ["q_proj", "layers.1.mlp.up_proj"]}, {"q_proj": 2, "layers.1.mlp.up_proj": 1}),
        ({"target_modules": r".*layers\.0\..*_proj"}, {r".*layers\.0\..*_proj": 7}),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, {"q_proj": 1, "v_proj": 1}),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"}, {"q_proj": 1, "v_proj": 1}),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, {"q_proj": 1}),
        ({}, {"q_proj": 2, "v_proj": 2}),
    ],
    ids=["names", "expression", "layers", "exclude expression", "exclude name", "automatic"],
)
def test_every_entry_of_target_modules_is_shown_with_its_matches(
    cli: Any, write_recipe: Any, lm_recipe: Any, adapter: dict[str, Any], targets: dict[str, int]
) -> None:
    lm_recipe["adapter"] |= adapter
    assert cli("plan", write_recipe(lm_recipe), "--json").json["targets"] == targets


LINEAR = "its linear layers: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    "case",
    [
        ("target_modules", ["q_proj", "v_prj"], ["`v_prj` matches nothing", "did you mean `v_proj`?", LINEAR]),
        ("target_modules", r".*\.q_prjo", [r"`.*\.q_prjo` matches nothing", LINEAR]),
        ("exclude_modules", ["q_prj"], ["`q_prj` matches nothing", "did you mean `q_proj`?", LINEAR]),
        ("modules_to_save", ["lm_hed"], ["`lm_hed` matches nothing", "did you mean `lm_head`?", LINEAR]),
        ("target_parameters", ["mlp.experts.gate_up"], ["`mlp.experts.gate_up` matches nothing", LINEAR]),
        ("rank_pattern", {"q_prj": 4}, ["matches nothing", "did you mean `q_proj`?", LINEAR]),
        ("alpha_pattern", {"q_prj": 4}, ["matches nothing", "did you mean `q_proj`?", LINEAR]),
        ("layers_to_transform", [0, 2], ["there is no layer 2; LlamaForCausalLM has layers 0 to 1"]),
        ("trainable_token_indices", [5, 300], ["there is no token 300; the model has 300"]),
        (
            "trainable_token_indices",
            {"embed_token": [5]},
            ["no embedding is called `embed_token`", "did you mean `embed_tokens`?"],
        ),
    ],
    ids=lambda case: case[0],
)
@pytest.mark.parametrize("command", ["plan", "params", "train"])
def test_a_name_that_matches_nothing_is_refused_with_its_neighbours(
    cli: Any, write_recipe: Any, lm_recipe: Any, tmp_path: Path, command: str, case: tuple[str, Any, list[str]]
) -> None:
    field, value, words = case
    lm_recipe["adapter"] |= {"target_modules": ["q_proj"], field: value}
    recipe = write_recipe(lm_recipe)
    result = cli(command, recipe, *(["--output", tmp_path / "run"] if command == "train" else []))
    assert result.code == 2
    number = next(
        number for number, line in enumerate(recipe.read_text().splitlines(), 1) if line.strip().startswith(f"{field}:")
    )
    assert f"{recipe}:{number}: adapter.{field}" in result.err or f"{recipe}:{number + 1}: adapter.{field}" in result.err
    assert all(word in result.err for word in words), result.err
    assert not (tmp_path / "run").exists()


def test_all_names_that_match_nothing_are_told_at_once(cli: Any, write_recipe: Any, lm_recipe: Any) -> None:
    lm_recipe["adapter"] |= {"target_modules": ["q_prj"], "modules_to_save": ["lm_hed"], "rank_pattern": {"v_prj": 2}}
    result = cli("plan", write_recipe(lm_recipe))
    assert all(f"`{name}`" in result.err for name in ("q_prj", "lm_hed", "q_proj", "lm_head", "v_proj"))


@pytest.mark.parametrize(
    ("bias", "words"), [("all", "the model has no bias"), ("lora_only", "the adapted layers have no bias")]
)
def test_biases_that_are_not_there_cannot_be_trained(
    cli: Any, write_recipe: Any, lm_recipe: Any, bias: str, words: str
) -> None:
    lm_recipe["adapter"] |= {"bias": bias, "lora_bias": True, "modules_to_save": ["lm_head"]}
    result = cli("plan", write_recipe(lm_recipe))
    assert result.code == 2
    assert f"adapter.bias: `{bias}` has no effect: {words}" in result.err


def test_lora_only_needs_a_bias_in_the_layers_that_are_adapted(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    model = config_only(tmp_path, "qwen2", GQA)  # its query, key and value layers have biases, the others have none
    assert cli("params", write_recipe(recipe_for(model, bias="lora_only", target_modules=["q_proj"]))).code == 0
    result = cli("params", write_recipe(recipe_for(model, bias="lora_only", target_modules=["up_proj"])))
    assert result.code == 2
    assert "adapter.bias" in result.err


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "mica"])
def test_a_rank_beyond_the_smaller_side_cannot_be_initialised_from_the_weight(
    cli: Any, write_recipe: Any, lm_recipe: Any, init: str
) -> None:
    lm_recipe["adapter"] |= {"init_lora_weights": init, "target_modules": ["q_proj", "v_proj"], "r": 16}  # v_proj is 16 x 32
    assert cli("plan", write_recipe(lm_recipe)).code == 0
    result = cli("plan", write_recipe(lm_recipe), "--set", "adapter.r=18")
    assert result.code == 2
    assert "cannot start from `model.layers.0.self_attn.v_proj`: `r` is 18, its smaller side 16" in result.err
    assert cli("plan", write_recipe(lm_recipe), "--set", "adapter.rank_pattern={q_proj: 34}").code == 2


@pytest.mark.parametrize(
    ("init", "targets", "words"),
    [
        ("olora", ["c_attn"], "transposed weight"),
        ("pissa", ["wte"], "it is an embedding"),
        ("orthogonal", ["wte"], "it is an embedding"),
    ],
)
def test_an_initialisation_that_peft_would_get_wrong_is_refused(
    cli: Any, write_recipe: Any, models_dir: Path, init: str, targets: list[str], words: str
) -> None:
    result = cli("params", write_recipe(recipe_for(models_dir / "gpt2", init_lora_weights=init, target_modules=targets, r=4)))
    assert result.code == 2
    assert "adapter.init_lora_weights" in result.err
    assert words in result.err


def test_experts_cannot_be_initialised_from_their_weight(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    model = config_only(tmp_path, "mixtral", LANGUAGE_MODELS["mixtral"])
    fields = {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    assert cli("params", write_recipe(recipe_for(model, **fields))).code == 0
    result = cli("params", write_recipe(recipe_for(model, init_lora_weights="pissa", **fields)))
    assert result.code == 2
    assert "it holds a parameter that is no linear layer's" in result.err


@pytest.mark.parametrize(
    ("task", "adapter"),
    [
        ("CAUSAL_LM", {"method": "lora"}),
        ("CAUSAL_LM", {"method": "lora", "use_dora": True, "target_modules": "all-linear", "trainable_token_indices": [5, 6]}),
        ("CAUSAL_LM", {"method": "lora", "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}),
        ("CAUSAL_LM", {"method": "lora", "layer_replication": [[0, 2], [0, 2]]}),
        ("SEQ_CLS", {"method": "lora", "bias": "all"}),
        ("SEQ_CLS", {"method": "head"}),
        ("SEQ_2_SEQ_LM", {"method": "full"}),
    ],
    ids=["lora", "dora", "pissa", "replicated", "biases", "head", "full"],
)
def test_the_plan_counts_what_is_then_trained(
    cli: Any, models_dir: Path, tmp_path: Path, task: str, adapter: dict[str, Any]
) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path, adapter=adapter, training={"max_steps": 1})
    planned = cli("plan", recipe, "--json").json
    summary = train(recipe, tmp_path / "run")
    assert planned["trainable_params"] == summary["trainable_params"]
    assert planned["num_steps"] == summary["global_step"] == 1
    assert planned["rows"] == {"train": 21}


def test_a_head_that_the_checkpoint_lacks_is_announced(cli: Any, write_recipe: Any, cls_recipe: Any) -> None:
    found = cli("plan", write_recipe(cls_recipe), "--json").json
    assert found["saved_modules"] == ["classifier"]
    assert "the checkpoint has no weights for classifier.bias, classifier.weight" in found["notes"][0]


def test_an_untrained_pooler_is_trained_and_saved_too(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "no_pooler"
    shutil.copytree(models_dir / "bert", model)
    state = {name: tensor for name, tensor in load_file(model / "model.safetensors").items() if "pooler" not in name}
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, model={"name_or_path": str(model)}, training={"max_steps": 1})
    assert cli("plan", recipe, "--json").json["saved_modules"] == ["bert.pooler.dense", "classifier"]
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]


def test_the_plan_counts_rows_tokens_and_memory(cli: Any, write_recipe: Any, lm_recipe: Any) -> None:
    found = cli("plan", write_recipe(lm_recipe), "--json").json
    memory = found["memory_bytes"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    buffers = 4 * 2 * 4  # the frequencies of positions, twice
    assert memory["weights"] == 4 * (found["all_params"] - found["trainable_params"]) + buffers
    assert memory["adapter"] == memory["gradients"] == 4 * found["trainable_params"]
    assert memory["optimizer"] == 8 * found["trainable_params"]
    assert found["num_steps"] == 6
    assert 0 < found["target_tokens_per_epoch"] < found["tokens_per_epoch"]


def test_the_plan_for_people_names_the_choices(cli: Any, write_recipe: Any, lm_recipe: Any) -> None:
    result = cli("plan", write_recipe(lm_recipe))
    assert result.code == 0
    assert result.out.startswith("trainable params: 896 || all params: 38688 || trainable%: 2.3160\n")
    words = ("q_proj", "model.dtype", "memory of a process at its peak", "target_tokens_per_epoch")
    assert all(word in result.out for word in words)


def test_max_length_beyond_the_models_positions_is_refused(cli: Any, write_recipe: Any, cls_recipe: Any) -> None:
    cls_recipe["data"]["max_length"] = 65
    result = cli("plan", write_recipe(cls_recipe))
    assert result.code == 2
    assert "data.max_length: is 65, but the model takes at most 64 tokens" in result.err


def test_labels_are_counted_for_params(cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path) -> None:
    two = cli("params", write_recipe(cls_recipe), "--json").json["trainable_params"]
    rows = [row | {"label": f"class {number % 5}"} for number, row in enumerate(label_rows(24))]
    cls_recipe["data"]["train"] = str(write_jsonl(tmp_path / "five.jsonl", rows))
    assert cli("params", write_recipe(cls_recipe), "--json").json["trainable_params"] == two + 3 * (32 + 1)


def test_a_config_that_contradicts_itself_is_refused(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    recipe = recipe_for(config_only(tmp_path, "modernbert", SMALL | {"pad_token_id": 300}), "SEQ_CLS")
    result = cli("params", write_recipe(recipe))
    assert result.code == 7
    assert "transformers cannot build a SEQ_CLS model of type `modernbert`" in result.err


@pytest.mark.parametrize(
    ("model_type", "task", "has"),
    [
        ("gemma", "QUESTION_ANS", "CAUSAL_LM, SEQ_CLS, TOKEN_CLS, FEATURE_EXTRACTION"),
        ("marian", "FEATURE_EXTRACTION", "CAUSAL_LM, SEQ_2_SEQ_LM"),
    ],
)
def test_a_task_that_transformers_has_no_class_for_is_told_with_those_that_it_has(
    cli: Any, write_recipe: Any, tmp_path: Path, model_type: str, task: str, has: str
) -> None:
    result = cli("params", write_recipe(recipe_for(config_only(tmp_path, model_type, {}), task)))
    assert result.code == 7
    assert f"cannot build a {task} model of type `{model_type}`: it has classes of this type for {has} only" in result.err


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_a_folder_without_a_tokenizer_is_refused_for_what_needs_one(models_dir: Path, tmp_path: Path, name: str) -> None:
    """Transformers 5 makes an empty tokenizer, and a classifier would learn from unknown words alone."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(models_dir / name / file, tmp_path / file)
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, model={"name_or_path": str(tmp_path)})
    for command in ("plan", "data", "train"):
        result = run_cli(command, recipe)
        assert result.code == 7
        assert "has no tokenizer (tokenizer.json, vocab.txt and the like); put it there" in result.err


def test_a_model_that_is_not_there_is_refused(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    config_only(tmp_path, "llama", {"model_type": "no_such_type"})
    result = cli("params", write_recipe(recipe_for(tmp_path / "llama")))
    assert result.code == 7
    assert "no_such_type" in result.err


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (
            {"method": "c3a"},
            "adapter.block_size: is 256, which does not divide the inputs and the outputs; 16, 8, 4, 2 would "
            "(`model.layers.0.self_attn.v_proj`: 32 inputs, 16 outputs)",
        ),
        (
            {"method": "oft", "oft_block_size": 24, "target_modules": "all-linear"},
            "adapter.oft_block_size: is 24, which does not divide the inputs; 32, 16, 8, 4 would",
        ),
        (
            {"method": "deft", "r": 17, "target_modules": ["q_proj", "v_proj"]},
            "adapter.r: is 17, more than the outputs, and PEFT would lower it without a word; at most 16 "
            "(`model.layers.0.self_attn.v_proj`",
        ),
        (
            {"method": "osf", "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 16}},
            "adapter.rank_pattern.v_proj: is 16, which keeps all 16 directions and trains none; at most 15",
        ),
        ({"method": "trainable_tokens", "token_indices": [5, 300]}, "adapter.token_indices: there is no token 300"),
        ({"method": "adaption_prompt", "adapter_layers": 3}, "adapter.adapter_layers: is 3; LlamaForCausalLM has 2 layers"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_a_setting_that_no_layer_of_this_size_can_take_is_refused(
    cli: Any, write_recipe: Any, tmp_path: Path, adapter: dict[str, Any], words: str
) -> None:
    result = cli("params", write_recipe(recipe_for(config_only(tmp_path, "llama", GQA), **adapter)))
    assert result.code == 2
    assert words in result.err
    assert result.err.count("adapter.") == 1  # one layer stands for all that are like it


def test_sizes_by_module_are_compared_with_their_module(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "v_proj"], "block_size": 32, "block_size_pattern": {"v_proj": 16}}
    recipe = recipe_for(config_only(tmp_path, "llama", GQA), method="c3a", **fields)
    assert params(cli, write_recipe, recipe)["trainable_params"] == 2 * (32 * 32 // 32 + 32 * 16 // 16)


def test_a_layer_that_is_left_out_may_have_any_size(cli: Any, write_recipe: Any, tmp_path: Path) -> None:
    model = config_only(tmp_path, "llama", GQA)
    fields = {"method": "psoft", "r": 20, "target_modules": ["q_proj", "v_proj"]}
    assert cli("params", write_recipe(recipe_for(model, **fields))).code == 2
    assert cli("params", write_recipe(recipe_for(model, exclude_modules=["v_proj"], **fields))).code == 0


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_size_that_does_not_fit_is_refused_before_any_weight_is_loaded(
    cli: Any, write_recipe: Any, lm_recipe: Any, tmp_path: Path, command: str
) -> None:
    lm_recipe["adapter"] = {"method": "c3a"}
    result = cli(command, write_recipe(lm_recipe), *(["--output", tmp_path / "run"] if command == "train" else []))
    assert result.code == 2
    assert "adapter.block_size: is 256" in result.err
    assert not (tmp_path / "run").exists()


def test_the_plan_refuses_a_schedule_of_ranks_that_the_run_is_too_short_for(
    cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path
) -> None:
    cls_recipe["adapter"] = {"method": "adalora", "tinit": 4, "tfinal": 2}
    for command in (["plan"], ["train", "--output", tmp_path / "run"]):
        result = cli(command[0], write_recipe(cls_recipe), *command[1:])
        assert result.code == 2
        assert "the run has 6 steps: none is left to prune ranks in" in " ".join(result.err.split())
    assert not (tmp_path / "run").exists()
