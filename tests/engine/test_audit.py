"""The audit: what is odd about rows is found, named with its row, and written into the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peftkit.engine.audit import identify
from peftkit.engine.prepare import split_rows
from tests.conftest import label_rows, write_jsonl
from tests.runs import run_cli, tiny_recipe, train


def findings(recipe: Path, *changes: str) -> list[dict[str, str]]:
    """What `peftkit data` finds."""
    sets = [part for change in changes for part in ("--set", change)]
    result = run_cli("data", recipe, "--rows", "0", "--json", *sets)
    assert result.code == 0, result.err
    found: list[dict[str, str]] = result.json["findings"]
    return found


@pytest.fixture
def recipe(models_dir: Path, tmp_path: Path) -> Path:
    """Twelve labelled rows: one twice, one with another label too; validation has one of them and one of its own."""
    rows = label_rows(12)
    rows[5] = rows[2]
    rows[7] = rows[4] | {"label": "neg"}
    write_jsonl(tmp_path / "validation.jsonl", [rows[1] | {"label": "pos"}, {"text": "a film of its own", "label": "pos"}])
    path = tiny_recipe("SEQ_CLS", models_dir, tmp_path, data={"train": "train.jsonl", "validation": "validation.jsonl"})
    write_jsonl(tmp_path / "train.jsonl", rows)
    return path


@pytest.mark.parametrize(
    ("split", "kind", "row", "words"),
    [
        ("train", "duplicate", "train.jsonl:6", "is the same as"),
        ("train", "contradiction", "train.jsonl:8", "has the same text as"),
        ("validation", "leakage", "validation.jsonl:1", "its input is in train too"),
    ],
)
def test_what_is_odd_is_found_with_its_row(recipe: Path, split: str, kind: str, row: str, words: str) -> None:
    (found,) = [line for line in findings(recipe) if (line["split"], line["kind"]) == (split, kind)]
    assert found["row"].endswith(row)
    assert words in found["reason"]


def test_a_label_without_rows_is_found(recipe: Path) -> None:
    (found,) = [line for line in findings(recipe, "data.labels=[neg, pos, maybe]") if line["kind"] == "label_without_rows"]
    assert "no row has the label `maybe`" in found["reason"]


def test_cut_and_split_rows_are_found_with_their_lengths(models_dir: Path, tmp_path: Path) -> None:
    path = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    longest = run_cli("data", path, "--rows", "0", "--json").json["splits"]["train"]["lengths"]["max"]
    cut = findings(path, f"data.max_length={longest - 1}", "data.truncation=right")
    assert {line["kind"] for line in cut} == {"truncated"}
    assert all(line["reason"] == f"{longest} tokens cut to {longest - 1}" for line in cut)
    split = findings(path, f"data.max_length={longest - 1}", "data.truncation=split")
    assert {line["kind"] for line in split} == {"split"}
    assert [line["row"] for line in split] == [line["row"] for line in cut]


def test_windows_without_the_whole_answer_are_counted(models_dir: Path, tmp_path: Path) -> None:
    found = findings(tiny_recipe("QUESTION_ANS", models_dir, tmp_path))
    notes = [line["reason"] for line in found if line["kind"] == "note"]
    assert notes
    assert all("windows do not hold the whole answer" in note for note in notes)


def test_bad_rows_are_dropped_only_where_the_recipe_says_so(recipe: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    text = "\n".join([json.dumps(rows[0]), "{broken", json.dumps({"text": 3, "label": "pos"}), *map(json.dumps, rows[1:])])
    (tmp_path / "train.jsonl").write_text(text)
    stopped = run_cli("data", recipe)
    assert stopped.code == 3
    assert "2 rows of train that cannot be read" in stopped.err
    assert "train.jsonl:2: not valid JSON" in stopped.err
    dropped = [line for line in findings(recipe, "data.on_bad_row=drop") if line["kind"] == "bad_row"]
    assert [line["row"].rpartition(":")[2] for line in dropped] == ["2", "3"]


def test_a_run_keeps_the_report(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "--set", "training.max_steps=1")
    lines = [json.loads(line) for line in (tmp_path / "run" / "data_report.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"duplicate", "contradiction", "leakage"}
    assert all({"split", "kind", "row", "reason"} == line.keys() for line in lines)


def test_plan_shows_the_report(recipe: Path, cli: Any) -> None:
    result = cli("plan", recipe, "--json").json
    assert result["data"]["train"]["findings"] == {"contradiction": 1, "duplicate": 1}
    assert result["classes"] == {"neg": 5, "pos": 7}
    assert 0 < result["fill_rate"]["padded"] <= result["fill_rate"]["this_run"] <= 1


@given(inputs=st.lists(st.integers(0, 12), min_size=6, max_size=40), seed=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_rows_with_the_same_input_are_on_one_side(inputs: list[int], seed: int) -> None:
    assume(len(set(inputs)) > 3)
    rows = [(f"rows:{place}", {"text": str(number)}) for place, number in enumerate(inputs)]
    kept, drawn = split_rows(rows, inputs, 0.4, seed)
    assert sorted(kept + drawn) == [*range(len(inputs))]
    assert not {inputs[place] for place in kept} & {inputs[place] for place in drawn}
    assert len({inputs[place] for place in drawn}) == round(0.4 * len(set(inputs)))


def test_repeats_of_a_mixture_are_no_duplicates_and_never_on_both_sides(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path)
    write_jsonl(tmp_path / "few.jsonl", [{"text": f"few {number}", "label": "pos"} for number in range(4)])
    sources = f"[{{path: {tmp_path}/rows.jsonl, weight: 3}}, {{path: {tmp_path}/few.jsonl, weight: 3}}]"
    found = findings(recipe, f"data.train={sources}", "data.validation=0.3")
    assert {line["kind"] for line in found} <= {"contradiction"}


def test_rows_that_are_left_out_of_a_stream_are_listed(models_dir: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*label_rows(20)]
    rows[14] = {"text": " ", "label": "pos"}
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, data={"audit_rows": 8, "on_bad_row": "drop"})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train(recipe, tmp_path / "run", "--set", "data.train.streaming=true", "--set", "training.max_steps=2")
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "data_report.jsonl").read_text().splitlines()]
    assert line["row"].endswith("rows.jsonl:15")
    assert "blank" in line["reason"]


def test_many_answers_to_one_prompt_are_rows_of_their_own(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"validation": 0.25})
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "write a joke", "output": f"joke {n}"} for n in range(12)])
    result = run_cli("data", recipe, "--json").json
    assert [result["splits"][split]["rows"] for split in ("train", "validation")] == [9, 3]
    assert {line["kind"] for line in result["findings"]} == {"leakage"}  # the prompt is in train too, and that is said


def test_answers_to_nothing_are_told_apart() -> None:
    rows = [{"messages": [{"role": "assistant", "content": text}]} for text in ("one", "two")]
    assert len({identify(row).asked for row in rows}) == 2


def test_one_text_with_two_labels_is_on_one_side(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, data={"validation": 0.5})
    rows = [{"text": f"film {number % 6}", "label": "pos" if number < 6 else "neg"} for number in range(12)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert {line["kind"] for line in findings(recipe)} == {"contradiction"}
