"""Trained runs that the tests of `infer`, `merge` and `evaluate` share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import instruction_rows, label_rows, write_jsonl
from tests.runs import tiny_recipe, train


def _trained(task: str, models_dir: Path, folder: Path) -> Path:
    """A run that has learned something, so that its answers differ from row to row, with a test file of six rows."""
    rows = label_rows(30) if task == "SEQ_CLS" else instruction_rows(30)
    if task == "SEQ_2_SEQ_LM":
        rows = [{"source": row["instruction"], "target": row["output"]} for row in rows]
    test = write_jsonl(folder / "test.jsonl", rows[-6:])
    adapter = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    if task != "SEQ_CLS":
        adapter["modules_to_save"] = ["lm_head"]
    training = {"max_steps": 60, "learning_rate": 0.02, "logging_steps": 60, "micro_batch_size": 8}
    recipe = tiny_recipe(task, models_dir, folder, adapter=adapter, training=training, data={"test": str(test)})
    if task != "SEQ_CLS":
        recipe.write_text(recipe.read_text() + "generation: {max_new_tokens: 8}\n")
    train(recipe, folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def lm_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAUSAL_LM run on the tiny Llama, rows in format `instruction`."""
    return _trained("CAUSAL_LM", models_dir, tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def cls_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SEQ_CLS run on the tiny BERT with the classes neg and pos."""
    return _trained("SEQ_CLS", models_dir, tmp_path_factory.mktemp("cls"))


@pytest.fixture(scope="session")
def s2s_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SEQ_2_SEQ_LM run on the tiny T5."""
    return _trained("SEQ_2_SEQ_LM", models_dir, tmp_path_factory.mktemp("s2s"))
