"""What a run is said to store, beside what it stores; and what `plan` and `train` tell of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from peftkit.engine import memory
from peftkit.engine.fit import HOLES, levers
from peftkit.engine.heap import heap_peak
from peftkit.engine.memory import MemoryPlan, plan_memory
from peftkit.engine.model import Base, base_of, load_base_model
from peftkit.engine.optim import build_optimizer
from peftkit.engine.quantized import bitsandbytes_layers
from peftkit.engine.stored import Stored, checkpoint_bytes, quantised_bytes, state_bytes, stored
from peftkit.engine.survey import survey
from peftkit.errors import RecipeError
from peftkit.launch import worker_sharding
from peftkit.launch_file import Sharding, read_sharding
from peftkit.methods import METHODS
from peftkit.plan import Hardware
from peftkit.recipe import load_recipe
from peftkit.recipe.fit import why_not
from peftkit.recipe.quantization import Quantization
from peftkit.tasks import TASKS
from tests.conftest import label_rows, write_jsonl
from tests.contracts.matrix import SETTINGS
from tests.runs import tiny_recipe, train

GPU = Hardware("cuda", "a GPU", True, 24 * 2**30)


def plan_of(recipe: Path, hardware: Hardware | None = None, **options: Any) -> MemoryPlan:
    """The memory of a recipe."""
    return plan_memory(survey(load_recipe(recipe), hardware=hardware), **options)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit"])
def test_the_state_of_an_optimizer_is_as_large_as_predicted(optim: str, lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    lm_recipe["training"]["optim"] = optim
    plan = survey(load_recipe(write_recipe(lm_recipe))).plan
    model = nn.Sequential(nn.Linear(96, 160), nn.Linear(160, 3))
    optimizer = build_optimizer(model, plan)
    model(torch.ones(2, 96)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    held = sum(state.untyped_storage().nbytes() for state in {s.untyped_storage()._cdata: s for s in states}.values())
    predicted = sum(state_bytes(optim, parameter.shape, 4, "cpu") for parameter in model.parameters())
    assert predicted == pytest.approx(held, abs=4 * 256 * 2 * 4 + 64)  # tables of 8-bit values, counts of steps


def test_pages_of_an_optimizer_are_not_on_the_gpu() -> None:
    assert state_bytes("paged_adamw_32bit", (1000, 1000), 4, "cuda") == 0
    assert state_bytes("paged_adamw_32bit", (100, 100), 4, "cuda") == 8 * 10_000


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_matrix_in_4_bits_is_as_large_as_predicted(double_quant: bool) -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(512, 384), quant_type="nf4", compress_statistics=double_quant
    )
    inner = [state.state2.absmax, state.state2.code, state.offset] if double_quant else []
    held = [packed, state.absmax, state.code, *inner]
    layout = Quantization("bitsandbytes", 4, double_quant=double_quant)
    assert quantised_bytes((512, 384), layout) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_a_matrix_in_8_bits_has_a_scale_a_row() -> None:
    assert quantised_bytes((512, 384), Quantization("bitsandbytes", 8)) == 512 * 384 + 4 * 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_matrix_of_hqq_is_as_large_as_predicted(bits: int, dtype: str) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    made = quantize.HQQLinear(nn.Linear(384, 512, bias=False), settings, compute_dtype=getattr(torch, dtype), device="cpu")
    held = [made.W_q, made.meta["scale"], made.meta["zero"]]
    layout = Quantization("hqq", bits, group_size=32, compute_dtype=dtype)
    assert quantised_bytes((512, 384), layout) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_a_matrix_of_torchao_is_as_large_as_predicted() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(384, 512, bias=False))
    quantization.quantize_(layers, quantization.Int8WeightOnlyConfig())
    weight: Any = layers[0].weight
    held = [weight.qdata, weight.scale, weight.zero_point]
    assert quantised_bytes((512, 384), Quantization("torchao", 8)) == sum(part.numel() * part.element_size() for part in held)


@pytest.mark.parametrize("adapter", [{"method": "lora"}, {"method": "lora", "modules_to_save": ["mlp"]}, {"method": "head"}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_plan_quantises_what_loading_does(
    models_dir: Path, tmp_path: Path, name: str, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "UNTRACEABLE", (ZeroDivisionError,))
    if name == "bert" and "modules_to_save" in adapter:
        adapter = adapter | {"modules_to_save": ["0.output"]}
    model = {"name_or_path": str(models_dir / name), "quantization": {"bits": 4}}
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    found = survey(load_recipe(tiny_recipe(task, models_dir, tmp_path, model=model, adapter=adapter)))
    layers = bitsandbytes_layers(load_base_model(base_of(found.plan), found.data.encoding)[0])
    assert len(stored(found.plan, found.blueprint.model).quantised) == len(list(layers)) > 0
    assert plan_memory(found).how.startswith("traced")


@pytest.mark.parametrize(
    ("sharding", "parts"),
    [
        (Sharding(2, "ddp"), (100, 8, 8, 16, 8)),
        (Sharding(2, "fsdp"), (70, 4, 4, 8, 0)),
        (Sharding(2, "zero2"), (100, 8, 4, 8, 0)),
        (Sharding(2, "zero1"), (100, 8, 8, 8, 0)),
        (Sharding(2, "zero3", offloads_optimizer=True), (70, 4, 4, 0, 0)),
        (Sharding(1, "zero2", offloads_optimizer=True), (100, 8, 8, 0, 0)),
        (Sharding(1, "fsdp", True, True), (20, 8, 8, 0, 0)),
    ],
)
def test_processes_share_what_their_launch_says(sharding: Sharding, parts: tuple[int, ...]) -> None:
    alone = Stored(weights=100, adapter=8, gradients=8, optimizer=16, step_scratch=0, targets=0, largest_block=10)
    one = alone.shared(sharding)
    assert (one.weights, one.adapter, one.gradients, one.optimizer, one.buckets) == parts
    assert alone.shared(Sharding(1)) is alone


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, Sharding(4, "ddp")),
        ({"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_version": 2}}, Sharding(2, "fsdp")),
        (
            {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}},
            Sharding(2, "zero2"),
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_offload_params": True}},
            Sharding(2, "fsdp", True, True),
        ),
        ({"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": {"zero_stage": 3}}, Sharding(8, "zero3")),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "cpu"}},
            Sharding(1, "zero2", offloads_optimizer=True),
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "offload_param_device": "cpu"}},
            Sharding(1, "zero2"),
        ),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD", "fsdp_reshard_after_forward": True},
            },
            Sharding(1, "ddp"),
        ),
    ],
)  # fmt: skip
def test_a_launch_file_says_how_processes_share(tmp_path: Path, facts: dict[str, Any], found: Sharding) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(facts), encoding="utf-8")
    assert read_sharding(None, path) == found


def test_a_file_of_deepspeed_says_how_processes_share(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    facts = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "zero.json")}}
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(facts | {"num_processes": 2}), encoding="utf-8")
    assert read_sharding(None, path) == Sharding(2, "zero3", offloads_weights=True)
    (tmp_path / "zero.json").unlink()
    with pytest.raises(RecipeError, match=r"deepspeed_config_file `.*` cannot be read as DeepSpeed's JSON"):
        read_sharding(None, path)


@pytest.mark.parametrize(("version", "kind"), [("1", "zero2"), ("2", "fsdp")])
def test_a_worker_reads_what_its_version_of_fsdp_does(monkeypatch: pytest.MonkeyPatch, version: str, kind: str) -> None:
    facts = {"VERSION": version, "SHARDING_STRATEGY": "SHARD_GRAD_OP", "RESHARD_AFTER_FORWARD": "true"}
    for name, value in facts.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert worker_sharding(2).kind == kind


def test_a_checkpoint_is_found_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1000)}, snapshot / "model.safetensors")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = Base("owner/name", TASKS["CAUSAL_LM"])
    assert checkpoint_bytes(base, "bfloat16") > 4000
    assert checkpoint_bytes(base, "float32") == 0


def test_a_shared_model_is_certified_beside_itself(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    path = write_recipe(lm_recipe)
    alone, shared = plan_of(path, GPU), plan_of(path, GPU, sharding=Sharding(2, "zero2"))
    whole = alone.phases["training"]["weights"] + alone.phases["training"]["adapter"]
    assert shared.phases["certificate"]["weights"] == shared.phases["training"]["weights"] + whole
    assert "certificate" not in plan_of(path, GPU, sharding=Sharding(2)).phases


def test_nothing_is_proposed_that_the_recipe_has(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    lm_recipe["training"] |= {"activation_offloading": True, "gradient_checkpointing": "selective"}
    offered = [setting for lever in levers(survey(load_recipe(write_recipe(lm_recipe)), hardware=GPU)) for setting, _ in lever]
    assert not [setting for setting in offered if "offloading" in setting or "checkpointing" in setting]


def test_a_launch_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("- a\n- b\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="is no launch file of accelerate"):
        read_sharding(None, path)


def test_a_heap_takes_no_less_than_what_is_in_use() -> None:
    events = [0, 1, ~0, 2, ~1, 3, ~2, ~3]
    sizes = [3 * 2**20, 5 * 2**20, 4 * 2**20, 100 * 2**20]
    assert heap_peak(events, sizes, set()) >= 104 * 2**20
    assert heap_peak(events, sizes, set()) == heap_peak(events, sizes, set())


def test_the_largest_pass_is_the_one_with_the_longest_rows(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    lm_recipe["training"] |= {"micro_batch_size": 2, "batch_size": 4, "max_steps": 30}
    lm_recipe["data"]["packing"] = False
    path = write_recipe(lm_recipe)
    longest = survey(load_recipe(path)).data.sample.lengths.max()
    assert plan_of(path).shape == (2, longest)


def test_packed_rows_are_planned_as_packs(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    lm_recipe["data"] |= {"packing": True, "max_length": 100}
    shape = plan_of(write_recipe(lm_recipe)).shape
    assert shape[1] > 60


def test_gradient_checkpointing_needs_less(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    plain = plan_of(write_recipe(lm_recipe), GPU).held.activations
    lm_recipe["training"]["gradient_checkpointing"] = True
    assert plan_of(write_recipe(lm_recipe), GPU).held.activations < plain


def test_a_gpu_is_planned_for_without_one(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    planned = plan_of(write_recipe(lm_recipe), GPU)
    assert planned.how.startswith("traced")
    assert set(planned.phases) == {"training", "optimizer"}


def test_several_processes_hold_copies_of_gradients(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    path = write_recipe(lm_recipe)
    one, two = plan_of(path, GPU), plan_of(path, GPU, sharding=Sharding(2))
    gradients = one.phases["optimizer"]["gradients"]
    assert two.phases["optimizer"]["overhead"] == one.phases["optimizer"]["overhead"] + gradients


def test_a_method_that_has_no_shapes_is_estimated_and_says_so(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    lm_recipe["adapter"] = {"method": "boft", "boft_block_size": 4}
    planned = plan_of(write_recipe(lm_recipe))
    assert planned.how.startswith("estimated: boft cannot be run on shapes")
    assert planned.held.activations > 0


def test_quantised_weights_are_counted_as_they_lie(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    plain = plan_of(write_recipe(lm_recipe), GPU).phases["training"]["weights"]
    lm_recipe["model"]["quantization"] = {"bits": 4}
    planned = plan_of(write_recipe(lm_recipe), GPU)
    assert planned.how.startswith("traced")
    assert planned.phases["training"]["weights"] < plain


def test_loading_holds_the_model_that_quantising_starts_from(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    def loading(quantization: Quantization, init: str) -> int:
        lm_recipe["model"] |= {"init": init, "quantization": {"bits": 4}}
        found = survey(load_recipe(write_recipe(lm_recipe)))
        plan, model = dataclasses.replace(found.plan, quantization=quantization), found.blueprint.model
        return memory._loading_bytes(plan, model, stored(plan, model))

    nf4, hqq = Quantization("bitsandbytes", 4), Quantization("hqq", 4, group_size=32, compute_dtype="float32")
    assert loading(nf4, "pretrained") == 0
    assert loading(nf4, "random") > loading(hqq, "random") > 4 * 2 * 32 * 32  # embeddings too; the layers alone


TRACED = [name for name, method in METHODS.items() if not method.num_tasks_field and "adapters" not in method.reads_adapters]


@pytest.mark.parametrize("method", TRACED)
def test_every_method_is_traced_or_says_why_not(
    method: str, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "UNTRACEABLE", (ZeroDivisionError,))  # nothing is caught: what fails is seen
    facts = METHODS[method]
    tasks = ("SEQ_CLS",) if method == "bitfit" else ("CAUSAL_LM", "SEQ_CLS")  # Llama has no biases
    task = next(task for task in tasks if task in facts.tasks and not why_not(facts, task, {}))
    recipe = tiny_recipe(task, models_dir, tmp_path, adapter={"method": method} | SETTINGS.get(method, {}))
    planned = plan_of(recipe, GPU)
    assert planned.how.startswith("traced") == (facts.trained_shapes is None)
    assert planned.held.activations > 0


@pytest.mark.parametrize("method", ["full", "head"])
def test_offloading_under_autocast_is_traced_where_the_model_is_the_base(
    method: str, lm_recipe: dict[str, Any], write_recipe: Any
) -> None:
    lm_recipe["adapter"] = {"method": method}
    lm_recipe["training"] |= {"activation_offloading": True, "mixed_precision": "bf16"}
    assert plan_of(write_recipe(lm_recipe), GPU).how.startswith("traced")


def test_views_of_weights_are_not_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []
    monkeypatch.setattr(memory.Away, "move_out", lambda self, tensor: moved.append(tensor.shape) or (lambda: tensor))
    model = nn.Linear(512, 1024, bias=False, device="meta").requires_grad_(False)
    inputs = torch.empty(2048, 512, device="meta", requires_grad=True)
    with memory._offloading(model, True):
        model(inputs).sum().backward()
    assert moved == []  # a product saves a view of its weight


Cli = Callable[..., Any]


def test_plan_tells_parts_and_phases(cli: Cli, write_recipe: Any, lm_recipe: dict[str, Any]) -> None:
    found = cli("plan", write_recipe(lm_recipe), "--json").json
    parts = found["memory_bytes"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert parts["total"] == max(found["memory_phases"].values()) == found["memory_phases"][found["memory_peak"]]
    assert found["memory_from"].startswith("traced: the model's own code, run on shapes; largest pass: 1 x ")


def test_fit_says_when_it_fits_as_it_is(cli: Cli, write_recipe: Any, lm_recipe: dict[str, Any]) -> None:
    path = write_recipe(lm_recipe)
    assert cli("plan", path, "--fit", 24, "--json").json["fit"]["proposals"][0]["set"] == []
    assert "it fits into 24.00 GiB as it is" in cli("plan", path, "--fit", 24).out


def test_fit_says_when_nothing_fits(cli: Cli, write_recipe: Any, lm_recipe: dict[str, Any]) -> None:
    path = write_recipe(lm_recipe)
    assert cli("plan", path, "--fit", 0.1, "--json").json["fit"]["proposals"] == []
    assert "nothing fits into 102.4 MiB" in cli("plan", path, "--fit", 0.1).out


def test_fit_proposes_settings_that_fit_the_fastest_first(cli: Cli, tmp_path: Path, models_dir: Path) -> None:
    training = {"micro_batch_size": 16, "batch_size": 16, "max_steps": 1}
    rows = {"train": str(write_jsonl(tmp_path / "l.jsonl", label_rows(24)))}
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, data=rows, training=training)
    as_it_is = cli("plan", recipe, "--fit", 24, "--json").json["memory_bytes"]["total"]
    gib = (as_it_is * HOLES * 0.99 + 512 * 2**20) / 2**30
    found = cli("plan", recipe, "--fit", gib, "--json").json["fit"]
    times = [proposal["relative_time"] for proposal in found["proposals"]]
    assert found["proposals"][0]["set"]
    assert times == sorted(times)
    assert all(proposal["gpu_bytes"] <= found["gpu_bytes"] for proposal in found["proposals"])
    settings = [part for text in found["proposals"][0]["set"] for part in ("--set", text)]
    assert cli("plan", recipe, "--fit", gib, "--json", *settings).json["fit"]["proposals"][0]["set"] == []


WRONG_OPTIONS = [(["--fit", "0"], "--fit"), (["--fit", "much"], "--fit"), (["--launch", "no.yaml"], "no file")]


@pytest.mark.parametrize(("arguments", "words"), WRONG_OPTIONS)
def test_wrong_options_of_plan_are_usage_errors(
    cli: Cli, write_recipe: Any, lm_recipe: dict[str, Any], arguments: list[str], words: str
) -> None:
    result = cli("plan", write_recipe(lm_recipe), *arguments)
    assert result.code == 2
    assert words in result.err


def test_train_tells_predicted_beside_measured(cli: Cli, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training={"max_steps": 1})
    summary = train(recipe, tmp_path / "run")
    assert summary["predicted_memory_bytes"] > 0
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert status["summary"]["predicted_memory_bytes"] == summary["predicted_memory_bytes"]
    assert "memory at most: " in cli("train", recipe, "--output", tmp_path / "again").out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells it in another way")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    ballast = b"1" * 2**30
    code = "from peftkit.engine.hardware import peak_memory_bytes; print(peak_memory_bytes('cpu'))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 2**26 < int(ran.stdout) < len(ballast)


def test_a_shared_model_that_fits_no_second_time_is_certified_on_the_cpu(lm_recipe: dict[str, Any], write_recipe: Any) -> None:
    path, sharding = write_recipe(lm_recipe), Sharding(2, "zero2")
    shared = plan_of(path, GPU, sharding=sharding)
    held = sum(shared.phases["training"][part] for part in ("weights", "adapter", "optimizer", "overhead"))
    whole = shared.phases["certificate"]["weights"] - shared.phases["training"]["weights"]
    small = dataclasses.replace(GPU, memory_bytes=held + 2 * whole - 1)
    assert "certificate" not in plan_of(path, small, sharding=sharding).phases
