"""Every method on every task on every kind of model: the settings of tiny runs, and what each cell must show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftkit.methods import METHODS
from peftkit.methods.base import Method
from tests.conftest import WORDS, instruction_rows, label_rows, write_jsonl
from tests.runs import run_cli

MODELS = {
    "llama": ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    "gpt2": ("CAUSAL_LM",),
    "bert": ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    "t5": ("SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
}
NUM_ROWS = 6
STEPS = 5

# Models of hidden size 32 need other sizes than real ones; everything else is the method's default.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamss": {"r": 8, "num_subspaces": 2},
    "c3a": {"block_size": 8},
    "cartridge": {"num_virtual_tokens": 4},
    "cpt": {
        "examples": [{"prompt": "the cat", "completion": "sat"}, {"prompt": "two dogs", "completion": "ran"}],
        "opt_projection_epsilon": 5.0,
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 0.1,
    },
    "fourierft": {"n_frequency": 100},
    "gralora": {"r": 8, "alpha": 16},
    "lora": {"r": 4, "lora_alpha": 8},
    "miss": {"r": 8},
    "multitask_prompt_tuning": {"num_virtual_tokens": 4, "num_tasks": 2},
    "p_tuning": {"num_virtual_tokens": 4},
    "poly": {"n_tasks": 2, "n_skills": 2},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "psoft": {"r": 8},
    "pvera": {"r": 16},
    "randlora": {"r": 8, "randlora_alpha": 16},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": list(range(60, 120))},
    "vblora": {"num_vectors": 16, "vector_length": 8},
    "vera": {"r": 16},
    "waveft": {"n_frequency": 100},
}
# Rates for five steps of full-batch training on random models; a method's own is for long runs on trained ones.
RATES: dict[str, float] = {
    "fourierft": 0.05,  # at 0.1 rounding alone moves the logits of the tiny T5 by 1.5e-4 of their size (1e-12 in float64)
    "trainable_tokens": 0.03,
    "c3a": 0.1,
    "full": 1e-3,
    "pvera": 5e-3,
    "bottleneck": 5e-3,
}


@dataclass(frozen=True)
class Cell:
    """One method on one task of one model."""

    method: str
    task: str
    model: str

    @property
    def facts(self) -> Method:
        """What the method says of itself."""
        return METHODS[self.method]


def cells(*models: str) -> list[Cell]:
    """The cells of these models."""
    return [Cell(method, task, model) for model in models for task in MODELS[model] for method in METHODS]


def rows_for(task: str) -> list[dict[str, Any]]:
    """Rows that a tiny model can learn by heart."""
    instructions = instruction_rows(NUM_ROWS)
    if task == "CAUSAL_LM":
        return [{"instruction": row["instruction"], "output": row["output"]} for row in instructions]
    if task == "SEQ_2_SEQ_LM":
        return [{"source": row["instruction"], "target": row["output"]} for row in instructions]
    if task == "SEQ_CLS":
        return list(label_rows(NUM_ROWS))
    if task == "TOKEN_CLS":
        return [{"tokens": row["instruction"].split(), "tags": _tags(row["instruction"].split())} for row in instructions]
    if task == "QUESTION_ANS":
        return list(_questions())
    return [{"anchor": row["instruction"], "positive": row["output"]} for row in instructions]


def _tags(words: list[str]) -> list[str]:
    return ["B-ODD" if len(word) % 2 else "O" for word in words]


def _questions() -> Iterator[dict[str, Any]]:
    for index in range(NUM_ROWS):
        words = [WORDS[(index * 5 + place) % len(WORDS)] for place in range(8)]
        context, answer = " ".join(words), words[3]
        start = len(" ".join(words[:3])) + 1
        yield {"question": f"what {answer}", "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def write_recipe(cell: Cell, models_dir: Path, folder: Path, experts: list[str] | None = None) -> Path:
    """The recipe of a cell, in a file beside its rows."""
    rows = rows_for(cell.task)
    if cell.facts.num_tasks_field:
        rows = [row | {"task_id": ("first", "second")[index % 2]} for index, row in enumerate(rows)]
    adapter: dict[str, Any] = {"method": cell.method, **SETTINGS.get(cell.method, {})}
    if experts:
        adapter["adapters"] = experts
    source = str(write_jsonl(folder / "rows.jsonl", rows))
    recipe: dict[str, Any] = {
        "task": cell.task,
        "model": {"name_or_path": str(models_dir / cell.model)},
        "adapter": adapter,
        "data": {"train": source, "validation": source, "max_length": 40},
        "training": {
            "learning_rate": RATES.get(cell.method, 0.02),
            "max_steps": STEPS,
            "batch_size": NUM_ROWS,
            "micro_batch_size": NUM_ROWS,
            "logging_steps": 1,
            "save_steps": STEPS,
            "lr_scheduler_type": "constant",
            "eval_on_start": True,
            "eval_steps": STEPS,
            "load_best_model_at_end": False,
        },
    }
    if cell.task != "QUESTION_ANS":  # whose long rows become windows
        recipe["data"]["truncation"] = "right"
    if cell.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        recipe["generation"] = {"max_new_tokens": 4}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def refusal(recipe: Path) -> str:
    """Why `validate` refuses a recipe; empty where it does not."""
    result = run_cli("validate", recipe)
    assert result.code in (0, 2), result.err
    return result.err if result.code else ""


def check_cell(cell: Cell, recipe: Path, folder: Path) -> None:
    """Train, reload, answer and merge as a user would; fail where a step does not do what it says.

    The certificate loads what was saved into a fresh base: it would fail if anything but the saved parameters had moved.
    """
    run = folder / "run"
    trained = run_cli("train", recipe, "--output", run, "--json")
    assert trained.code == 0, trained.err
    summary = trained.json
    assert summary["certificate"]["passed"]
    assert summary["predicted_memory_bytes"] is not None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["loss"] for line in lines if "metrics" in line]
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    counted = run_cli("params", recipe, "--json")
    assert counted.code == 0, counted.err
    if not cell.facts.needs_whole_weights:
        assert counted.json["trainable_params"] == summary["trainable_params"]
    answers = folder / "answers.jsonl"
    answered = run_cli("infer", "--adapter", run, "--input", folder / "rows.jsonl", "--output", answers)
    assert answered.code == 0, answered.err
    predictions = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
    assert len(predictions) == NUM_ROWS
    assert all(isinstance(prediction, FORMS[cell.task]) for prediction in predictions)
    merged = run_cli("merge", "--adapter", run, "--output", folder / "merged", "--json")
    if reason := why_not_merged(cell):
        assert merged.code == 2, merged.err
        assert reason in merged.err
    else:
        assert merged.code == 0, merged.err


FORMS: dict[str, type | tuple[type, ...]] = {
    "CAUSAL_LM": str,
    "SEQ_2_SEQ_LM": str,
    "SEQ_CLS": str,
    "TOKEN_CLS": list,
    "QUESTION_ANS": str,
    "FEATURE_EXTRACTION": list,
}


def why_not_merged(cell: Cell) -> str:
    """The reason that `merge` must give; empty where it must merge."""
    return cell.facts.not_mergeable or UNMERGED_HERE.get((cell.method, cell.model), "")


# Methods that merge into some layers only.
UNMERGED_HERE = {("beft", "llama"): "no bias", ("beft", "t5"): "no bias"}


def run_cell(cell: Cell, models_dir: Path, folder: Path) -> None:
    """One cell: it works, or `validate` refuses it and says why."""
    experts = experts_of(cell, models_dir, folder) if "adapters" in cell.facts.section.model_fields else None
    recipe = write_recipe(cell, models_dir, folder, experts)
    reason = refusal(recipe)
    if reason:
        assert cell.facts.why_not in reason
        assert cell.facts.why_not
        return
    check_cell(cell, recipe, folder)


def experts_of(cell: Cell, models_dir: Path, folder: Path) -> list[str]:
    """Two trained adapters of the cell's task and model, of the type that its method builds on."""
    kind = cell.facts.reads_adapters["adapters"].lower()
    runs = []
    for number in range(2):
        place = folder / f"expert-{number}"
        place.mkdir()
        recipe = write_recipe(Cell(kind, cell.task, cell.model), models_dir, place)
        trained = run_cli("train", recipe, "--output", place / "run", "--set", f"training.seed={number}")
        assert trained.code == 0, trained.err
        runs.append(str(place / "run"))
    return runs
