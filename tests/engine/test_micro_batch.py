"""`micro_batch_size: auto`, decided by the memory plan for the device at hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.engine import micro_batch
from peftkit.engine.limits import memory_of_process, usable_bytes
from peftkit.engine.memory import plan_memory
from peftkit.engine.micro_batch import kept_micro_batch, settle_micro_batch
from peftkit.engine.survey import Survey, survey
from peftkit.launch_file import Sharding
from peftkit.plan import Hardware, with_micro_batch
from peftkit.recipe import load_recipe
from peftkit.run import Run
from tests.conftest import Result
from tests.runs import tiny_recipe

CGROUP = Path("/proc/self/cgroup")
GPU = Hardware("cuda", "a GPU", True, 24 * 2**30)


@pytest.fixture
def surveyed(models_dir: Path, tmp_path: Path) -> Callable[..., Survey]:
    """A run of 16 rows a step on hardware with so much memory."""

    def make(hardware: Hardware = GPU, micro: int | str = "auto", **data: Any) -> Survey:
        training = {"batch_size": 16, "micro_batch_size": micro}
        recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=training, data=data)
        return survey(load_recipe(recipe), hardware=hardware)

    return make


def with_room_for(found: Survey, size: int) -> Survey:
    """The run on a GPU that has memory for just so many rows a pass."""
    total = plan_memory(dataclasses.replace(found, plan=with_micro_batch(found.plan, size, ""))).total
    memory = round(total * 1.09 + 512 * 2**20) + 1000
    hardware = dataclasses.replace(found.plan.hardware, memory_bytes=memory)
    return dataclasses.replace(found, plan=dataclasses.replace(found.plan, hardware=hardware))


def decided(found: Survey, sharding: Sharding = Sharding()) -> int:
    return settle_micro_batch(found, sharding).plan.micro_batch_size


def test_a_large_gpu_takes_the_whole_batch_in_one_pass(surveyed: Any) -> None:
    found = surveyed()
    assert (found.plan.micro_batch_size, decided(found)) == (8, 16)
    two = dataclasses.replace(GPU, num_processes=2)
    assert decided(surveyed(two), Sharding(2)) == 8


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_small_gpu_takes_the_most_that_fits(surveyed: Any, size: int) -> None:
    settled = settle_micro_batch(with_room_for(surveyed(), size), Sharding())
    assert settled.plan.micro_batch_size == size
    choice = next(choice for choice in settled.plan.choices if choice.key == "training.micro_batch_size")
    assert (choice.value, choice.reason) == (size, "the largest pass of use that fits into 0.0 GiB")


def test_what_does_not_fit_at_all_is_decided_and_said(surveyed: Any) -> None:
    settled = settle_micro_batch(surveyed(dataclasses.replace(GPU, memory_bytes=2**29)), Sharding())
    assert settled.plan.micro_batch_size == 1
    assert "even so the plan does not fit" in settled.plan.choices[-1].reason


def test_more_tokens_than_a_gpu_has_use_for_are_not_taken(surveyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = surveyed()
    monkeypatch.setattr(micro_batch, "USEFUL_TOKENS", 5 * float(found.data.sample.lengths.mean()))
    assert decided(found) == 4


def test_a_number_in_the_recipe_stays(surveyed: Any) -> None:
    found = surveyed(dataclasses.replace(GPU, memory_bytes=2**29), micro=8)
    assert settle_micro_batch(found, Sharding()) is found


def test_a_cpu_with_plenty_of_memory_is_not_planned_for(surveyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "plan_memory", None)
    found = surveyed(Hardware("cpu", "the CPU", True, 64 * 2**30))
    assert settle_micro_batch(found, Sharding()) is found


def test_a_cpu_with_little_memory_takes_less(surveyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = surveyed(Hardware("cpu", "the CPU", True, 64 * 2**30))
    four = dataclasses.replace(found, plan=with_micro_batch(found.plan, 4, ""))
    monkeypatch.setattr(micro_batch, "usable_bytes", lambda hardware: plan_memory(four).total)
    assert decided(found) == 4


def test_a_plan_that_cannot_be_made_leaves_a_few(surveyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("odd model")

    monkeypatch.setattr(micro_batch, "plan_memory", fail)
    settled = settle_micro_batch(surveyed(), Sharding())
    assert (settled.plan.micro_batch_size, settled.plan.choices[-1].reason[-8:]) == (8, "KeyError")


def test_a_run_is_kept_to_its_decision_on_a_machine_like_its_own(surveyed: Any, tmp_path: Path) -> None:
    plan, run = surveyed().plan, Run(tmp_path / "run")
    run.dir.mkdir()
    facts = {"device": "a GPU", "num_processes": 1, "decided": ["training.micro_batch_size"]}
    run.resolved_path.write_text("training: {micro_batch_size: 2}")
    for change, kept in [({}, 2), ({"device": "another"}, None), ({"num_processes": 2}, None), ({"decided": []}, None)]:
        run.environment_path.write_text(json.dumps(facts | change))
        assert kept_micro_batch(run, plan) == kept
    run.environment_path.write_text(json.dumps(facts))
    assert settle_micro_batch(surveyed(), Sharding(), run).plan.micro_batch_size == 2


def test_the_plan_shows_the_decision(models_dir: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    training = {"batch_size": 16, "micro_batch_size": "auto"}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training=training)
    found = cli("plan", recipe, "--fit", 24, "--json").json
    assert found["choices"]["training.micro_batch_size"]["value"] == 16
    assert found["fit"]["proposals"][0]["set"] == []


def test_processes_on_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Hardware("cpu", "the CPU", True, 2**20, num_processes=4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (memory_of_process(cpu), memory_of_process(dataclasses.replace(GPU, num_processes=4))) == (2**18, 24 * 2**30)
    assert usable_bytes(cpu) == round(0.9 * 2**18)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # four machines
    assert memory_of_process(cpu) == 2**20


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = [line[3:] for line in CGROUP.read_text().splitlines() if line.startswith("0::")] if CGROUP.is_file() else []
    if not own:
        pytest.skip("no control groups, version 2")
    folder = tmp_path / own[0].lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text("max\n")
    monkeypatch.setattr("peftkit.cgroups.ROOT", tmp_path)
    cpu = Hardware("cpu", "the CPU", True, 2**40)
    assert memory_of_process(cpu) == 2**40
    (folder / "memory.max").write_text(f"{2**30}\n")
    assert memory_of_process(cpu) == 2**30
