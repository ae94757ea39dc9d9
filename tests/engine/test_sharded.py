"""Weights, gradients and optimizer that processes share out: the same losses, adapters and checkpoints as one process has."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.matrix import SETTINGS
from tests.runs import curve, peftkit_process, tiny_recipe, train

CONFIGS = Path(__file__).parents[2] / "configs"
DEEPSPEED = Path(sys.prefix) / "deepspeed"  # where `make test` puts it: imported by those runs alone
LORA = {"method": "lora", "r": 4, "lora_alpha": 8}
TRAINING = {"micro_batch_size": 2, "save_steps": 3}
NF4 = {"bits": 4, "quant_storage": "float32"}


def launched(recipe: Path, run: Path, config: str, *arguments: Any) -> tuple[int, str, str]:
    """Train as a shipped launch file says, on the CPU; exit code, stdout, stderr."""
    if config.startswith("deepspeed") and not DEEPSPEED.is_dir():
        pytest.skip("DeepSpeed is not installed")
    settings = {"PEFTKIT_FSDP_ON_CPU": "1"}
    if config.startswith("deepspeed"):
        settings |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join([str(CONFIGS.parent), str(DEEPSPEED)])}
    launch = ("--launch", CONFIGS / f"{config}.yaml")
    process = peftkit_process("train", recipe, "--output", run, *launch, "--json", *arguments, environment=settings)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "adapter").glob("*.safetensors")
    return load_file(file)


def assert_same_run(run: Path, expected: Path) -> None:
    """Losses and norms to six digits; the same tensors, none empty, none that the lone process did not save."""
    for line, other in zip(curve(run, "loss", "grad_norm"), curve(expected, "loss", "grad_norm"), strict=True):
        assert line == pytest.approx(other, rel=2e-6, abs=2e-6)
    adapter, one = adapter_of(run), adapter_of(expected)
    assert adapter.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(adapter[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "task", "adapter", "sections"),
    [
        ("single", "CAUSAL_LM", LORA, {}),
        ("ddp", "CAUSAL_LM", LORA, {}),
        ("fsdp2", "CAUSAL_LM", LORA, {"data": {"validation": 0.25, "packing": True}}),
        ("fsdp2", "SEQ_CLS", LORA, {}),
        ("fsdp2", "FEATURE_EXTRACTION", LORA, {}),
        ("fsdp2", "CAUSAL_LM", {"method": "adalora"}, {}),  # its adapter stays whole
        ("fsdp2", "CAUSAL_LM", {"method": "prefix_tuning", **SETTINGS["prefix_tuning"]}, {}),
        ("fsdp2", "CAUSAL_LM", LORA, {"training": TRAINING | {"optim": "adafactor"}}),
        ("fsdp2_qlora", "CAUSAL_LM", LORA, {"model": {"quantization": NF4}}),
        ("deepspeed_zero2", "CAUSAL_LM", LORA, {}),
        ("deepspeed_zero3", "CAUSAL_LM", LORA, {}),
        ("deepspeed_zero3", "SEQ_CLS", LORA, {}),
        ("tensor_parallel", "CAUSAL_LM", LORA, {"training": TRAINING | {"max_grad_norm": 0.05}}),  # clips
        ("context_parallel", "CAUSAL_LM", LORA, {"data": {"validation": 0.25, "packing": True}}),
    ],
)
def test_launch_files_train_like_one_process(
    models_dir: Path, tmp_path: Path, config: str, task: str, adapter: Any, sections: Any
) -> None:
    settings = {"training": TRAINING, "data": {"validation": 0.25}} | sections
    recipe = tiny_recipe(task, models_dir, tmp_path, adapter=adapter, **settings)
    train(recipe, tmp_path / "one")
    code, out, err = launched(recipe, tmp_path / "run", config)
    assert code == 0, err
    assert json.loads(out)["certificate"]["passed"]
    assert_same_run(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fsdp2", "fsdp2"),
        ("fsdp2", "single"),
        ("ddp", "fsdp2"),
        ("deepspeed_zero3", "deepspeed_zero2"),
        ("tensor_parallel", "ddp"),
        ("context_parallel", "ddp"),
    ],
)
def test_a_run_goes_on_another_way_than_it_began(models_dir: Path, tmp_path: Path, first: str, second: str) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=TRAINING, data={"validation": 0.25})
    train(recipe, tmp_path / "one")
    run = tmp_path / "run"
    code, _, err = launched(recipe, run, first)
    assert code == 0, err
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/step-000006")
    (run / "status.json").write_text(json.dumps({"state": "stopped", "step": 3}))
    code, _, err = launched(recipe, run, second, "--resume")
    assert code == 0, err
    assert_same_run(run, tmp_path / "one")


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        ("fsdp2", ["adapter={method: full}", "training.optim=adafactor"], "training.optim: `adafactor` looks at whole tensors"),
        ("fsdp2", ["model.quantization={bits: 8}"], "model.quantization: FSDP cannot share these layers out"),
        ("deepspeed_zero3", ["model.quantization={bits: 4}"], "model.quantization: DeepSpeed cannot share these layers out"),
        ("deepspeed_zero2", ["adapter={method: adalora}"], "adapter.method: `adalora` looks at gradients after each step"),
        (
            "tensor_parallel",
            ["adapter={method: ia3}"],
            "adapter.method: PEFT cannot divide `ia3` like the layers that it is in",
        ),
        ("tensor_parallel", ["adapter.use_dora=true"], "adapter.use_dora: `True` needs whole layers"),
        ("tensor_parallel", ["model.quantization={bits: 4}"], "model.quantization: quantised layers cannot be divided"),
        ("deepspeed_zero2", ["training.mixed_precision=fp16"], "training.mixed_precision: fp16 has a loss scale"),
        (
            "context_parallel",
            ["adapter={method: p_tuning}"],
            "adapter.method: `p_tuning` with tokens shared out among processes",
        ),
        ("context_parallel", ["data.packing=false"], "data.packing: false: processes that share out tokens"),
        ("context_parallel", ["training.torch_compile=true"], "training.torch_compile: true: processes that share out tokens"),
        ("context_parallel", ["model.attn_implementation=eager"], "model.attn_implementation: `eager`: processes that share"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_any_process_starts(
    cli: Any, models_dir: Path, tmp_path: Path, config: str, changes: list[str], words: str
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    result = cli("train", recipe, "--launch", CONFIGS / f"{config}.yaml", *(f"--set={change}" for change in changes))
    assert (result.code, words in result.err.replace("\n", " ")) == (2, True), result.err


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("SEQ_CLS", [], "transformers has no plan to divide a `bert` by"),
        ("CAUSAL_LM", ["model.config_overrides={num_key_value_heads: 1}"], "its 1 key_value_heads cannot be divided among 2"),
        ("CAUSAL_LM", ["adapter.target_modules=[lm_head]"], "`lm_head` is divided as `colwise_gather_output`"),
    ],
)
def test_models_that_cannot_be_divided_are_known_without_weights(
    cli: Any, models_dir: Path, tmp_path: Path, task: str, changes: list[str], words: str
) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path)
    result = cli("plan", recipe, "--launch", CONFIGS / "tensor_parallel.yaml", *(f"--set={change}" for change in changes))
    assert (result.code, words in result.err.replace("\n", " ")) == (2, True), result.err


@pytest.mark.parametrize(
    ("parallelism", "words"),
    [
        ("{parallelism_config_tp_size: 4}", "parallelism_config_tp_size: 4 is not num_processes, 2"),
        ("{parallelism_config_cp_size: 3}", "parallelism_config_cp_size: 3 does not divide num_processes, 2"),
        ("{parallelism_config_cp_size: 2, parallelism_config_tp_size: 2}", "do not go together: use one"),
        ("{parallelism_config_sp_size: 2}", "parallelism_config_sp_size: 2 is not supported: DeepSpeed's way"),
        ("{parallelism_config_dp_shard_size: 2}", "processes that share out weights are FSDP2's"),
    ],
)
def test_parallelism_that_is_not_there_is_refused(
    cli: Any, models_dir: Path, tmp_path: Path, parallelism: str, words: str
) -> None:
    (tmp_path / "bad.yaml").write_text(f"num_processes: 2\nparallelism_config: {parallelism}\n")
    result = cli("train", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--launch", tmp_path / "bad.yaml")
    assert (result.code, words in result.err.replace("\n", " ")) == (2, True), result.err


@pytest.mark.parametrize("key", ["fsdp_cpu_ram_efficient_loading", "fsdp_activation_checkpointing"])
def test_settings_of_fsdp_that_would_contradict_the_run_are_refused(
    cli: Any, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("PEFTKIT_FSDP_ON_CPU", "1")
    (tmp_path / "bad.yaml").write_text(f"distributed_type: FSDP\nfsdp_config: {{fsdp_version: 2, {key}: true}}\n")
    result = cli("train", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--launch", tmp_path / "bad.yaml")
    assert (result.code, f"fsdp_config.{key}" in result.err) == (2, True)


def test_a_file_that_states_the_least_is_filled_up(models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.launch import Launch, resolve

    monkeypatch.setenv("PEFTKIT_FSDP_ON_CPU", "1")
    (tmp_path / "least.yaml").write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n")
    settings = resolve(Launch(2, tmp_path / "least.yaml"), "auto")["fsdp_config"]
    assert settings["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert settings["fsdp_cpu_ram_efficient_loading"] is False


def test_fsdp_of_the_first_kind_is_refused(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_sharding_strategy: FULL_SHARD}\n"
    )
    result = cli("train", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--launch", tmp_path / "old.yaml")
    assert result.code == 2
    assert "fsdp_version: 1 is not supported; use 2" in result.err
