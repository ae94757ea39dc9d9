"""Runs on the GPU that are stopped or killed, and answers with a cache that is laid out in advance."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import rows_of, write_jsonl
from tests.gpu.processes import finish, start
from tests.runs import curve, tiny_recipe, train


@pytest.mark.parametrize(("number", "dtype"), [(signal.SIGKILL, "float32"), (signal.SIGTERM, "float16")])
def test_an_interrupted_run_goes_on_with_the_same_losses(
    models_dir: Path, tmp_path: Path, dtype: str, number: signal.Signals
) -> None:
    adapter = {"method": "lora", "r": 4, "lora_dropout": 0.2}
    training = {"max_steps": 200, "save_steps": 5, "learning_rate": 1e-3}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter, training=training, model={"dtype": dtype})
    process = start("train", recipe, "--output", tmp_path / "run")
    while not any(path.name > "step-000015" for path in (tmp_path / "run/checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == (75 if number == signal.SIGTERM else -number)
    train(recipe, tmp_path / "run", "--resume")
    train(recipe, tmp_path / "whole")
    found, expected = (torch.tensor(curve(tmp_path / name, "loss", "grad_norm")) for name in ("run", "whole"))
    torch.testing.assert_close(found[:60], expected[:60], rtol=1e-3, atol=1e-3)


def test_a_cache_laid_out_in_advance_gives_the_answers_of_the_cpu(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"dtype": "float32"}, generation={"max_new_tokens": 12})
    source = write_jsonl(tmp_path / "in.jsonl", rows_of("CAUSAL_LM", 11))
    answers = {}
    for name, kind, variables in (
        ("gpu", "dynamic", {}),
        ("static", "static", {}),
        ("cpu", "dynamic", {"PEFTKIT_DEVICE": "cpu"}),
    ):
        run, output = tmp_path / kind, tmp_path / f"{name}.jsonl"
        if not run.exists():
            train(recipe, run, "--set", f"generation.cache_implementation={kind}")
        asked = finish(start("infer", "--adapter", run, "--input", source, "--output", output, "--batch-size", 4, **variables))
        assert asked.code == 0, asked.err
        answers[name] = [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(answers["gpu"]) == 11
    assert answers["gpu"] == answers["static"] == answers["cpu"]
