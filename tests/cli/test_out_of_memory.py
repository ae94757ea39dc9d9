"""Processes that really run out of memory: a limit on their address space, set when the libraries are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from peftkit.engine.examples import step_rows
from tests.conftest import WORDS, tiny_tokenizer, write_jsonl
from tests.forks import Forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS holds on Linux")

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}
LIMITED = """\
import resource, sys
import psutil
import peftkit.commands.train
from peftkit.cli import main
limit = psutil.Process().memory_info().vms + int(sys.argv.pop(1)) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""


@pytest.fixture
def limited(tmp_path: Path) -> Any:
    """Train on short rows, then on long ones, with so many MiB: `limited(500, "training.seed=1")`."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **ids, **SIZES).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(None)
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": " ".join(WORDS[number % 40 : number % 40 + 5]) + f" {number}"} for number in range(40)]
    for place in [place for step in (1, 2) for place in step_rows(40, 8, 0, step)]:
        rows[place] = {"text": " ".join(WORDS * 9) + f" {place}"}
    recipe = {
        "task": "CAUSAL_LM",
        "model": {"name_or_path": str(tmp_path / "model"), "init": "random"},
        "adapter": {"method": "lora", "target_modules": "all-linear"},
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "max_length": 1024, "truncation": "right"},
        "training": {"max_steps": 3, "batch_size": 8, "logging_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (tmp_path / "limited.py").write_text(LIMITED, encoding="utf-8")

    def run(mebibytes: int, *overrides: str) -> tuple[int, str]:
        settings = [part for text in overrides for part in ("--set", text)]
        command = [sys.executable, tmp_path / "limited.py", str(mebibytes), "train", tmp_path / "recipe.yaml"]
        command += ["--output", tmp_path / "run", *settings]
        process = Forked(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _, err = process.communicate()
        return process.returncode, err

    return run


def test_too_large_a_pass_fails_before_the_first_step_with_what_helps(limited: Any, tmp_path: Path) -> None:
    code, err = limited(900, "training.micro_batch_size=8")
    assert code == 4, err
    assert "out of memory on the CPU in the largest pass, before the first step: " in err
    assert f"its rows: {tmp_path}/rows.jsonl:" in err
    assert "The plan for its fullest moment, in training: " in err
    assert ", enough (same result, " in err
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 4


def test_auto_trains_with_what_fits(limited: Any, tmp_path: Path) -> None:
    code, err = limited(600)
    assert code == 0, err
    assert yaml.safe_load((tmp_path / "run/resolved.yaml").read_text())["training"]["micro_batch_size"] < 8
