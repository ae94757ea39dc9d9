"""Rows of several tasks: the `task_id` column, from the file to the model, and at inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit.formats.base import RowError
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from tests.conftest import bert_like_tokenizer, rows_of, write_jsonl
from tests.runs import run_cli, tiny_recipe, train

NAMES = ("sad", "glad")
METHOD = {"method": "multitask_prompt_tuning", "num_tasks": 2, "num_virtual_tokens": 4}


def recipe_of(models_dir: Path, folder: Path, task: str = "SEQ_CLS", **sections: Any) -> Path:
    """A recipe whose rows name their task in the column `mood`."""
    path = tiny_recipe(task, models_dir, folder, **({"adapter": METHOD, "data": {"max_length": 56}} | sections))
    rows = [row | {"mood": NAMES[number % 2]} for number, row in enumerate(rows_of(task, 12))]
    write_jsonl(folder / "rows.jsonl", rows)
    source = {"path": str(folder / "rows.jsonl"), "columns": {"task_id": "mood"}}
    path.write_text(path.read_text().replace(f"train: {folder / 'rows.jsonl'}", f"train: {json.dumps(source)}"))
    return path


@pytest.fixture(scope="module")
def run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moods")
    train(recipe_of(models_dir, folder), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_every_sequence_of_a_row_carries_its_task(task: str) -> None:
    settings = Encoding(40, "right", labels=("B-X", "O") if task == "TOKEN_CLS" else ("neg", "pos"), task_names=("glad", "sad"))
    runtime = TASKS[task].runtime(bert_like_tokenizer(), settings)
    row, *_ = runtime.probe_rows()
    examples = [example for name in ("sad", "glad") for example in runtime.encode(row | {"task_id": name}, "rows:1")]
    batch = runtime.collate([example for example in examples if example is not None])
    assert [example.task_id for example in examples if example is not None] == [1, 0]
    half = batch["input_ids"].shape[0] // 2
    assert batch["task_ids"].tolist() == [1] * half + [0] * half


def test_tasks_are_stored_in_order_and_asked_for_at_inference(run: Path) -> None:
    assert json.loads((run / "adapter/peftkit.json").read_text())["encoding"]["task_names"] == ["glad", "sad"]
    without = run_cli("infer", "--adapter", run, "--prompt", "good film")
    assert without.code == 3
    assert "no task is named (in the column `task_id`, or by --task-id); the adapter knows the tasks glad, sad" in without.err
    unknown = run_cli("infer", "--adapter", run, "--prompt", "good film", "--task-id", "mad")
    assert (unknown.code, "the task 'mad' in `task_id` is not known" in unknown.err) == (3, True)
    answers = [
        run_cli("infer", "--adapter", run, "--prompt", "good film", "--task-id", name, "--json").json["probabilities"]
        for name in NAMES
    ]
    assert answers[0] != answers[1]


def test_rows_name_their_task_and_the_option_is_for_those_that_do_not(run: Path, tmp_path: Path) -> None:
    rows = [{"text": "good film", "mood": "sad"}, {"text": "good film", "task_id": "sad"}, {"text": "good film"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    arguments = ("--input", source, "--output", tmp_path / "out.jsonl", "--task-id", "glad")
    assert run_cli("infer", "--adapter", run, *arguments).code == 0
    first, second, third = [json.loads(line)["probabilities"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first == pytest.approx(second, abs=1e-5)
    assert first != third


def test_more_tasks_than_the_method_has_are_refused(models_dir: Path, tmp_path: Path) -> None:
    result = run_cli("plan", recipe_of(models_dir, tmp_path, adapter=METHOD | {"num_tasks": 1}))
    assert result.code == 2
    assert "adapter.num_tasks: is 1, but the training rows have 2 tasks in `task_id`: glad, sad" in result.err


def test_rows_without_task_are_named(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, adapter=METHOD, data={"max_length": 56})
    result = run_cli("plan", recipe)
    assert result.code == 3
    assert "rows.jsonl:1: no column `task_id`, which this adapter method needs" in result.err


def test_other_methods_ignore_the_column(models_dir: Path, tmp_path: Path) -> None:
    result = run_cli("plan", recipe_of(models_dir, tmp_path, adapter={"method": "lora", "r": 2}), "--json")
    assert result.code == 0, result.err


def test_the_option_has_no_effect_for_other_adapters(models_dir: Path, tmp_path: Path) -> None:
    train(recipe_of(models_dir, tmp_path, adapter={"method": "lora", "r": 2}), tmp_path / "run")
    result = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", "good film", "--task-id", "sad")
    assert result.code == 2
    assert "--task-id: has no effect" in result.err


def encode_row(task_names: tuple[str, ...], task_id: str | None) -> Any:
    """A row with this task, for an adapter that knows those."""
    runtime = TASKS["SEQ_CLS"].runtime(bert_like_tokenizer(), Encoding(40, labels=("neg", "pos"), task_names=task_names))
    (example,) = runtime.encode({"text": "good", "label": "pos", "task_id": task_id}, "rows:1")
    return example


@pytest.mark.parametrize(
    ("names", "value", "words"),
    [
        (("glad", "sad"), None, "no task is named .* the adapter knows the tasks glad, sad"),
        (("glad", "sad"), "mad", "the task 'mad' in `task_id` is not known; the adapter knows the tasks glad, sad"),
        (("sad",), "mad", "the task 'mad' in `task_id` is not known; the adapter knows the tasks sad"),
    ],
)
def test_a_task_must_be_known(names: tuple[str, ...], value: str | None, words: str) -> None:
    with pytest.raises(RowError, match=words):
        encode_row(names, value)


@pytest.mark.parametrize(("names", "value", "number"), [(("sad",), None, 0), (("glad", "sad"), "sad", 1)])
def test_the_one_task_that_there_is_need_not_be_named(names: tuple[str, ...], value: str | None, number: int) -> None:
    assert encode_row(names, value).task_id == number
