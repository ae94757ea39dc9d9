"""Compiled layers: the same numbers, the same names, and nothing compiled anew for another length."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler

from peftkit.commands import train as command
from peftkit.engine import compiled
from tests.engine.test_savings import assert_same_step, gradients, model_of
from tests.runs import curve, run_cli, tiny_recipe, train

ON = "training.torch_compile=true"


@pytest.fixture(autouse=True)
def forget() -> None:
    """What other tests have compiled."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the layers without generating code for them, which takes most of the time."""
    monkeypatch.setattr(command, "compile_layers", functools.partial(compiled.compile_layers, backend="eager"))


def test_compiled_code_gives_the_loss_and_gradients_of_the_model_as_written() -> None:  # 30 s: a C++ compiler runs
    model = model_of("llama", num_hidden_layers=1)
    assert_same_step(model, lambda: compiled.compile_layers(model))


@pytest.mark.parametrize("checkpointing", [False, True, 1])
@pytest.mark.usefixtures("quick")
def test_a_run_is_the_same_and_certified(models_dir: Path, tmp_path: Path, checkpointing: Any) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"validation": 0.25})
    train(recipe, tmp_path / "plain")
    summary = train(recipe, tmp_path / "run", "--set", ON, "--set", f"training.gradient_checkpointing={checkpointing}")
    assert summary["certificate"]["passed"]
    for ours, plain in zip(curve(tmp_path / "run", "loss"), curve(tmp_path / "plain", "loss"), strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)
    names = [set(load_file(tmp_path / name / "adapter/adapter_model.safetensors")) for name in ("plain", "run")]
    assert names[0] == names[1]
    assert set(counters["graph_break"]) == set()


@pytest.mark.usefixtures("quick")
def test_a_compiled_run_goes_on_from_a_checkpoint(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training={"save_steps": 2, "torch_compile": True})
    train(recipe, tmp_path / "run")
    whole = curve(tmp_path / "run", "step", "loss")
    (tmp_path / "run/status.json").write_text('{"state": "stopped"}')
    (tmp_path / "run/checkpoints/step-000006").rename(tmp_path / "last")
    train(recipe, tmp_path / "run", "--resume")
    assert curve(tmp_path / "run", "step", "loss") == [pytest.approx(line, rel=1e-6) for line in whole]


def test_other_lengths_and_batches_are_not_compiled_anew() -> None:
    model = model_of("llama")
    compiled.compile_layers(model, backend="eager")
    counts = []
    for rows, length in ((4, 40), (3, 33), (2, 57), (5, 21), (4, 64)):
        ids = torch.arange(rows * length).view(rows, length) % 300
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        counts.append(counters["stats"]["unique_graphs"])
    assert len(set(counts)) == 1
    assert gradients(model)


def test_layers_compute_as_written_where_that_is_asked_for() -> None:
    model, calls = model_of("llama"), []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    for layer in compiled.repeated_layers(model):
        layer.compile(backend=backend)
    ids = torch.arange(8)[None]
    with compiled.uncompiled(model):
        model(input_ids=ids, use_cache=False)
    assert calls == []
    model(input_ids=ids, use_cache=False)
    assert calls


@pytest.mark.parametrize(("method", "why"), [("loha", "torch.compile breaks off in its layers"), ("lora", "")])
def test_methods_that_cannot_be_compiled_are_refused(models_dir: Path, tmp_path: Path, method: str, why: str) -> None:
    result = run_cli("validate", tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter={"method": method}), "--set", ON)
    assert (result.code, why in result.err) == ((2, True) if why else (0, True))


def test_a_machine_without_a_compiler_is_told_in_the_plan(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    result = run_cli("plan", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--set", ON)
    assert result.code == 2
    assert "training.torch_compile: needs a C++ compiler, this machine has none; install one (such as g++)" in result.err
