"""Initialisations, losses and optimizers of LoRA and the other choices within a method: trained, proved and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from peftkit.engine.loaded import load_adapter
from tests.conftest import instruction_rows, write_jsonl
from tests.runs import run_cli, tiny_recipe, train

SHORT = {"max_steps": 4}
LORA = {"method": "lora", "r": 4, "lora_alpha": 8}


def trained_and_merged(recipe: Path, folder: Path) -> dict[str, Any]:
    """Train, merge into a model of the same answers; the summary of the training."""
    summary = train(recipe, folder / "run")
    assert summary["certificate"]["passed"]
    merged = run_cli("merge", "--adapter", folder / "run", "--output", folder / "merged", "--json")
    assert merged.code == 0, merged.err
    return summary


def saved_config(run: Path) -> dict[str, Any]:
    """adapter_config.json of a run."""
    config: dict[str, Any] = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "eva", "init_num_rows": 16},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "whiten": True}},
        {"init_lora_weights": "corda", "init_num_rows": 8},
        {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArBr", "scale": "gd_scale"}},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_initialisations_that_look_at_rows_reload_and_merge_exactly(
    models_dir: Path, tmp_path: Path, task: str, fields: dict[str, Any]
) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path, adapter=LORA | fields, training=SHORT)
    trained_and_merged(recipe, tmp_path)
    # Whoever loads the adapter has no rows to look at, and need not have.
    assert saved_config(tmp_path / "run")["init_lora_weights"] is True


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_an_initialisation_that_looks_at_rows_is_another_one(models_dir: Path, tmp_path: Path, init: str) -> None:
    norms = {}
    for name in (True, init):
        folder = tmp_path / str(name)
        folder.mkdir()
        recipe = tiny_recipe(
            "CAUSAL_LM", models_dir, folder, adapter=LORA | {"init_lora_weights": name}, training={"max_steps": 1}
        )
        train(recipe, folder / "run")
        state = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
        norms[name] = sum(float(tensor.norm()) for key, tensor in state.items() if "lora_A" in key)
    assert norms[True] != pytest.approx(norms[init], rel=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"kasa_config": {}},
        {"monteclora_config": {}},
        {"use_bdlora": {"target_modules_bd_b": ["q_proj", "v_proj"], "nblocks": 2}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_lora_variants_with_losses_or_shapes_of_their_own(models_dir: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    trained_and_merged(tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=LORA | fields, training=SHORT), tmp_path)


def test_lora_fa_trains_lora_b_alone(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=LORA, training=SHORT | {"optim": "lorafa"})
    summary = trained_and_merged(recipe, tmp_path)
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert summary["trainable_params"] == sum(tensor.numel() for name, tensor in state.items() if "lora_B" in name)
    assert run_cli("params", recipe, "--json").json["trainable_params"] == summary["trainable_params"]


def test_an_activated_lora_acts_after_its_invocation_only(models_dir: Path, tmp_path: Path) -> None:
    adapter = LORA | {"alora_invocation_text": "<|im_start|>assistant"}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter)
    summary = train(recipe, tmp_path / "run")
    assert summary["certificate"]["passed"]
    tokens = saved_config(tmp_path / "run")["alora_invocation_tokens"]
    assert tokens
    from peftkit.engine.loaded import load_adapter

    loaded = load_adapter(tmp_path / "run")
    model: Any = loaded.model
    ids = torch.tensor([[10, 11, 12, *tokens, 13, 14]])
    with torch.no_grad():
        active = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    assert torch.equal(active[:, :3], base[:, :3])
    assert not torch.allclose(active[:, -1], base[:, -1])
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")
    assert (merged.code, "an activated LoRA acts only after its invocation tokens" in merged.err) == (2, True)


def test_rows_without_the_invocation_of_an_activated_lora_are_refused(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=LORA | {"alora_invocation_tokens": [7, 7, 7]})
    result = run_cli("train", recipe, "--output", tmp_path / "run")
    assert result.code == 3
    assert "21 of 21 training rows lack the tokens of `adapter.alora_invocation_tokens` ([7, 7, 7])" in result.err


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "prompt_tuning", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "cat", "num_virtual_tokens": 3},
        {"method": "prompt_tuning", "num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"},
        {"method": "p_tuning", "num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"},
        {"method": "prefix_tuning", "num_virtual_tokens": 3, "prefix_projection": True},
        {"method": "prefix_tuning", "num_virtual_tokens": 3, "init_weights": "zero"},
        {"method": "prefix_tuning", "num_virtual_tokens": 3, "init_text": "the cat sat on a mat"},
        {"method": "cartridge", "num_virtual_tokens": 3, "init_text": "the cat sat on a mat"},
        {"method": "adaption_prompt", "adapter_len": 2, "adapter_layers": 1},
        {"method": "adamss", "r": 8, "num_subspaces": 4, "use_asa": True, "asa_target_subspaces": 2, "init_warmup": 1,
         "final_warmup": 3, "mask_interval": 1},
        {"method": "supertuning", "r": 2, "lora_alpha": 4},
        {"method": "bottleneck", "style": "houlsby"},
        {"method": "bottleneck", "style": "parallel", "scaling": 4.0},
    ],
    ids=lambda adapter: "-".join(str(value) for value in adapter.values())[:60],
)  # fmt: skip
def test_choices_within_a_method_reload_exactly(models_dir: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter)
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]


def test_one_target_task_starts_from_the_prompt_of_several(models_dir: Path, tmp_path: Path) -> None:
    def run_of(folder: Path, names: list[str], adapter: dict[str, Any], **training: float) -> Path:
        rows = [row | {"task_id": names[index % len(names)]} for index, row in enumerate(instruction_rows(12))]
        data = {"train": str(write_jsonl(folder / "tasks.jsonl", rows))}
        method = {"method": "multitask_prompt_tuning", "num_virtual_tokens": 3, "num_tasks": len(names)}
        recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, adapter=method | adapter, data=data, training=training)
        train(recipe, folder / "run")
        return folder / "run"

    source = tmp_path / "source"
    source.mkdir()
    before = load_file(run_of(source, ["sum", "copy", "turn"], {}) / "adapter" / "adapter_model.safetensors")
    init = {"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": str(source / "run")}
    run_of(tmp_path, ["new"], init, learning_rate=1e-9)
    state = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(state["prompt_embeddings"], before["prompt_embeddings"])
    torch.testing.assert_close(state["prefix_task_rows"], before["prefix_task_rows"].mean(0, keepdim=True))
    (source / "run").rename(tmp_path / "gone")  # loading needs the source no more
    answers = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", "the cat", "--json")
    assert answers.code == 0, answers.err


@pytest.fixture(scope="module")
def experts(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three trained LoRA adapters of the tiny Llama."""
    runs = []
    for number in range(3):
        folder = tmp_path_factory.mktemp(f"expert-{number}")
        recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, adapter=LORA, training={"seed": number, "learning_rate": 0.1})
        train(recipe, folder / "run")
        runs.append(str(folder / "run"))
    return runs


def routed(models_dir: Path, folder: Path, arrow: dict[str, Any]) -> Path:
    """A recipe that routes with Arrow, which has no `training`."""
    recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, adapter={"method": "lora", "arrow_config": arrow})
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content.pop("training")
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    return recipe


def test_arrow_routes_between_adapters_that_are_trained_already(models_dir: Path, experts: list[str], tmp_path: Path) -> None:
    for number, expert in enumerate(experts):
        shutil.copytree(expert, tmp_path / f"expert-{number}")
    recipe = routed(models_dir, tmp_path, {"adapters": [f"expert-{number}" for number in range(3)], "top_k": 2})
    refused = run_cli("validate", recipe, "--set", "training.max_steps=3")
    assert (refused.code, "training: has no effect: these settings put together adapters" in refused.err) == (2, True)
    summary = train(recipe, tmp_path / "run")
    assert (summary["global_step"], summary["trainable_params"], summary["train_loss"]) == (0, 0, None)
    assert summary["certificate"]["passed"]
    for number in range(3):
        (tmp_path / f"expert-{number}").rename(tmp_path / f"gone-{number}")  # the folder is whole without them
    answered = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", "the cat", "--json")
    assert answered.code == 0, answered.err
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")
    assert (merged.code, "every token goes to adapters of its own" in merged.err) == (2, True)


@pytest.mark.parametrize("general", [[], [2]], ids=["plain", "GenKnowSub"])
def test_arrow_gives_the_logits_of_pefts_own_router(
    models_dir: Path, experts: list[str], tmp_path: Path, general: list[int]
) -> None:
    further = {"use_gks": True, "general_adapters": [experts[place] for place in general]} if general else {}
    arrow = {"adapters": experts[:2], "top_k": 2, "router_temperature": 0.5, "rng_seed": 7}
    train(routed(models_dir, tmp_path, arrow | further), tmp_path / "run")
    base = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "llama")
    config = peft.ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=7, use_gks=bool(general))
    folders = [f"{run}/adapter" for run in experts]
    theirs = peft.create_arrow_model(base, folders[:2], config, [folders[place] for place in general]).eval()
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_adapter(tmp_path / "run").model(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_arrow_cannot_choose_more_adapters_than_there_are(models_dir: Path, experts: list[str], tmp_path: Path) -> None:
    result = run_cli("validate", routed(models_dir, tmp_path, {"adapters": experts[:2]}))
    assert (result.code, "top_k: must be at most the number of `adapters` (2), it is 3" in result.err) == (2, True)


def test_arrow_is_refused_where_adapters_have_heads(models_dir: Path, tmp_path: Path) -> None:
    arrow = {"method": "lora", "arrow_config": {"adapters": ["a", "b"]}}
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, adapter=arrow)
    result = run_cli("validate", recipe)
    assert (result.code, "these settings do not work for SEQ_CLS" in result.err) == (2, True)
