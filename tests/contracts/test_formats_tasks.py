"""Every format with every task that reads it: from a recipe to a certified run that evaluates and answers the same file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from peftkit.formats import FORMATS
from peftkit.tasks import TASKS
from tests.conftest import instruction_rows, label_rows, pair_rows, question_rows, tag_rows, write_jsonl
from tests.runs import run_cli, tiny_recipe, train

Row = dict[str, Any]
NUM_ROWS = 8
NO_LEARNING = -100


def _turns(row: Row) -> tuple[Row, Row]:
    return {"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}


def _each(change: Callable[[Row], Row]) -> Callable[[int], list[Row]]:
    """A maker of rows from questions and their answers."""
    return lambda number: [change(row) for row in instruction_rows(number)]


def _ids(text: str) -> list[int]:
    return [10 + ord(letter) % 90 for letter in text[:20]]


def _tokenised(row: Row) -> Row:
    asked, answer = _ids(row["instruction"]), _ids(row["output"])
    return {"input_ids": asked + answer, "labels": [NO_LEARNING] * len(asked) + answer}


def _for_a_decoder(row: Row) -> Row:
    return {"input_ids": _ids(row["instruction"]), "labels": _ids(row["output"])}


def _classes(label: Callable[[int], Any]) -> Callable[[int], list[Row]]:
    return lambda number: [row | {"label": label(place)} for place, row in enumerate(label_rows(number))]


def _pairs(**more: Callable[[int], Any]) -> Callable[[int], list[Row]]:
    return lambda number: [
        row | {name: made(place) for name, made in more.items()} for place, row in enumerate(pair_rows(number))
    ]


@dataclass(frozen=True)
class Case:
    """Rows in a format.

    Attributes:
        format: its name.
        columns: the canonical columns that they become.
        rows: makes so many of them.
        kind: what tells them from others with these columns.
        only: the one task that they are for, where it is not every task that reads the columns.
    """

    format: str
    columns: tuple[str, ...]
    rows: Callable[[int], list[Row]]
    kind: str = ""
    only: str = ""

    @property
    def id(self) -> str:
        """Its name in the test's name."""
        return "-".join([self.format, *([self.kind] if self.kind else [])])


MESSAGES, TEXTS = ("messages",), ("prompt", "completion")
CASES = [
    Case("instruction", MESSAGES, instruction_rows),
    Case("chat", MESSAGES, _each(lambda row: {"messages": [*_turns(row)]})),
    Case("prompt_completion", TEXTS, _each(lambda row: {"prompt": row["instruction"], "completion": f" {row['output']}"})),
    Case(
        "prompt_completion",
        MESSAGES,
        _each(lambda row: {"prompt": [_turns(row)[0]], "completion": [_turns(row)[1]]}),
        "turns",
    ),
    Case(
        "prompt_completion",
        ("segments",),
        _each(lambda row: {"segments": [{"text": row["instruction"], "label": False}, {"text": row["output"], "label": True}]}),
        "segments",
    ),
    Case("text", ("text",), _each(lambda row: {"text": row["instruction"]})),
    Case("seq2seq", TEXTS, _each(lambda row: {"source": row["instruction"], "target": row["output"]})),
    Case(
        "preference",
        ("chosen", "rejected"),
        _each(lambda row: {"prompt": row["instruction"], "chosen": row["output"], "rejected": "no"}),
    ),
    Case("pretokenized", ("input_ids", "labels"), _each(_tokenised)),
    Case("pretokenized", ("input_ids", "labels"), _each(_for_a_decoder), "decoder", only="SEQ_2_SEQ_LM"),
    Case("classification", ("text", "label"), label_rows),
    Case("classification", ("text", "label"), _classes(lambda place: place % 3), "numbers"),
    Case("classification", ("text", "label"), _classes(lambda place: [["a"], ["b"], ["a", "b"], []][place % 4]), "several"),
    Case("classification", ("text", "label"), _classes(lambda place: place / 4), "regression"),
    Case(
        "classification",
        ("text", "label"),
        lambda number: [row | {"text_pair": f"film {place}"} for place, row in enumerate(label_rows(number))],
        "pairs",
    ),
    Case("tokens", ("tokens", "tags"), tag_rows),
    Case("question_answering", ("question", "context", "answers"), question_rows),
    Case("pairs", ("anchor", "positive"), _pairs()),
    Case("pairs", ("anchor", "positive"), _pairs(score=lambda place: place / NUM_ROWS), "scored"),
    Case("pairs", ("anchor", "positive"), _pairs(negative=lambda place: [f"tree {place}", "seven dogs"]), "negatives"),
]
READ = [(task, case) for task in TASKS for case in CASES if TASKS[task].can_read(case.columns) and case.only in ("", task)]
REFUSED = [(task, name) for task in TASKS for name in FORMATS if not TASKS[task].can_read(FORMATS[name].yields)]
every_pair_that_fits = pytest.mark.parametrize(("task", "case"), READ, ids=[f"{task}-{case.id}" for task, case in READ])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))


def recipe_of(task: str, case: Case, models_dir: Path, folder: Path, **source: str) -> Path:
    """A recipe of two steps on rows in a format."""
    rows = write_jsonl(folder / "case.jsonl", case.rows(NUM_ROWS))
    more = {"generation": {"max_new_tokens": 3}} if TASKS[task].generates else {}
    return tiny_recipe(
        task,
        models_dir,
        folder,
        adapter={"method": "lora", "r": 2},
        data={"train": {"path": str(rows)} | source},
        training={"max_steps": 2, "batch_size": 4},
        **more,
    )


@every_pair_that_fits
def test_a_format_trains_evaluates_and_answers(models_dir: Path, tmp_path: Path, task: str, case: Case) -> None:
    recipe, run = recipe_of(task, case, models_dir, tmp_path, format=case.format), tmp_path / "run"
    assert train(recipe, run)["certificate"]["passed"]
    assert (run / "data_report.jsonl").is_file()
    renderings = json.loads((run / "adapter/renderings.json").read_text(encoding="utf-8"))["renderings"]
    assert [{*case.columns} <= line["row"].keys() for line in renderings] == [True] * 5

    file, answers = tmp_path / "case.jsonl", tmp_path / "answers.jsonl"
    evaluated = run_cli("evaluate", run, "--data", file, "--json")
    assert (evaluated.code, evaluated.json["num_rows"]) == (0, NUM_ROWS), evaluated.err
    answered = run_cli("infer", "--adapter", run, "--input", file, "--output", answers)
    assert answered.code == 0, answered.err
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert [{name: line[name] for name in row} for line, row in zip(lines, case.rows(NUM_ROWS), strict=True)] == case.rows(
        NUM_ROWS
    )
    assert ["prediction" in line for line in lines] == [True] * NUM_ROWS


@every_pair_that_fits
def test_auto_takes_the_format_and_shows_what_is_learned(
    cli: Any, models_dir: Path, tmp_path: Path, task: str, case: Case
) -> None:
    result = cli("data", recipe_of(task, case, models_dir, tmp_path), "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["formats"] == [case.format]
    assert [shown["num_targets"] > 0 for shown in result.json["rows"]] == [True] * 3


@pytest.mark.parametrize(("task", "name"), REFUSED)
def test_a_format_that_a_task_cannot_read_is_refused_with_those_it_can(
    cli: Any, models_dir: Path, tmp_path: Path, task: str, name: str
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [dict(FORMATS[name].example)])
    source = {"path": str(rows), "format": name}
    result = cli("validate", tiny_recipe(task, models_dir, tmp_path, data={"train": source}), "--json")
    assert result.code == 2
    good = [other for other, item in FORMATS.items() if TASKS[task].can_read(item.yields)]
    (problem,) = result.json["problems"]
    assert problem["key"] == "data.train.format"
    assert problem["what"] == f"{task} cannot learn from `{name}`; it can from {', '.join(good)}"


def test_the_table_has_every_format_and_all_that_it_yields() -> None:
    expected = {(name, columns) for name, item in FORMATS.items() for columns in (item.yields, *item.also_yields)}
    assert {(case.format, case.columns) for case in CASES} == expected
    assert {(task, case.format) for task, case in READ} | {*REFUSED} >= {(task, name) for task in TASKS for name in FORMATS}
