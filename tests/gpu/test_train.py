"""Every task and precision from the recipe to the certificate, and the same losses as on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import rows_of, write_jsonl
from tests.gpu.processes import finish, start, train_alone
from tests.runs import curve, run_cli, tiny_recipe, train

TASKS = ["SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
DTYPES = ["float32", "bfloat16", "float16"]
AND_COUNT = """
from peftkit.cli import main
try:
    main()
finally:
    import torch
    assert torch.cuda.max_memory_allocated() == 0
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_language_model_is_trained_certified_asked_and_merged(models_dir: Path, tmp_path: Path, dtype: str) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"dtype": dtype}, training={"max_steps": 12})
    summary = train(recipe, tmp_path / "run")
    losses = [loss for (loss,) in curve(tmp_path / "run", "loss")]
    assert summary["certificate"]["passed"]
    assert losses[-1] < losses[0]
    assert summary["peak_memory_bytes"] < 2**28
    source = write_jsonl(tmp_path / "in.jsonl", rows_of("CAUSAL_LM", 7))
    asked = run_cli("infer", "--adapter", tmp_path / "run", "--input", source, "--output", tmp_path / "out.jsonl")
    assert asked.code == 0, asked.err
    assert len([json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]) == 7
    merged = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["max_abs_diff_saved"] <= merged.json["tolerance"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_evaluated_and_certified(models_dir: Path, tmp_path: Path, task: str, dtype: str) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path, model={"dtype": dtype}, data={"validation": 0.25})
    summary = train(recipe, tmp_path / "run")
    assert summary["certificate"]["passed"]
    assert summary["metrics"]
    assert all(norm > 0 for (norm,) in curve(tmp_path / "run", "grad_norm"))


@pytest.mark.parametrize("method", ["full", "ia3", "prefix_tuning", "bottleneck", "ln_tuning"])
def test_a_method_is_trained_and_certified(models_dir: Path, tmp_path: Path, method: str) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter={"method": method}, training={"learning_rate": 1e-3})
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "QUESTION_ANS"])
def test_float32_gives_the_losses_of_the_cpu(models_dir: Path, tmp_path: Path, task: str) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path, model={"dtype": "float32"})
    train_alone(recipe, tmp_path / "cpu", PEFTKIT_DEVICE="cpu")
    train(recipe, tmp_path / "gpu")
    found, expected = (curve(tmp_path / name, "loss", "grad_norm") for name in ("gpu", "cpu"))
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_run_that_is_kept_on_the_cpu_leaves_the_gpu_alone(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    arguments: list[Any] = ["train", recipe, "--output", tmp_path / "run"]
    result = finish(start(*arguments, program=AND_COUNT, PEFTKIT_DEVICE="cpu"))
    assert result.code == 0, result.err[-2000:]
    asked = ["infer", "--adapter", tmp_path / "run", "--prompt", "a cat"]
    result = finish(start(*asked, program=AND_COUNT, PEFTKIT_DEVICE="cpu"))
    assert result.code == 0, result.err[-2000:]
