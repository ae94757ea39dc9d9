"""Every data format: the columns it recognises, what it makes of good rows and what it says of bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from peftkit.formats import FORMATS, detect_format
from peftkit.formats.base import RowError
from peftkit.tasks import TASKS


def said(role: str, content: str) -> dict[str, str]:
    """One turn."""
    return {"role": role, "content": content}


ASKED = [said("user", "hi"), said("assistant", "ho")]
ASKING = {"question": "who?", "context": "hi ho"}
FOUND = {**ASKING, "answers": {"text": ["ho"], "answer_start": [3]}}
MISSING = {**ASKING, "answers": {"text": [], "answer_start": []}}
GOOD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("instruction", {"instruction": "hi", "output": "ho"}, {"messages": ASKED}),
    ("instruction", {"question": "hi", "answer": "ho"}, {"messages": ASKED}),
    ("instruction", {"instruction": "hi", "input": None, "response": "ho", "extra": 3}, {"messages": ASKED}),
    ("instruction", {"instruction": "hi", "input": " ", "output": "ho"}, {"messages": ASKED}),
    (
        "instruction", {"instruction": "hi", "input": "you", "output": "ho"},
        {"messages": [said("user", "hi\nyou"), said("assistant", "ho")]},
    ),
    ("instruction", {"system": "be", "instruction": "hi", "output": "ho"}, {"messages": [said("system", "be"), *ASKED]}),
    (
        "instruction", {"history": [["a", "b"], ("c", "d")], "instruction": "hi", "output": "ho"},
        {"messages": [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d"), *ASKED]},
    ),
    ("chat", {"messages": ASKED}, {"messages": ASKED}),
    ("chat", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, {"messages": ASKED}),
    ("chat", {"messages": ASKED, "system": "be"}, {"messages": [said("system", "be"), *ASKED]}),
    ("chat", {"messages": [said("system", "is"), *ASKED], "system": "be"}, {"messages": [said("system", "is"), *ASKED]}),
    (
        "chat", {"messages": [*ASKED, said("tool", "3"), said("assistant", "so")]},
        {"messages": [*ASKED, said("tool", "3"), said("assistant", "so")]},
    ),
    ("prompt_completion", {"prompt": "hi", "completion": " ho"}, {"prompt": "hi", "completion": " ho"}),
    ("prompt_completion", {"prompt": "hi", "response": "ho"}, {"prompt": "hi", "completion": "ho"}),
    ("text", {"text": "hi ho"}, {"text": "hi ho"}),
    ("seq2seq", {"source": "hi", "target": "ho"}, {"prompt": "hi", "completion": "ho"}),
    ("classification", {"text": "hi", "label": "good"}, {"text": "hi", "label": "good"}),
    ("classification", {"sentence": "hi", "label": 0}, {"text": "hi", "label": 0}),
    ("classification", {"text": "hi", "label": 0.5}, {"text": "hi", "label": 0.5}),
    ("classification", {"text": "hi", "label": ["a", "b"]}, {"text": "hi", "label": ["a", "b"]}),
    ("classification", {"text": "hi", "label": []}, {"text": "hi", "label": []}),
    ("classification", {"text": "hi", "text_pair": "ho", "label": "x"}, {"text": "hi", "text_pair": "ho", "label": "x"}),
    ("tokens", {"tokens": ["hi", "ho"], "tags": ["O", "B-X"]}, {"tokens": ["hi", "ho"], "tags": ["O", "B-X"]}),
    ("tokens", {"id": "7", "tokens": ["hi"], "ner_tags": [3]}, {"tokens": ["hi"], "tags": [3]}),
    ("question_answering", {**ASKING, "answers": {"text": ["ho"], "answer_start": [3]}}, FOUND),
    ("question_answering", {**ASKING, "answers": [{"text": "ho", "answer_start": 3}]}, FOUND),
    ("question_answering", {**ASKING, "answer": "ho", "answer_start": 3}, FOUND),
    ("question_answering", {**ASKING, "answer": " ho", "answer_start": "2"}, FOUND),  # CSV; white space is left out
    ("question_answering", {**ASKING, "answers": {"text": [], "answer_start": []}}, MISSING),
    ("question_answering", {**ASKING, "answers": []}, MISSING),
    ("question_answering", {**ASKING, "answer": "", "answer_start": ""}, MISSING),
    ("pairs", {"anchor": "hi", "positive": "ho"}, {"anchor": "hi", "positive": "ho"}),
    ("pairs", {"query": "hi", "positive": "ho", "negative": "x"}, {"anchor": "hi", "positive": "ho", "negative": ["x"]}),
    (
        "pairs", {"anchor": "hi", "positive": "ho", "negative": ["x", "y"]},
        {"anchor": "hi", "positive": "ho", "negative": ["x", "y"]},
    ),
    ("pairs", {"sentence1": "hi", "sentence2": "ho", "score": 3}, {"anchor": "hi", "positive": "ho", "score": 3.0}),
    ("pairs", {"text": "hi", "text_pair": "ho", "score": "0.5"}, {"anchor": "hi", "positive": "ho", "score": 0.5}),
    ("classification", {"sentence1": "hi", "sentence2": "ho", "label": "x"}, {"text": "hi", "text_pair": "ho", "label": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "canonical"), GOOD)
def test_a_good_row_becomes_canonical_columns(name: str, row: dict[str, Any], canonical: dict[str, Any]) -> None:
    assert FORMATS[name].convert(row, True) == canonical


@pytest.mark.parametrize(("name", "row", "canonical"), GOOD)
def test_a_row_yields_the_columns_that_its_format_promises(name: str, row: dict[str, Any], canonical: dict[str, Any]) -> None:
    assert set(FORMATS[name].yields) <= set(canonical)


@pytest.mark.parametrize(("name", "row", "canonical"), GOOD)
def test_auto_recognises_the_format_by_the_columns(name: str, row: dict[str, Any], canonical: dict[str, Any]) -> None:
    found = detect_format(frozenset(row))
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("name", "row", "canonical"),
    [
        ("instruction", {"instruction": "hi", "system": "be"}, {"messages": [said("system", "be"), said("user", "hi")]}),
        ("instruction", {"instruction": "hi", "output": "ho"}, {"messages": ASKED[:1]}),
        ("chat", {"messages": ASKED[:1]}, {"messages": ASKED[:1]}),
        ("chat", {"messages": [*ASKED, said("assistant", "hum")]}, {"messages": ASKED[:1]}),
        ("chat", {"messages": [*ASKED, said("user", "so")]}, {"messages": [*ASKED, said("user", "so")]}),
        ("prompt_completion", {"prompt": "hi"}, {"prompt": "hi"}),
        ("prompt_completion", {"prompt": "hi", "completion": "ho"}, {"prompt": "hi"}),
        ("text", {"text": "hi"}, {"text": "hi"}),
        ("seq2seq", {"source": "hi"}, {"prompt": "hi"}),
        ("classification", {"text": "hi"}, {"text": "hi"}),
        ("classification", {"text": "hi", "text_pair": "ho", "label": 3.5}, {"text": "hi", "text_pair": "ho"}),
        ("tokens", {"tokens": ["hi"], "tags": "?"}, {"tokens": ["hi"]}),
        ("question_answering", ASKING | {"answers": 3}, ASKING),
        ("pairs", {"anchor": "hi", "positive": "ho"}, {"text": "hi"}),
        ("pairs", {"text": "hi"}, {"text": "hi"}),
    ],
)  # fmt: skip
def test_inference_needs_and_shows_no_target(name: str, row: dict[str, Any], canonical: dict[str, Any]) -> None:
    assert FORMATS[name].convert(row, False) == canonical


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("instruction", {}, "no column `instruction` or `question`; the row has no columns"),
        ("instruction", {"instruction": "hi", "x": 1}, "no column `output` or `answer` or `response` or `completion`; the"),
        ("instruction", {"instruction": "hi", "output": None}, "no column `output`"),
        ("instruction", {"instruction": " ", "output": "ho"}, "column `instruction` is blank"),
        ("instruction", {"instruction": "hi", "output": ""}, "column `output` is blank"),
        ("instruction", {"instruction": 3, "output": "ho"}, "column `instruction` holds a number, not text"),
        ("instruction", {"instruction": "hi", "input": ["x"], "output": "ho"}, "column `input` holds a list, not text"),
        ("instruction", {"instruction": "hi", "output": {"a": 1}}, "column `output` holds a mapping, not text"),
        ("instruction", {"instruction": "hi", "output": True}, "column `output` holds true/false, not text"),
        ("instruction", {"instruction": "hi", "output": "ho", "history": ["a", "b"]}, "list of [user text, assistant text]"),
        ("instruction", {"instruction": "hi", "output": "ho", "history": [["a", 3]]}, "list of [user text, assistant text]"),
        ("instruction", {"instruction": "hi", "output": "ho", "history": 3}, "list of [user text, assistant text] pairs"),
        ("chat", {"messages": []}, "no `messages` (or `conversations`): a list of turns"),
        ("chat", {"messages": "hi"}, "no `messages` (or `conversations`): a list of turns"),
        ("chat", {"messages": ["hi"]}, "turn 1 is not a mapping with role and content"),
        ("chat", {"messages": [ASKED[0], said("robot", "ho")]}, "turn 2 has the role 'robot'; allowed: system, user, assist"),
        ("chat", {"messages": [{"content": "hi"}]}, "turn 1 has the role None"),
        ("chat", {"messages": [{"role": ["user"], "content": "hi"}]}, "turn 1 has the role ['user']"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "turn 1 has no text in `content`"),
        ("chat", {"messages": [ASKED[0], said("assistant", " ")]}, "turn 2 is a blank assistant turn"),
        ("chat", {"messages": ASKED[:1]}, "no assistant turn: there is nothing to learn"),
        ("prompt_completion", {"prompt": "hi"}, "no column `completion` or `response`; the row has `prompt`"),
        ("prompt_completion", {"prompt": "", "completion": "ho"}, "column `prompt` is blank"),
        ("text", {"text": " \n"}, "column `text` is blank"),
        ("text", {"body": "hi"}, "no column `text`; the row has `body`"),
        ("seq2seq", {"source": "hi", "target": 1.5}, "column `target` holds a number, not text"),
        ("classification", {"text": "hi"}, "column `label` holds None; a label is a name or a number, or a list of names"),
        ("classification", {"text": "hi", "label": True}, "column `label` holds True; a label is a name or a number"),
        ("classification", {"text": "hi", "label": float("nan")}, "column `label` holds nan, which is no number to learn"),
        ("classification", {"text": "hi", "label": ["a", 0.5]}, "column `label` holds ['a', 0.5]; a label is a name"),
        ("classification", {"text": "hi", "label": ["a", " "]}, "column `label` holds an empty name"),
        ("classification", {"text": "hi", "label": {"a": 1}}, "column `label` holds {'a': 1}; a label is a name"),
        ("classification", {"text": "hi", "label": ""}, "column `label` is empty"),
        ("classification", {"text": "hi", "label": "  "}, "column `label` is empty"),
        ("classification", {"text": "hi", "text_pair": 3, "label": "x"}, "column `text_pair` holds a number, not text"),
        ("tokens", {"tokens": "hi ho", "tags": ["O"]}, "column `tokens` is no list with at least one element"),
        ("tokens", {"tokens": [], "tags": []}, "column `tokens` is no list with at least one element"),
        ("tokens", {"tokens": ["hi", " "], "tags": ["O", "O"]}, "word 2 in `tokens` is ' '; a word is text that is not blank"),
        ("tokens", {"tokens": ["hi"], "tags": [0.5]}, "tag 1 in `tags` is 0.5; a tag is a name or a whole number"),
        ("tokens", {"tokens": ["hi"], "tags": ["O", "O"]}, "there are 1 words and 2 tags; every word needs one tag"),
        ("tokens", {"tokens": ["hi"]}, "no column `tags` or `ner_tags` or `pos_tags`; the row has `tokens`"),
        ("question_answering", ASKING, "no `answers` ({text: [...], answer_start: [...]}"),
        ("question_answering", {**ASKING, "answers": {"text": ["ho"]}}, "needs the lists `text` and `answer_start`"),
        ("question_answering", {**ASKING, "answers": ["ho"]}, "something else than mappings"),
        ("question_answering", {**ASKING, "answer": "ho"}, "the answer 'ho' has the `answer_start` None, not a whole number"),
        ("question_answering", {**ASKING, "answer": "ho", "answer_start": 0}, "at `answer_start` 0: there is 'hi'"),
        ("question_answering", {**ASKING, "answer": "ho", "answer_start": -2}, "is not in the context at `answer_start` -2"),
        ("question_answering", {**ASKING, "answers": {"text": [""], "answer_start": [0]}}, "an answer is '', not text"),
        ("pairs", {"anchor": "hi"}, "no column `positive` or `text_pair` or `sentence2`; the row has `anchor`"),
        ("pairs", {"anchor": "hi", "positive": "ho", "negative": [3]}, "column `negative` holds 3; a negative is a text"),
        ("pairs", {"text": "hi", "text_pair": "ho", "score": "high"}, "column `score` holds 'high', not a number"),
        ("classification", {"label": "x"}, "no column `text` or `sentence` or `sentence1`; the row has `label`"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_column(name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS[name].convert(row, True)
    assert words in str(caught.value)


def test_a_prompt_is_needed_even_without_target() -> None:
    for name, row in {"instruction": {"output": "ho"}, "prompt_completion": {}, "chat": {}, "text": {}, "seq2seq": {}}.items():
        with pytest.raises(RowError):
            FORMATS[name].convert(row, False)


@pytest.mark.parametrize("columns", [{"label"}, {"instruction"}, {"prompt"}, {"source"}, {"a", "b"}, set()])
def test_columns_of_no_format_are_not_guessed(columns: set[str]) -> None:
    assert detect_format(frozenset(columns)) is None


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("CAUSAL_LM", {"chat", "instruction", "prompt_completion", "seq2seq", "text"}),
        ("SEQ_2_SEQ_LM", {"chat", "instruction", "prompt_completion", "seq2seq"}),
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
