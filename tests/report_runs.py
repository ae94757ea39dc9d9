"""Run directories and comparisons written by hand, for tests of reports: what a run says need not be trained for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import write_jsonl

EVIL = "<script>alert(1)</script>"  # as a label and in a row
_CERTIFICATE = {"max_abs_diff": 0.0, "tolerance": 1e-4, "num_rows": 8, "passed": True}
_RECIPE: dict[str, Any] = {
    "task": "SEQ_CLS",
    "model": {"name_or_path": "owner/name"},
    "adapter": {"method": "lora", "r": 4},
    "data": {"train": "train.jsonl", "max_length": 60},
    "training": {"learning_rate": 0.01, "batch_size": 8},
}


def write_run(
    folder: Path,
    *,
    num_steps: int = 40,
    losses: Mapping[int, float] | None = None,
    spikes: Sequence[int] = (),
    status: dict[str, Any] | None = None,
    rate: float = 0.01,
    accuracy: float = 0.75,
) -> Path:
    """A run on two classes, one of them never right; its validation loss is lowest at step 30."""
    recipe = _RECIPE | {"training": _RECIPE["training"] | {"learning_rate": rate}}
    (folder / "evaluations").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    training = recipe["training"] | {"seed": 3, "weight_decay": 0.0}
    resolved = recipe | {"name": folder.name, "model": recipe["model"] | {"dtype": "float32"}, "training": training}
    (folder / "resolved.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
    environment = {
        "packages": {"torch": "2.13"},
        "argv": ["peftkit", "train", "--set", "training.seed=3"],
        "decided": {"model.dtype": "float32"},
        "rows": {"train": {"rows": 24, "examples": 24, "tokens": 200, "targets": 24, "lengths": {"min": 3, "max": 9}}},
        "parameters": {"trainable": 1234, "all": 12340, "by_module": [["layer.*.query", 1234, 2000], ["head", 0, 10]]},
    }
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    scores = {"validation": {"loss": 0.9, "accuracy": accuracy}}
    summary = {
        "metrics_by_split": scores,
        "trainable_params": 1234,
        "train_seconds": 0.5 * num_steps,
        "certificate": _CERTIFICATE,
    }
    summary |= {"peak_memory_bytes": 2**31, "predicted_memory_bytes": 2**30, "target_tokens_per_second": 200.0}
    done = {"state": "done", "step": num_steps, "summary": summary}
    (folder / "status.json").write_text(json.dumps(status or done), encoding="utf-8")
    write_jsonl(folder / "metrics.jsonl", _lines(num_steps, losses or {}, spikes, accuracy))
    _write_evaluation(folder)
    return folder


def _lines(num_steps: int, losses: Mapping[int, float], spikes: Sequence[int], accuracy: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [_evaluated(0, 2.0, 0.25)]
    for step in range(1, num_steps + 1):
        line = {"step": step, "loss": losses.get(step, 2.0 / step + step % 7 / 1000), "learning_rate": 0.01 / step}
        line |= {"grad_norm": 1.0, "target_tokens": 100 * step, "seconds": 0.5 * step, "memory_bytes": 2**31}
        lines.append(line | ({"spike": True} if step in spikes else {}))
        if step in (10, 20, 30, 40):
            lines.append(_evaluated(step, {10: 1.4, 20: 1.0, 30: 0.8, 40: 1.2}[step], accuracy))
    answers = [{"prompt": "2+2?", "prediction": EVIL}]
    return [*lines, _evaluated(30, 0.8, accuracy), {"step": 30, "split": "validation", "samples": answers}]


def _evaluated(step: int, loss: float, accuracy: float) -> dict[str, Any]:
    return {"step": step, "split": "validation", "metrics": {"loss": loss, "accuracy": accuracy}}


def _write_evaluation(folder: Path) -> None:
    rows = write_jsonl(folder / "rows.jsonl", [{"text": f"row {number} {EVIL}"} for number in range(1, 21)])
    predictions = [
        {
            "row": f"{rows}:{number}",
            "label": EVIL if number % 4 == 0 else "pos",
            "prediction": "pos",
            "probabilities": {"pos": 0.9, EVIL: 0.1},
            "loss_sum": 2.3 if number % 4 == 0 else 0.1,
            "num_targets": 1,
        }
        for number in range(1, 21)
    ]
    write_jsonl(folder / "evaluations" / "validation.predictions.jsonl", predictions)
    by_class = {
        "pos": {"precision": 0.75, "recall": 1.0, "f1": 0.857, "num_rows": 15},
        EVIL: {"precision": 0.0, "recall": 0.0, "f1": 0.0, "num_rows": 5},
    }
    metrics = {"loss": 0.8, "accuracy": 0.76, "by_class": by_class, "confusion": [[15, 0], [5, 0]]}
    text = json.dumps({"split": "validation", "num_rows": 20, "metrics": metrics})
    (folder / "evaluations" / "validation.json").write_text(text, encoding="utf-8")


def write_comparison(folder: Path, num_variants: int = 8, num_seeds: int = 3) -> Path:
    """Variants with rising accuracy and falling size; one trial of `method 3` has failed."""
    variants = []
    for number in range(num_variants):
        values = [0.5 + 0.05 * number + 0.01 * seed for seed in range(num_seeds)]
        trials = [_trial(folder, number, seed, value) for seed, value in enumerate(values)]
        mean = sum(values) / num_seeds
        size = 10_000 * 2 ** (number % 5)
        summary = {
            "accuracy": {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "values": values},
            "trainable_params": {"mean": size, "low": size, "high": size, "values": [size] * num_seeds},
        }
        facts = {"name": f"method {number}", "method": "lora", "overrides": {"adapter.r": number}, "learning_rate": 1e-3}
        variants.append(facts | {"trials": trials, "summary": summary, "pareto": number in (0, 7)})
    compared = {"kind": "compare", "name": "banking", "recipe": "banking.yaml", "task": "SEQ_CLS", "metric": "accuracy"}
    compared |= {"greater_is_better": True, "budget": {"steps": 40}, "seeds": [*range(num_seeds)], "variants": variants}
    (folder / "compare.json").write_text(json.dumps(compared), encoding="utf-8")
    return folder


def _trial(folder: Path, number: int, seed: int, accuracy: float) -> dict[str, Any]:
    where = f"trials/{number}/seed-{seed}"
    write_run(folder / where, rate=0.001 * (number + 1), accuracy=accuracy)
    trial = {"seed": seed, "run_dir": where, "state": "done", "exit_code": 0, "error": None, "metrics": {"accuracy": accuracy}}
    failed = {"state": "failed", "exit_code": 4, "error": "CUDA is out of memory", "metrics": {}}
    return trial | (failed if (number, seed) == (3, 2) else {})
