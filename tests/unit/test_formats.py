"""Every data format: the columns it recognises, what it makes of good rows and what it says of bad ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from peftkit.formats import FORMATS, detect_format
from peftkit.formats.base import Format, RowError


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
    ("classification", {"text": "hi", "labels": ["a", "b"]}, {"text": "hi", "label": ["a", "b"]}),
    ("classification", {"text": "hi", "label": None, "labels": [2, 5]}, {"text": "hi", "label": [2, 5]}),
    ("tokens", {"words": ["hi", "ho"], "labels": ["S-X", "E-Y"]}, {"tokens": ["hi", "ho"], "tags": ["S-X", "E-Y"]}),
    ("question_answering", {**ASKING, "answers": None, "is_impossible": True}, MISSING),
    ("question_answering", {**MISSING, "is_impossible": "True"}, MISSING),
    ("question_answering", {**FOUND, "is_impossible": False}, FOUND),
    (
        "question_answering", {**ASKING, "answers": {"text": ["ho", "hi"], "answer_start": [3, 0]}},
        {**ASKING, "answers": {"text": ["ho", "hi"], "answer_start": [3, 0]}},
    ),
    ("prompt_completion", {"prompt": "hi", "completion": "ho", "label": True}, {"prompt": "hi", "completion": "ho"}),
    ("prompt_completion", {"prompt": ASKED[:1], "completion": ASKED[1:]}, {"messages": ASKED}),
    (
        "prompt_completion", {"prompt": [*ASKED, ASKED[0]], "completion": ASKED[1:], "system": "be"},
        {"messages": [said("system", "be"), ASKED[0], ASKED[1] | {"weight": 0.0}, *ASKED]},
    ),
    (
        "prompt_completion", {"segments": [{"label": False, "text": "<s>hi "}, {"label": True, "text": "ho</s>"}]},
        {"segments": [{"text": "<s>hi ", "train": False}, {"text": "ho</s>", "train": True}]},
    ),
    ("seq2seq", {"source": "hi", "target": "ho", "translation": {"en": "hi"}}, {"prompt": "hi", "completion": "ho"}),
    ("classification", {"sentence1": "hi", "sentence2": "ho", "label": "x"}, {"text": "hi", "text_pair": "ho", "label": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "canonical"), GOOD)
def test_a_good_row_becomes_canonical_columns(name: str, row: dict[str, Any], canonical: dict[str, Any]) -> None:
    assert FORMATS[name].convert(row, True) == canonical


@pytest.mark.parametrize(("name", "row", "canonical"), GOOD)
def test_auto_recognises_the_format_by_the_columns(name: str, row: dict[str, Any], canonical: dict[str, Any]) -> None:
    found = detect_format(frozenset(row))
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("item", FORMATS.values(), ids=FORMATS)
def test_the_example_of_a_format_is_a_good_row_that_auto_recognises(item: Format) -> None:
    assert item.columns_of(item.convert(item.example, True)) == item.yields
    assert item.convert(item.example, False)
    assert detect_format(frozenset(item.example)) is item


@pytest.mark.parametrize("item", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", [None, math.nan], ids=["null", "NaN"])
def test_null_and_nan_are_missing_values_in_every_column(item: Format, kind: float | None) -> None:
    with pytest.raises(RowError):
        item.convert(dict.fromkeys(item.example, kind), True)
    others = dict.fromkeys({"text_pair", "input", "system", "negative", "score", "tools", "attention_mask"}, kind)
    assert item.convert(others | item.example, True) == item.convert(item.example, True)


def broken(value: Any, bad: str) -> Any:
    """The value with bad characters at the end of every text in it, but not in what selects a branch."""
    if isinstance(value, str):
        return value if value in ("user", "assistant") else value + bad
    if isinstance(value, list):
        return [broken(part, bad) for part in value]
    return {name: broken(part, bad) for name, part in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("item", [item for item in FORMATS.values() if item.name != "pretokenized"], ids=lambda item: item.name)
@pytest.mark.parametrize(("bad", "words"), [("\0", "NUL (U+0000)"), ("\ud83d", "U+D83D, half of a surrogate pair")])
def test_no_format_lets_broken_characters_through(item: Format, bad: str, words: str) -> None:
    row = broken(item.example, bad)
    if item.name == "question_answering":
        row["context"] = row["answers"]["text"][0] + item.example["context"]
    with pytest.raises(RowError, match=re.escape(words)):
        item.convert(row, True)


RICH: list[tuple[str, dict[str, Any]]] = [
    *((name, dict(item.example)) for name, item in FORMATS.items()),
    *((name, row) for name, row, _ in GOOD),
    (
        "chat",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}], "train": False},
                {
                    **{"role": "assistant", "content": "ho", "reasoning_content": "hm", "weight": 0.5, "name": "bo"},
                    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
                },
                {"role": "tool", "content": "3", "tool_call_id": "c1"},
                {"from": "function_call", "value": [{"name": "add", "arguments": "{}"}]},
            ],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        },
    ),
    ("preference", {"prompt": ASKED[:1], "chosen": [ASKED[1]], "rejected": {"from": "gpt", "value": "he"}}),
    ("pretokenized", {"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [0, 1]}),
]
ODD = [
    None,
    math.nan,
    math.inf,
    "",
    " ",
    "x",
    "[",
    "[1]",
    '{"a": 1}',
    0,
    -1,
    1.5,
    True,
    b"x",
    [],
    {},
    [[]],
    [None],
    {"a": None},
    (),
]


def altered(value: Any) -> Iterator[Any]:
    """The value with every part of it, one after the other, replaced by every odd value, and left out."""
    yield from ODD
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for part in altered(value[key]):
            changed = value.copy()
            changed[key] = part
            yield changed
        changed = value.copy()
        del changed[key]
        yield changed


@pytest.mark.parametrize(("name", "row"), RICH)
@pytest.mark.parametrize("target", [True, False])
def test_odd_values_anywhere_in_a_row_are_refused_or_read_but_never_a_crash(
    name: str, row: dict[str, Any], target: bool
) -> None:
    for bad in altered(row):
        if isinstance(bad, dict):
            with suppress(RowError):
                canonical = FORMATS[name].convert(bad, target)
                assert canonical
                assert not target or FORMATS[name].columns_of(canonical)


def test_broken_characters_are_found_deep_in_tool_arguments_and_shown_with_what_is_before_them() -> None:
    call = {"name": "find", "arguments": {"where": [{"city": "Ulm \ud83d"}]}}
    row = {"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    with pytest.raises(RowError, match="as character 5 after 'Ulm ', U\\+D83D"):
        FORMATS["chat"].convert(row, True)


def test_broken_characters_are_found_in_the_names_of_tool_arguments() -> None:
    call = {"name": "find", "arguments": {"ci\0ty": "Ulm"}}
    with pytest.raises(RowError, match="as character 3 after 'ci', NUL"):
        FORMATS["chat"].convert({"messages": [*ASKED, {"role": "assistant", "tool_calls": [call]}]}, True)


def test_whole_surrogate_pairs_and_other_scripts_are_text() -> None:
    assert FORMATS["text"].convert({"text": "\U0001f600 ünï 漢字\u200d"}, True) == {"text": "\U0001f600 ünï 漢字\u200d"}


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(RowError) as caught:
        FORMATS["tokens"].convert({"tokens": ["hi"], "tags": [{"a": "x" * 10_000}]}, True)
    assert len(str(caught.value)) < 200


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
        ("prompt_completion", {"prompt": "hi", "label": False}, {"prompt": "hi"}),
        ("prompt_completion", {"prompt": ASKED[:1], "completion": 3}, {"messages": ASKED[:1]}),
        (
            "prompt_completion", {"segments": [{"label": False, "text": "hi "}, *[{"label": True, "text": "ho"}] * 2]},
            {"segments": [{"text": "hi ", "train": False}]},
        ),
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
        ("tokens", {"tokens": ["hi"]}, "no column `tags` or `ner_tags` or `pos_tags` or `labels`; the row has"),
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
        ("classification", {"text": "hi", "labels": [0.5]}, "column `labels` holds [0.5]; a label is a name"),
        ("question_answering", {**FOUND, "is_impossible": True}, "`is_impossible` says true, and there are 1 answers"),
        ("question_answering", {**MISSING, "is_impossible": False}, "`is_impossible` says false, and there are 0 answers"),
        ("question_answering", {**FOUND, "is_impossible": "perhaps"}, "holds 'perhaps'; it must be true or false"),
        ("prompt_completion", {"prompt": "hi", "completion": "ho", "label": False}, "column `label` says false: a bad"),
        ("prompt_completion", {"prompt": "hi", "completion": "ho", "kto_tag": False}, "column `kto_tag` says false"),
        ("prompt_completion", {"prompt": "hi", "completion": "ho", "system": "be"}, "use `format: instruction` with `columns"),
        ("prompt_completion", {"prompt": ASKED[:1], "completion": "ho"}, "both must be lists, or both texts"),
        ("prompt_completion", {"prompt": ASKED[:1]}, "column `completion` holds None; it must be a list of turns"),
        ("prompt_completion", {"prompt": [said("x", "hi")], "completion": ASKED}, "turn 1 of `prompt` has the role 'x'"),
        ("prompt_completion", {"prompt": ASKED[:1], "completion": ASKED[:1]}, "no assistant turn: there is nothing to learn"),
        ("prompt_completion", {"segments": []}, "column `segments` holds []; it must be a list of segments"),
        ("prompt_completion", {"segments": ["hi"]}, "segment 1 is text, not a mapping with text and label"),
        ("prompt_completion", {"segments": [{"text": "hi"}]}, "segment 1 has the `label` None; it must be true"),
        ("prompt_completion", {"segments": [{"label": True, "text": 3}]}, "segment 1 has no text in `text`"),
        ("prompt_completion", {"segments": [{"label": True, "text": " "}]}, "no segment with text has `label: true`"),
        ("seq2seq", {"translation": {"en": "hi", "de": "ho"}}, "`columns: {source: translation.en, target: translation.de}`"),
        ("classification", {"label": "x"}, "no column `text` or `sentence` or `sentence1`; the row has `label`"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_its_column(name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS[name].convert(row, True)
    assert words in str(caught.value)


@pytest.mark.parametrize("segments", [[True], [True, True]])
def test_segments_need_something_to_continue_at_inference(segments: list[bool]) -> None:
    row = {"segments": [{"text": "hi", "label": label} for label in segments]}
    with pytest.raises(RowError, match="there is nothing to continue"):
        FORMATS["prompt_completion"].convert(row, False)


def test_a_prompt_is_needed_even_without_target() -> None:
    for name, row in {"instruction": {"output": "ho"}, "prompt_completion": {}, "chat": {}, "text": {}, "seq2seq": {}}.items():
        with pytest.raises(RowError):
            FORMATS[name].convert(row, False)
