"""`format: auto`: which format the columns of a row select, and which of them a task can read."""

from __future__ import annotations

import pytest

from peftkit.formats import FORMATS, detect_format
from peftkit.tasks import TASKS


@pytest.mark.parametrize("columns", [{"label"}, {"instruction"}, {"prompt"}, {"source"}, {"a", "b"}, set()])
def test_columns_of_no_format_are_not_guessed(columns: set[str]) -> None:
    assert detect_format(frozenset(columns)) is None


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("prompt chosen rejected", "preference"),
        ("prompt completion chosen rejected", "preference"),
        ("prompt messages chosen rejected score_chosen", "preference"),
        ("instruction input output chosen rejected", "preference"),
        ("input_ids attention_mask", "pretokenized"),
        ("text input_ids labels", "pretokenized"),
        ("prompt completion messages", "chat"),
        ("conversations tools system", "chat"),
        ("tokens labels", "tokens"),
        ("text labels", "classification"),
        ("text label", "classification"),
        ("prompt completion label", "prompt_completion"),
        ("segments", "prompt_completion"),
        ("instruction input output text", "instruction"),
        ("question context answer", "instruction"),
        ("question context answers is_impossible", "question_answering"),
        ("question context answer answer_start", "question_answering"),
        ("translation", "seq2seq"),
    ],
)
def test_auto_takes_the_most_specific_format(columns: str, name: str) -> None:
    found = detect_format(frozenset(columns.split()))
    assert found is not None
    assert found.name == name


def test_a_tagger_takes_the_words_of_rows_that_have_token_ids_too() -> None:
    found = detect_format(frozenset({"tokens", "ner_tags", "input_ids", "labels"}), TASKS["TOKEN_CLS"].can_read)
    assert found is FORMATS["tokens"]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("CAUSAL_LM", {"chat", "instruction", "prompt_completion", "seq2seq", "text", "preference", "pretokenized"}),
        ("SEQ_2_SEQ_LM", {"chat", "instruction", "prompt_completion", "seq2seq", "pretokenized"}),
        ("SEQ_CLS", {"classification"}),
        ("TOKEN_CLS", {"tokens"}),
        ("QUESTION_ANS", {"question_answering"}),
        ("FEATURE_EXTRACTION", {"pairs"}),
    ],
)
def test_a_task_reads_the_formats_whose_columns_it_learns_from(task: str, names: set[str]) -> None:
    assert {name for name, item in FORMATS.items() if TASKS[task].can_read(item.yields)} == names


def test_auto_prefers_a_format_that_the_task_can_read() -> None:
    columns = frozenset({"sentence1", "sentence2", "label", "score"})
    found = {task: detect_format(columns, TASKS[task].can_read) for task in ("SEQ_CLS", "FEATURE_EXTRACTION", "CAUSAL_LM")}
    assert {task: item.name if item else None for task, item in found.items()} == {
        "SEQ_CLS": "classification",
        "FEATURE_EXTRACTION": "pairs",
        "CAUSAL_LM": None,
    }
