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
    ("classification", {"text": "hi", "text_pair": "ho", "label": "x"}, {"text": "hi", "text_pair": "ho", "label": "x"}),
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
        ("classification", {"text": "hi"}, "column `label` holds None; a label is a name or a whole number"),
        ("classification", {"text": "hi", "label": True}, "column `label` holds True; a label is a name or a whole number"),
        ("classification", {"text": "hi", "label": 0.5}, "column `label` holds 0.5; a label is a name or a whole number"),
        ("classification", {"text": "hi", "label": ["a"]}, "column `label` holds ['a']; a label is a name or a whole number"),
        ("classification", {"text": "hi", "label": ""}, "column `label` is empty"),
        ("classification", {"text": "hi", "label": "  "}, "column `label` is empty"),
        ("classification", {"text": "hi", "text_pair": 3, "label": "x"}, "column `text_pair` holds a number, not text"),
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
    ],
)
def test_a_task_reads_the_formats_whose_columns_it_learns_from(task: str, names: set[str]) -> None:
    assert {name for name, item in FORMATS.items() if TASKS[task].can_read(item.yields)} == names
