"""`peftkit compare`: what it trains, records and refuses, and that it goes on after it was killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from peftkit.run import Run
from tests.comparing import compared, in_this_process, recipe_to_vary
from tests.conftest import WORDS, rows_of, write_jsonl
from tests.runs import lines_of, peftkit_process, run_cli, tiny_recipe


@pytest.fixture(scope="module")
def recipe(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe to vary."""
    return recipe_to_vary(models_dir, tmp_path_factory.mktemp("varied"))


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four methods with two seeds, one of which cannot work on this model, sizes matched to that of the recipe's own."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    arguments = ("--methods", "lora,ia3,bottleneck,cpt", "--seeds", "2", "--skip-refused", "--match-params", "lora")
    with in_this_process():
        result = run_cli("compare", recipe, *arguments, "--budget", "tokens", "20", "--output", folder, "--json")
    assert result.code == 0, result.err
    assert result.json == compared(folder)
    return folder


def variants_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {variant["name"]: variant for variant in compared(folder)["variants"]}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_trial_is_a_run_with_its_figures_in_compare_json(done: Path) -> None:
    for name in ("lora", "ia3", "bottleneck"):
        for trial in variants_of(done)[name]["trials"]:
            summary = Run(done / trial["run_dir"]).read_status()["summary"]
            assert (trial["state"], trial["exit_code"], trial["steps"]) == ("done", 0, 3)
            assert trial["metrics"]["accuracy"] == summary["metrics_by_split"]["test"]["accuracy"]
            assert trial["trainable_params"] == summary["trainable_params"]
            assert trial["adapter_bytes"] == (done / trial["run_dir"] / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (compared(done)["metric"], compared(done)["split"], compared(done)["kind"]) == ("accuracy", "test", "compare")


def test_all_methods_read_the_same_rows_in_the_same_order(done: Path) -> None:
    for seed in (0, 1):
        rows = [
            [line["rows"] for line in lines_of(done / f"trials/{name}/seed-{seed}") if "loss" in line]
            for name in ("lora", "ia3")
        ]
        assert len(rows[0]) == 3
        assert rows[0] == rows[1]
    assert compared(done)["different_rows"] == []


def test_a_budget_of_tokens_ends_with_the_step_that_reaches_it(done: Path) -> None:
    targets = [line["target_tokens"] for line in lines_of(done / "trials/lora/seed-0") if "loss" in line]
    assert targets[-2] < 20 <= targets[-1]


def test_the_own_method_keeps_its_settings_and_others_get_theirs(done: Path) -> None:
    lora, ia3 = variants_of(done)["lora"], variants_of(done)["ia3"]
    assert (lora["overrides"], lora["learning_rate"], lora["learning_rate_source"]) == ({}, 0.01, "the recipe")
    assert (ia3["learning_rate"], ia3["overrides"]["adapter.method"]) == (3e-2, "ia3")
    assert "benchmarks" in ia3["learning_rate_source"]


def test_sizes_are_matched_or_it_is_said_why_not(done: Path) -> None:
    found = variants_of(done)
    assert "no size to choose" in found["ia3"]["size_note"]
    assert abs(found["bottleneck"]["trainable_params"] / found["lora"]["trainable_params"] - 1) < 0.05
    assert found["bottleneck"]["overrides"]["adapter.bottleneck_dim"] > 2
    assert found["bottleneck"]["trials"][0]["trainable_params"] == found["bottleneck"]["trainable_params"]


def test_what_was_refused_stays_in_the_table(done: Path) -> None:
    (trial,) = variants_of(done)["cpt"]["trials"]
    assert (trial["state"], trial["exit_code"]) == ("refused", 2)
    assert "does not work for SEQ_CLS" in trial["error"]


def test_results_are_written_in_peft_s_layout_too(done: Path) -> None:
    found = json.loads((done / "peft_results" / "lora-seed-1.json").read_text(encoding="utf-8"))
    assert set(found) == {"run_info", "train_info", "meta_info"}
    assert (found["run_info"]["experiment_name"], found["run_info"]["train_config"]["seed"]) == ("lora/lora-seed-1", 1)
    assert (found["run_info"]["peft_config"]["peft_type"], found["train_info"]["status"]) == ("LORA", "success")
    trial = variants_of(done)["lora"]["trials"][1]
    last = found["train_info"]["metrics"][-1]
    assert (last["test accuracy"], last["train total tokens"]) == (trial["metrics"]["accuracy"], trial["target_tokens"])


def test_the_file_in_the_directory_is_the_same_comparison(done: Path, recipe: Path) -> None:
    written = yaml.safe_load((done / "compare.yaml").read_text(encoding="utf-8"))["compare"]
    assert (written["recipe"], list(written["variants"]), written["seeds"]) == (
        str(recipe),
        ["lora", "ia3", "bottleneck", "cpt"],
        2,
    )
    before = (done / "compare.json").stat().st_mtime_ns
    result = run_cli("compare", done, "--resume")
    assert (result.code, compared(done)["variants"][0]["trials"][0]["state"]) == (0, "done")
    assert (done / "compare.json").stat().st_mtime_ns > before
    assert "cpt was refused: " in result.out
    assert "`cpt` does not work for SEQ_CLS" in result.out


def test_a_failure_is_recorded_and_tried_again_when_asked(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    broken = {"methods": ["head"], "variants": {"wild": {"training.learning_rate": 1e38, "training.max_grad_norm": None}}}
    file = tmp_path / "wild.yaml"
    file.write_text(yaml.safe_dump({"compare": {"recipe": str(recipe)} | broken}), encoding="utf-8")
    with in_this_process():
        first = run_cli("compare", file, "--output", folder)
        kept = run_cli("compare", folder, "--resume")
        again = run_cli("compare", folder, "--resume", "--retry-failed")
    assert (first.code, kept.code, again.code) == (5, 5, 5)
    (trial,) = variants_of(folder)["wild"]["trials"]
    assert (trial["state"], trial["exit_code"]) == ("failed", 5)
    assert "wild, seed 0: exit 5: step 1: a weight is nan" in first.out
    assert ("[2/2]" in kept.err, "[2/2] wild, seed 0: step 1" in again.err) == (False, True)
    assert variants_of(folder)["head"]["trials"][0]["state"] == "done"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "lora,cpt,adaption_prompt"), "variant `adaption_prompt`: adapter.method: `adaption_prompt` does not"),
        (("--methods", "lorra"), "did you mean `lora`?"),
        ((), "names nothing to compare"),
        (("--methods", "lora", "--budget", "hours", "2"), "the unit is one of steps, tokens, seconds, not `hours`"),
        (("--methods", "lora", "--metric", "acuracy"), "did you mean `accuracy`?"),
        (("--methods", "lora", "--retry-failed"), "has no effect without --resume"),
        (("--methods", "lora", "--set", "training.max_seconds=9"), "would leave every trial unfinished"),
        (("--methods", "lora,ia3", "--match-params", "vera"), "`vera` is not compared"),
        (("--methods", "lora", "--seeds", "two"), "takes a number of seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    recipe: Path, tmp_path: Path, arguments: Any, words: str
) -> None:
    with in_this_process():
        result = run_cli("compare", recipe, *arguments, "--output", tmp_path / "out")
    assert (result.code, words in result.err) == (2, True), result.err
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_is_killed_takes_its_trials_along_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    arguments = ("--methods", "head", "--output", folder, "--set", "training.logging_steps=1", "--budget", "steps", "600")
    arguments += ("--set", "training.eval_steps=600", "--set", "training.save_steps=600")
    with peftkit_process("compare", recipe, *arguments) as process:
        lines = folder / "trials/head/seed-0/metrics.jsonl"
        wait_for(lambda: lines.is_file() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        (trial,) = psutil.Process(process.pid).children()
        trial.suspend()  # so that it is not done before the end
        refused = run_cli("compare", folder, "--resume")
        assert (refused.code, f"is in use by process {process.pid}" in refused.err) == (2, True)
        process.send_signal(signal.SIGKILL)
        trial.resume()
    wait_for(lambda: not trial.is_running() or trial.status() == psutil.STATUS_ZOMBIE)
    step = Run(folder / "trials/head/seed-0").read_status()["step"]
    assert compared(folder)["variants"][0]["trials"][0]["state"] == "running"
    with in_this_process():
        result = run_cli("compare", folder, "--resume")
    assert result.code == 0, result.err
    assert (compared(folder)["variants"][0]["trials"][0]["steps"], 0 < step < 600) == (600, True)


def test_a_signal_ends_a_comparison_with_its_trials_at_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"

    class Signalled:
        def __init__(self, *arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            self.heard: list[int] = []

        def send_signal(self, number: int) -> None:
            self.heard.append(number)

        def poll(self) -> int | None:
            return 75 if self.heard == [signal.SIGTERM] else None

    with in_this_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftkit.comparison.trials.start_trial", Signalled)
        result = run_cli("compare", recipe, "--methods", "lora,ia3", "--output", folder)
    assert result.code == 75
    assert f"peftkit compare {folder} --resume" in result.err
    assert [variant["trials"][0]["state"] for variant in compared(folder)["variants"]] == ["pending", "pending"]


def test_a_budget_of_seconds_becomes_steps_by_a_timed_run(recipe: Path, tmp_path: Path) -> None:
    with in_this_process():
        result = run_cli("compare", recipe, "--methods", "head", "--budget", "seconds", "0.1", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    variant = compared(tmp_path / "out")["variants"][0]
    assert variant["trials"][0]["steps"] == variant["steps"]["0"] > 1
    assert len([line for line in lines_of(tmp_path / "out/trials/head/timing") if "loss" in line]) == 25


def test_forgetting_is_the_growth_of_the_loss_on_other_text(models_dir: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "text.jsonl", [{"text": " ".join(WORDS[place : place + 9])} for place in range(12)])
    held_out = {"validation": str(write_jsonl(tmp_path / "v.jsonl", rows_of("CAUSAL_LM", 5)))}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data=held_out, training={"max_steps": 2})
    variants = {
        "still": {"training.learning_rate": 1e-12},
        "far": {"training.learning_rate": 1.0},
        "full": {"adapter.method": "full"},
    }
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"compare": {"recipe": str(recipe), "variants": variants, "forgetting": str(rows)}}))
    with in_this_process():
        result = run_cli("compare", file, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    found = {name: variant["trials"][0]["forgetting"] for name, variant in variants_of(tmp_path / "out").items()}
    assert abs(found["still"]) < 1e-5 < abs(found["full"]) < abs(found["far"])
    assert "validation rows chose the step that is kept too" in result.out
