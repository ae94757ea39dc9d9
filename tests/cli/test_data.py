"""`peftkit data`: rows as the model will see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import rows_of, write_jsonl
from tests.runs import tiny_recipe

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_shown_with_what_is_learned(cli: Any, models_dir: Path, tmp_path: Path, task: str) -> None:
    result = cli("data", tiny_recipe(task, models_dir, tmp_path), "--rows", "2", "--json").json
    assert [row["row"].rpartition(":")[2] for row in result["rows"]] == ["1", "2"]
    for row in result["rows"]:
        for sequence in row["sequences"]:
            assert len(sequence["input_ids"]) == len(sequence["tokens"]) == len(sequence["weights"])
    assert result["splits"]["train"]["examples"] == 21


@pytest.mark.parametrize(
    ("task", "title", "supervised"),
    [
        ("CAUSAL_LM", "", ["{output}<|im_end|>"]),
        ("SEQ_2_SEQ_LM", "source", []),
        ("SEQ_CLS", "label: pos", []),
        ("FEATURE_EXTRACTION", "anchor", []),
    ],
)
def test_the_first_row_says_what_is_learned(
    cli: Any, models_dir: Path, tmp_path: Path, task: str, title: str, supervised: list[str]
) -> None:
    (row,) = cli("data", tiny_recipe(task, models_dir, tmp_path), "--rows", "1", "--json").json["rows"]
    first = row["sequences"][0]
    assert first["title"] == title
    assert first["supervised"] == [text.format(**rows_of(task, 1)[0]) for text in supervised]


def test_a_tagged_row_shows_its_tags_and_an_answer_is_marked(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    (row,) = cli("data", tiny_recipe("TOKEN_CLS", models_dir, tmp_path), "--rows", "1", "--json").json["rows"]
    assert row["sequences"][0]["title"] == f"tags: {' '.join(rows_of('TOKEN_CLS', 1)[0]['tags'])}"
    (tmp_path / "qa").mkdir()
    recipe = tiny_recipe("QUESTION_ANS", models_dir, tmp_path / "qa")
    (row,) = cli("data", recipe, "--row", "2", "--json").json["rows"]
    (answer,) = rows_of("QUESTION_ANS", 2)[1]["answers"]["text"]
    assert {text.strip() for sequence in row["sequences"] for text in sequence["supervised"]} == {answer}


def test_people_see_marks_lengths_and_findings(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"validation": 0.25})
    (first,) = cli("data", recipe, "--rows", "1", "--json").json["rows"]
    out = cli("data", recipe, "--rows", "1").out
    row = rows_of("CAUSAL_LM", 21)[int(first["row"].rpartition(":")[2]) - 1]
    assert f"{row['instruction']}<|im_end|>" in out
    assert f"«{row['output']}»" in out
    assert "format instruction" in out
    assert "in train (max_length 60)" in out
    assert "the audit found nothing" in out


def test_a_row_is_asked_for_by_its_number(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path)
    (row,) = cli("data", recipe, "--row", "21", "--json").json["rows"]
    assert row["row"].endswith("rows.jsonl:21")
    result = cli("data", recipe, "--row", "22")
    assert result.code == 2
    assert "--row 22: train has the examples 1 to 21" in result.err


def test_the_lengths_are_drawn_into_a_file(cli: Any, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("data", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--plot", "--json")
    path = Path(result.json["plot"])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.name == "recipe-lengths.png"


def test_a_problem_is_told_as_json_too(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": None}])
    result = cli("data", recipe, "--json")
    assert result.code == 3
    assert "rows.jsonl:1" in result.json["problems"][0]["what"]


def test_the_second_time_rows_come_from_the_cache(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("TOKEN_CLS", models_dir, tmp_path)
    first, second, third = (
        cli("data", recipe, "--json", *more).json for more in ([], [], ["--set", "data.label_all_tokens=true"])
    )
    assert [first["cached"], second["cached"], third["cached"]] == [False, True, False]
    assert first | {"cached": True} == second
    assert first["splits"]["train"]["targets"] < third["splits"]["train"]["targets"]


def test_a_variable_that_the_template_does_not_read_is_refused(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"chat_template_kwargs": {"enable_thinking": False}})
    result = cli("data", recipe)
    assert result.code == 2
    assert "data.chat_template_kwargs.enable_thinking: the chat template reads no such variable" in result.err
    assert cli("validate", recipe, "--set", "data.truncation=split").code == 0


def test_a_truncation_that_a_task_does_not_have_is_refused(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    result = cli("validate", tiny_recipe("SEQ_CLS", models_dir, tmp_path), "--set", "data.truncation=split")
    assert result.code == 2
    assert "`split` is not for SEQ_CLS; it takes error, left, right, drop" in result.err
