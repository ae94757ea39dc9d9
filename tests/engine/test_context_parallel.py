"""Rows whose tokens processes share out: losses, gradients and runs are those of one process."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contracts.test_packing import ARCHITECTURES
from tests.engine.test_sharded import CONFIGS, assert_same_run
from tests.forks import Forked
from tests.runs import peftkit_process, tiny_recipe, train


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_of_every_architecture_are_those_of_one_process(world: int) -> None:
    """Grouped heads, windows, soft caps, sinks, experts, learned positions; rows that lie in two processes, and padding."""
    command = [sys.executable, "-m", "tests.context_worker"]
    rest = [str(world), str(free_port()), *ARCHITECTURES, "llama4_text"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [Forked([*command, str(rank), *rest], **pipes) for rank in range(world)]
    out, err = zip(*(process.communicate(timeout=200) for process in processes), strict=True)
    assert not any(process.returncode for process in processes), err
    found = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in out[0].splitlines()}
    refused = {name for name, (loss, _) in found.items() if math.isnan(loss)}
    assert refused == {"falcon", "mpt"}
    assert {name: differ for name, differ in found.items() if name not in refused and max(differ) > 2e-6} == {}
    assert len(found) == len(ARCHITECTURES) + 1


def test_two_groups_of_two_under_fsdp_train_like_one_process(models_dir: Path, tmp_path: Path) -> None:
    training = {"learning_rate": 0.01, "max_steps": 4, "batch_size": 8, "micro_batch_size": 2, "gradient_checkpointing": True}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=training | {"logging_steps": 1})
    train(recipe, tmp_path / "one")
    facts = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text()) | {"num_processes": 4}
    launch = tmp_path / "launch.yaml"
    launch.write_text(yaml.safe_dump(facts | {"parallelism_config": {"parallelism_config_cp_size": 2}}))
    arguments = ("train", recipe, "--output", tmp_path / "run", "--launch", launch)
    process = peftkit_process(*arguments, environment={"PEFTKIT_FSDP_ON_CPU": "1"})
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "run", tmp_path / "one")


def test_the_plan_of_a_part_needs_less_memory_and_says_what_cannot_be_split(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training={"micro_batch_size": 8})
    launch = ("--launch", CONFIGS / "context_parallel.yaml")
    whole, part = (cli("plan", recipe, "--json", *extra).json["memory_bytes"] for extra in ((), launch))
    assert part["activations"] < 0.75 * whole["activations"]
    result = cli("plan", tiny_recipe("SEQ_CLS", models_dir, tmp_path), *launch)
    assert (result.code, "task: " in result.err) == (2, True), result.err
