"""The largest pass runs before the first step, leaves no trace, and decides on micro-batches that are left open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from peftkit.engine import first_pass
from peftkit.engine.examples import step_rows
from peftkit.engine.step import Step
from peftkit.engine.trainer import Trainer
from tests.conftest import Result, label_rows, write_jsonl
from tests.forks import Forked
from tests.runs import curve, lines_of, run_cli, tiny_recipe, train

LAST_ROW = step_rows(40, 8, 0, 4)[0]  # one of the last step
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dropout": ("CAUSAL_LM", {"adapter": {"method": "lora", "r": 4, "lora_dropout": 0.2}}),
    "packed": ("CAUSAL_LM", {"data": {"packing": True}}),
    "neftune": ("CAUSAL_LM", {"training": {"neftune_noise_alpha": 5.0}}),
    "bf16": ("SEQ_2_SEQ_LM", {"training": {"mixed_precision": "bf16"}}),
    "coupled": ("FEATURE_EXTRACTION", {"adapter": {"method": "lora", "r": 4, "lora_dropout": 0.2}}),
    "adalora": ("SEQ_CLS", {"adapter": {"method": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1}}),
    "windows": ("QUESTION_ANS", {"adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4}}),
    "recomputed": ("TOKEN_CLS", {"training": {"gradient_checkpointing": True}}),
    "stream": ("SEQ_CLS", {"data": {"train": {"path": "rows.jsonl", "streaming": True}, "labels": ["neg", "pos"]}}),
}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/step-000006/trainable.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_pass_leaves_everything_as_it_was(
    case: str, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, sections = CASES[case]
    recipe = tiny_recipe(task, models_dir, tmp_path, **sections)
    tried: list[int] = []
    plain = Trainer.try_pass
    monkeypatch.setattr(Trainer, "try_pass", lambda trainer, chunk: (tried.append(len(chunk)), plain(trainer, chunk)))
    # Also where the largest pass is in the first step, in which it would not be tried.
    found = first_pass.find_largest_pass
    monkeypatch.setattr(first_pass, "_pass_to_try", lambda t: found(t.plan, t.data, t.model))
    train(recipe, tmp_path / "with")
    monkeypatch.setattr("peftkit.engine.trainer.run_largest_pass", lambda trainer: None)
    train(recipe, tmp_path / "without")
    assert len(tried) == 1
    assert curve(tmp_path / "with", "loss", "grad_norm") == curve(tmp_path / "without", "loss", "grad_norm")
    one, other = tensors(tmp_path / "with"), tensors(tmp_path / "without")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_modules_keep_is_put_back() -> None:
    module = torch.nn.BatchNorm1d(3)
    module.register_buffer("frequencies", torch.ones(3))
    module.longest = 4  # type: ignore[assignment]
    with first_pass._unchanged(module):
        module(torch.randn(5, 3))
        module.register_buffer("frequencies", torch.zeros(3))
        module.longest, module.states = 9, torch.ones(1)  # type: ignore[assignment]
        after = torch.rand(1)
    assert (int(module.num_batches_tracked), module.longest, hasattr(module, "states")) == (0, 4, False)
    assert module.frequencies.tolist() == [1, 1, 1]
    torch.manual_seed(0)
    with first_pass._unchanged(module):
        after = torch.rand(1)
    assert torch.equal(torch.rand(1), after)


@pytest.fixture
def recipe_of(models_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A SEQ_CLS recipe of eight rows a step whose longest row comes last."""

    def write(micro_batch_size: int | str, **training: Any) -> Path:
        settings = {"micro_batch_size": micro_batch_size, "max_steps": 5} | training
        recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, training=settings)
        rows = label_rows(40)
        rows[LAST_ROW]["text"] = "the cat sat on a mat " * 5
        write_jsonl(tmp_path / "rows.jsonl", rows)
        return recipe

    return write


@pytest.fixture
def gpu_of_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A device that has memory for so many rows of a training pass."""
    plain = Step.forward

    def install(most: int) -> None:
        def forward(step: Step, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
            if step.training and len(batch["input_ids"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return plain(step, batch, **options)

        monkeypatch.setattr(Step, "forward", forward)

    return install


def micro_batch_size(run: Path) -> int:
    """What the run's resolved recipe says."""
    size: int = yaml.safe_load((run / "resolved.yaml").read_text())["training"]["micro_batch_size"]
    return size


def test_auto_is_halved_until_the_largest_pass_fits(recipe_of: Any, gpu_of_rows: Any, tmp_path: Path, cli: Any) -> None:
    gpu_of_rows(3)
    result: Result = cli("train", recipe_of("auto"), "--output", tmp_path / "auto", "--json")
    assert result.code == 0, result.err
    place = "out of memory in the largest pass, before the first step: 8 x"
    assert f"note: {place}" in result.err
    assert "going on with training.micro_batch_size 2, the same result" in result.err
    assert micro_batch_size(tmp_path / "auto") == 2
    assert "training.micro_batch_size" in json.loads((tmp_path / "auto/environment.json").read_text())["decided"]
    train(recipe_of(2), tmp_path / "two")
    assert curve(tmp_path / "auto", "loss", "grad_norm") == curve(tmp_path / "two", "loss", "grad_norm")


def test_a_number_is_never_changed_and_fails_before_the_first_step(
    recipe_of: Any, gpu_of_rows: Any, tmp_path: Path, cli: Any
) -> None:
    gpu_of_rows(2)
    result: Result = cli("train", recipe_of(4), "--output", tmp_path / "run")
    assert (result.code, lines_of_or_none(tmp_path / "run")) == (4, [])
    assert "out of memory on the CPU in the largest pass, before the first step: 4 x " in result.err
    assert f"its rows: {tmp_path / 'rows.jsonl'}:{LAST_ROW + 1}, " in result.err
    assert "The plan for its fullest moment, in training: " in result.err
    assert "training.micro_batch_size: 2  saves " in result.err
    assert micro_batch_size(tmp_path / "run") == 4


def lines_of_or_none(run: Path) -> list[Any]:
    return lines_of(run) if (run / "metrics.jsonl").is_file() else []


def test_without_memory_for_one_row_the_run_ends(recipe_of: Any, gpu_of_rows: Any, tmp_path: Path, cli: Any) -> None:
    gpu_of_rows(0)
    result: Result = cli("train", recipe_of("auto"), "--output", tmp_path / "run")
    assert result.code == 4
    assert "before the first step: 1 x " in result.err
    assert "training.micro_batch_size:" not in result.err
    assert "training.gradient_checkpointing: true  saves " in result.err


def test_what_the_plan_cannot_say_is_said_in_general(
    recipe_of: Any, gpu_of_rows: Any, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("peftkit.engine.exhausted.plan_memory", fail)
    gpu_of_rows(2)
    result: Result = cli("train", recipe_of(4), "--output", tmp_path / "run")
    assert result.code == 4
    assert "What helps:\n  training.micro_batch_size: 2 (same result, less at a time)\n" in result.err


def test_memory_that_runs_out_later_names_the_step(
    recipe_of: Any, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Trainer._update

    def update(trainer: Trainer, rows: Any) -> float:
        if trainer.progress.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(trainer, rows)

    monkeypatch.setattr(Trainer, "_update", update)
    result: Result = cli("train", recipe_of(4), "--output", tmp_path / "run")
    assert result.code == 4
    assert "out of memory on the CPU in step 3: 4 x " in result.err


def test_a_resumed_run_keeps_what_it_decided(recipe_of: Any, gpu_of_rows: Any, tmp_path: Path) -> None:
    gpu_of_rows(3)
    recipe = recipe_of("auto", save_steps=3)
    train(recipe, tmp_path / "run")
    whole = curve(tmp_path / "run", "loss")
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000005")
    (tmp_path / "run/status.json").write_text(json.dumps({"state": "stopped", "step": 3}))
    result = run_cli("train", recipe, "--output", tmp_path / "run", "--resume")
    assert result.code == 0, result.err
    assert "out of memory" not in result.err
    assert (micro_batch_size(tmp_path / "run"), curve(tmp_path / "run", "loss")) == (2, whole)


def losses(run: Path) -> list[float]:
    return [loss for (loss,) in curve(run, "loss")]


SCRIPT = """\
import os, sys, torch
from peftkit.engine.examples import step_rows
from peftkit.engine.step import Step
plain = Step.forward
def forward(step, batch, **options):
    if os.environ["RANK"] == "1" and step.training and len(batch["input_ids"]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return plain(step, batch, **options)
Step.forward = forward
from peftkit.cli import main
main()
"""


def test_all_processes_go_on_with_what_the_fullest_has_memory_for(recipe_of: Any, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "worker.py"), "train", str(recipe_of("auto")), "--output", str(tmp_path / "run")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PEFTKIT_DEVICE": "cpu"}
    process = Forked(command, stderr=subprocess.PIPE, text=True, env=environment)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 0, message
    assert message.count("going on with training.micro_batch_size 1") == 1
    assert micro_batch_size(tmp_path / "run") == 1
    train(recipe_of(1), tmp_path / "one")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
