"""The training loop: the same numbers for every split of a step, and every setting that changes what is learned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import label_rows, write_jsonl
from tests.runs import curve, lines_of, peftkit_process, run_cli, tiny_recipe, train

TASKS = ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"]
SIX_DIGITS = 2e-6
VALIDATION = {"validation": 0.25}
# What is learned from train is wrong here: the evaluation gets worse with every step.
SWAPPED = [row | {"label": "neg" if row["label"] == "pos" else "pos"} for row in label_rows(21)]


@pytest.fixture(scope="module")
def one_pass(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a task with each step in one forward pass; trained once."""
    runs: dict[str, Path] = {}

    def get(task: str) -> Path:
        if task not in runs:
            folder = tmp_path_factory.mktemp(task)
            train(tiny_recipe(task, models_dir, folder), folder / "run", "--set", "training.micro_batch_size=8")
            runs[task] = folder / "run"
        return runs[task]

    return get


@pytest.fixture
def run_with(models_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train CAUSAL_LM with changed sections; the run directory."""

    def run(*arguments: str, task: str = "CAUSAL_LM", name: str = "run", **sections: Any) -> Path:
        train(tiny_recipe(task, models_dir, tmp_path, **sections), tmp_path / name, *arguments)
        return tmp_path / name

    return run


def assert_same_curve(left: Path, right: Path, tolerance: float = SIX_DIGITS) -> None:
    ours, theirs = curve(left, "step", "loss", "grad_norm"), curve(right, "step", "loss", "grad_norm")
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("micro", [4, 2, 1, 3])
@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradient_are_the_same_for_every_micro_batch_size(run_with: Any, one_pass: Any, task: str, micro: int) -> None:
    assert_same_curve(run_with(f"--set=training.micro_batch_size={micro}", task=task), one_pass(task))


def test_the_last_step_of_an_epoch_holds_the_rows_that_are_left(one_pass: Any) -> None:
    counts = [line["target_tokens"] for line in lines_of(one_pass("SEQ_CLS"))]
    assert counts == [8, 16, 21, 29, 37, 42]


@pytest.mark.parametrize(("task", "micro"), [("CAUSAL_LM", 2), ("SEQ_CLS", 3), ("FEATURE_EXTRACTION", 8)])
def test_two_processes_train_like_one(models_dir: Path, tmp_path: Path, one_pass: Any, task: str, micro: int) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path, training={"micro_batch_size": micro})
    process = peftkit_process("train", recipe, "--output", tmp_path / "run", "--processes", 2, "--json", cold=task == "SEQ_CLS")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert out.count("\n") == 1
    assert_same_curve(tmp_path / "run", one_pass(task))
    for name, tensor in adapter_of(one_pass(task)).items():
        torch.testing.assert_close(adapter_of(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-5)


def test_processes_without_a_row_to_evaluate_keep_nobody_waiting(models_dir: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "eval_steps": 2}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data=VALIDATION, training=settings, evaluation={"max_rows": 1})
    process = peftkit_process("train", recipe, "--output", tmp_path / "run", "--processes", 2, "--json")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_the_initial_adapter_does_not_depend_on_what_was_drawn_before(models_dir: Path, tmp_path: Path) -> None:
    from peftkit.engine.adapter import attach_adapter, trainable_state
    from peftkit.engine.hardware import detect_hardware
    from peftkit.engine.hooks import Context
    from peftkit.engine.model import base_of, load_base_model
    from peftkit.plan import make_plan
    from peftkit.recipe import load_recipe
    from peftkit.tasks.encoding import Encoding

    plan = make_plan(load_recipe(tiny_recipe("CAUSAL_LM", models_dir, tmp_path)), detect_hardware())
    context = Context(plan, runtime=plan.task.runtime(None, Encoding(max_length=8)))
    states = []
    for process in range(2):
        model, missing = load_base_model(base_of(plan))
        torch.manual_seed(100 + process)
        states.append(trainable_state(attach_adapter(model, missing, context)))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(tensor.abs().sum() > 0 for tensor in states[0].values())


def test_the_gradient_norm_is_reported_before_clipping_and_applied_after(run_with: Any, one_pass: Any) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.001, "max_steps": 1}
    run = run_with(training=settings)
    # lora_B starts at zero, where lora_A has no gradient: after one step its norm is rate times clipped gradient norm.
    moved = math.sqrt(sum(float(t.pow(2).sum()) for name, t in adapter_of(run).items() if "lora_B" in name))
    assert moved == pytest.approx(0.5 * 0.001, rel=1e-3)
    assert curve(run, "grad_norm")[0] == pytest.approx(curve(one_pass("CAUSAL_LM"), "grad_norm")[0], rel=SIX_DIGITS)


def test_null_does_not_clip(run_with: Any) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_steps": 1}
    run = run_with("--set=training.max_grad_norm=null", training=settings)
    moved = math.sqrt(sum(float(t.pow(2).sum()) for name, t in adapter_of(run).items() if "lora_B" in name))
    assert moved == pytest.approx(0.5 * curve(run, "grad_norm")[0][0], rel=1e-3)


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler_type": "linear"}, [1 - step / 6 for step in range(6)]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 0.5}, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ({"lr_scheduler_type": "cosine"}, [cosine(step / 6) for step in range(6)]),
        ({"lr_scheduler_type": "constant"}, [1] * 6),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0, 1 / 2, 1, 1, 1, 1]),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
            [0.2 + 0.8 * cosine(step / 6) for step in range(6)],
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 2}},
            [0, 1 / 2, 1, 1, 1, 1 / 2],
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_learning_rate_follows_its_schedule(run_with: Any, settings: dict[str, Any], expected: list[float]) -> None:
    rates = [rate for (rate,) in curve(run_with(training=settings), "learning_rate")]
    assert rates == pytest.approx([0.01 * share for share in expected], abs=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_bnb_8bit"])
def test_every_optimizer_changes_the_adapter_and_nothing_else(run_with: Any, optimizer: str) -> None:
    run = run_with(training={"optim": optimizer})
    assert all(t.abs().max() > 0 for name, t in adapter_of(run).items() if "lora_B" in name)
    # What is trained is in the checkpoint; that the base stayed as it was is what the certificate (exit 0) has shown.
    trained = load_file(run / "checkpoints/step-000006/trainable.safetensors")
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}


def test_the_two_names_of_adamw_give_the_same_losses(run_with: Any, one_pass: Any) -> None:
    assert_same_curve(run_with(training={"optim": "adamw_torch"}), one_pass("CAUSAL_LM"), tolerance=1e-5)


def test_weight_decay_shrinks_matrices(run_with: Any, one_pass: Any) -> None:
    decayed = adapter_of(run_with(training={"weight_decay": 5.0}))
    plain = adapter_of(one_pass("CAUSAL_LM"))
    assert sum(float(t.norm()) for t in decayed.values()) < 0.9 * sum(float(t.norm()) for t in plain.values())


def test_lora_plus_gives_lora_b_a_rate_of_its_own(run_with: Any) -> None:
    run = run_with(training={"loraplus_lr_ratio": 16, "lr_scheduler_type": "constant"})
    saved = torch.load(run / "checkpoints/step-000006/optimizer.pt", weights_only=True)["optimizer"]
    rates = {round(group["lr"], 9) for group in saved["param_groups"] if group["params"]}
    assert rates == {0.01, 0.16}


def test_gradient_checkpointing_gives_the_same_losses(run_with: Any, one_pass: Any) -> None:
    assert_same_curve(run_with(training={"gradient_checkpointing": True}), one_pass("CAUSAL_LM"))


def test_neftune_disturbs_training_and_not_evaluation(run_with: Any) -> None:
    settings = {"learning_rate": 1e-12, "eval_steps": 2}  # so small that the weights are those of the start
    plain = run_with(data=VALIDATION, training=settings, name="plain")
    noisy = run_with(data=VALIDATION, training=settings | {"neftune_noise_alpha": 15}, name="noisy")
    for a, b in zip(curve(plain, "loss"), curve(noisy, "loss"), strict=True):
        assert abs(a[0] - b[0]) > 1e-5
    evaluations = [[line["metrics"]["loss"] for line in lines_of(run) if "split" in line] for run in (plain, noisy)]
    assert len(evaluations[0]) == 4  # after steps 2, 4, 6, and of the best at the end
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)


def test_dropout_disturbs_training_the_same_way_each_time(run_with: Any, one_pass: Any) -> None:
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.5}
    first, second = run_with(adapter=adapter, name="first"), run_with(adapter=adapter, name="second")
    assert curve(first, "loss", "grad_norm") == curve(second, "loss", "grad_norm")
    assert curve(first, "loss")[1] != pytest.approx(curve(one_pass("CAUSAL_LM"), "loss")[1], rel=1e-4)


def test_label_smoothing_is_used_in_training(run_with: Any, one_pass: Any) -> None:
    smooth = curve(run_with(training={"label_smoothing_factor": 0.5}), "loss")
    assert smooth[0] != pytest.approx(curve(one_pass("CAUSAL_LM"), "loss")[0], rel=1e-4)


def test_another_seed_is_another_run(run_with: Any, one_pass: Any) -> None:
    assert curve(run_with(training={"seed": 1}), "loss")[0] != pytest.approx(curve(one_pass("CAUSAL_LM"), "loss")[0], rel=1e-4)


def test_early_stopping_ends_the_run(run_with: Any) -> None:
    settings = {"eval_steps": 1, "early_stopping_patience": 2, "early_stopping_threshold": 100.0}
    run = run_with(data=VALIDATION, training=settings)
    assert [step for (step,) in curve(run, "step")] == [1, 2, 3]  # the first is the best; two more without a new best


def evaluated(run: Path, recipe_rows: Path) -> float:
    result = run_cli("evaluate", run, "--data", recipe_rows, "--json")
    assert result.code == 0, result.err
    return float(result.json["metrics"]["loss"])


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_adapter_is_the_best_or_the_last_as_asked(run_with: Any, tmp_path: Path, keep_best: bool) -> None:
    settings = {
        "eval_steps": 1,
        "load_best_model_at_end": keep_best,
        "early_stopping_patience": 9,
        "metric_for_best_model": "loss",
    }
    rows = write_jsonl(tmp_path / "swapped.jsonl", SWAPPED)
    run = run_with(task="SEQ_CLS", data={"validation": str(rows)}, training=settings)
    evaluations = [line for line in lines_of(run) if "split" in line]
    losses = [line["metrics"]["loss"] for line in evaluations[:6]]
    assert losses.index(min(losses)) < 5  # otherwise this test would show nothing
    assert evaluated(run, rows) == pytest.approx(min(losses) if keep_best else losses[-1], rel=1e-5)
    assert evaluations[-1]["step"] == (losses.index(min(losses)) + 1 if keep_best else 6)


@pytest.mark.parametrize("name", ["loss", "f1_macro"])
def test_the_metric_that_decides_can_be_named(run_with: Any, tmp_path: Path, name: str) -> None:
    rows = write_jsonl(tmp_path / "swapped.jsonl", SWAPPED)
    settings = {"eval_steps": 1, "metric_for_best_model": name, "learning_rate": 0.3}
    run = run_with(task="SEQ_CLS", data={"validation": str(rows)}, training=settings)
    evaluations = [line["metrics"][name] for line in lines_of(run) if "split" in line]
    best = min(evaluations) if name == "loss" else max(evaluations)
    assert best != evaluations[5]
    assert train_summary(run)["metrics"][name] == best


def train_summary(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "status.json").read_text())["summary"]
    return summary


@pytest.mark.parametrize(("limit", "kept"), [(1, [6]), (2, [4, 6]), (9, [2, 4, 6])])
def test_only_the_newest_checkpoints_are_kept(run_with: Any, limit: int, kept: list[int]) -> None:
    run = run_with(training={"save_steps": 2, "save_total_limit": limit})
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == [f"step-{step:06d}" for step in kept]


def test_logged_losses_are_means_over_the_targets_since_the_last_line(run_with: Any, one_pass: Any) -> None:
    run = run_with("--set=training.micro_batch_size=8", training={"logging_steps": 4})
    every = [line for line in lines_of(one_pass("CAUSAL_LM")) if "loss" in line]
    counts = [b["target_tokens"] - a["target_tokens"] for a, b in zip([{"target_tokens": 0}, *every], every, strict=False)]
    sums = [line["loss"] * count for line, count in zip(every, counts, strict=True)]
    expected = [[4, sum(sums[:4]) / sum(counts[:4])], [6, sum(sums[4:]) / sum(counts[4:])]]
    assert [pytest.approx(line, rel=1e-6) for line in expected] == curve(run, "step", "loss")


def test_progress_goes_to_stderr_and_one_object_to_stdout(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data=VALIDATION)
    result = cli("train", recipe, "--output", tmp_path / "run", "--json")
    assert result.code == 0
    assert result.out.count("\n") == 1
    assert result.json["global_step"] == 6
    assert "step 6/6  loss" in result.err
    assert "validation after step 6" in result.err


def test_the_tensorboard_tracker_gets_training_and_evaluation(run_with: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_with(data=VALIDATION, output={"report_to": ["tensorboard"]})
    events = min(run.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))  # hyperparameters lie deeper
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert {"train/loss", "train/learning_rate", "validation/loss"} <= set(accumulator.Tags()["scalars"])
    losses = [[event.step, event.value] for event in accumulator.Scalars("train/loss")]
    assert losses == [pytest.approx(line, rel=1e-6) for line in curve(run, "step", "loss")]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bf16_run_learns_and_passes_its_certificate(run_with: Any, one_pass: Any, dtype: str, task: str) -> None:
    run = run_with(task=task, model={"dtype": dtype}, training={"mixed_precision": "bf16"})
    assert train_summary(run)["certificate"]["passed"]
    assert curve(run, "loss")[0] == pytest.approx(curve(one_pass(task), "loss")[0], rel=2e-2)
    assert {tensor.dtype for tensor in adapter_of(run).values()} == {torch.float32}  # small updates are lost in 16 bits
