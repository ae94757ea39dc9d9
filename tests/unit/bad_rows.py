"""Small data files that are read well, and refused for what is in a row; with `bad_files` they are the whole corpus."""

from __future__ import annotations

import gzip
from functools import partial
from typing import Any

from tests.conftest import ROWS
from tests.unit.bad_files import (
    CLS,
    FILES,
    LM,
    QA,
    QUESTION,
    SEQ2SEQ,
    TAGS,
    VECTORS,
    BadFile,
    among,
    huge_line,
    lines,
    parquet,
    squad,
)

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
LABELS, NUMBERS = {"labels": ["bad", "good"]}, {"labels": ["0", "1"]}
TAG_NAMES, REGRESSION = {"labels": ["O", "B-PER"]}, {"problem_type": "regression"}
CHOICE = {"prompt": "a", "chosen": "yes", "rejected": "no"}
SEGMENTS = [{"text": "ask", "label": False}, {"text": " tell", "label": True}]
SCORED = {"text": "a", "text_pair": "b", "score": 0.5}


def _row(name: str, task: str, row: Any, *words: str, place: int = 2, **more: Any) -> BadFile:
    """A file of JSON lines that is sound but for one row, which the format or the task refuses."""
    return BadFile(name, task, "rows.jsonl", partial(among, task, row, place), (f"rows.jsonl:{place}", *words), **more)


def _second(name: str, task: str, sound: Any, row: Any, *words: str, **more: Any) -> BadFile:
    """A file of JSON lines with a sound row and a bad one."""
    return BadFile(name, task, "rows.jsonl", lines(sound, row), ("rows.jsonl:2", *words), **more)


def _turns(name: str, turns: list[Any], *words: str) -> BadFile:
    """A sound conversation and, as row 2, one of these turns."""
    return _second(name, LM, {"messages": [USER, ANSWER]}, {"messages": turns}, *words)


ROWS_OF_TASKS = [
    BadFile("huge line", LM, "huge.jsonl", huge_line, ("huge.jsonl:2", "tokens")),
    _row("instruction missing", LM, {"output": "hi"}, "instruction"),
    _row("output blank", LM, {"instruction": "hello", "output": "  "}, "output", "blank"),
    _row("output a number", LM, {"instruction": "hello", "output": 3}, "output"),
    _row("nested nulls", LM, {"instruction": None, "output": {"text": None}}, "instruction"),
    _row("history of texts", LM, {"instruction": "hello", "output": "hi", "history": ["a", "b"]}, "history"),
    _turns("messages empty", [], "messages"),
    _second("messages a text", LM, {"messages": [USER, ANSWER]}, {"messages": "hello"}, "messages"),
    _turns("turn a text", ["hello", ANSWER], "turn 1"),
    _turns("unknown role", [{"role": "wizard", "content": "a"}, ANSWER], "wizard"),
    _turns("no assistant turn", [USER], "assistant"),
    _turns("content a number", [{"role": "user", "content": 3}, ANSWER], "turn 1", "content"),
    _turns("assistant turn blank", [USER, {"role": "assistant", "content": " "}], "turn 2", "blank"),
    _turns(
        "tool call that is no mapping", [USER, {"role": "assistant", "content": "", "tool_calls": ["search"]}], "turn 2", "tool"
    ),
    _second("prompt without completion", LM, {"prompt": "a", "completion": "b"}, {"prompt": "a"}, "completion"),
    _second("text blank", LM, {"text": "a"}, {"text": "\t"}, "text", "blank"),
    _second("input_ids a text", LM, {"input_ids": [1, 2]}, {"input_ids": "1 2"}, "input_ids"),
    _second("input_ids out of the vocabulary", LM, {"input_ids": [1, 2]}, {"input_ids": [1, 10**6]}, "1000000"),
    _second("input_ids negative", LM, {"input_ids": [1, 2]}, {"input_ids": [1, -1]}, "-1"),
    _second(
        "labels of another length", LM, {"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}, "labels"
    ),
    _turns("weight below zero", [USER, ANSWER | {"weight": -1}], "turn 2", "weight"),
    _turns("flag that is no flag", [USER, ANSWER | {"train": "perhaps"}], "turn 2", "train"),
    _turns("picture among the parts", [{"role": "user", "content": [{"type": "image"}]}, ANSWER], "turn 1", "image"),
    _second("tools that are no JSON", LM, {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "tools": "[{"}, "tools"),
    _second("both answers alike", LM, CHOICE, CHOICE | {"rejected": "yes"}, "the same"),
    _second("rejected missing", LM, CHOICE, {"prompt": "a", "chosen": "yes"}, "rejected"),
    _second("no segment learned", LM, {"segments": SEGMENTS}, {"segments": SEGMENTS[:1]}, "nothing to learn"),
    _second(
        "every label ignored", LM, {"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [-100, -100]}, "nothing to learn"
    ),
    _second(
        "mask of another length", LM, {"input_ids": [1, 2]}, {"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask"
    ),
    _second("NUL written as an escape", LM, {"text": "a"}, r'{"text": "a\u0000"}', "NUL"),
    _row("source missing", SEQ2SEQ, {"target": "hi"}, "source"),
    _row("target blank", SEQ2SEQ, {"source": "hello", "target": ""}, "target", "blank"),
    _row("source a list", SEQ2SEQ, {"source": ["hello"], "target": "hi"}, "source"),
    _row("languages without a direction", SEQ2SEQ, {"translation": {"en": "hello", "de": "hallo"}}, "source"),
    _row("text missing", CLS, {"label": "greeting"}, "text"),
    _row("label missing", CLS, {"text": "a"}, "label"),
    _row("label null", CLS, {"text": "a", "label": None}, "label"),
    _row("label a mapping", CLS, {"text": "a", "label": {"name": "x"}}, "label"),
    _row("label NaN", CLS, '{"text": "a", "label": NaN}', "label"),
    _row("label blank", CLS, {"text": "a", "label": " "}, "label"),
    _second("label out of range", CLS, {"text": "a", "label": 1}, {"text": "b", "label": 7}, "'7'", data=NUMBERS),
    _second(
        "label that is none of the names", CLS, {"text": "a", "label": "bad"}, {"text": "b", "label": "sad"}, "sad", data=LABELS
    ),
    _second(
        "label that is no number", CLS, {"text": "a", "label": 0.5}, {"text": "b", "label": "high"}, "high", data=REGRESSION
    ),
    BadFile(
        "unknown label in validation",
        CLS,
        "dev.jsonl",
        lines({"text": "a", "label": "farewell"}),
        ("dev.jsonl:1", "farewell"),
        split="validation",
    ),
    _row("tags of another length", TAGS, {"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 tag"),
    _row("no words", TAGS, {"tokens": [], "tags": []}, "tokens"),
    _row("tokens a text", TAGS, {"tokens": "a b", "tags": ["O", "O"]}, "tokens"),
    _row("a word blank", TAGS, {"tokens": ["a", " "], "tags": ["O", "O"]}, "word 2"),
    _row("a tag null", TAGS, {"tokens": ["a", "b"], "tags": ["O", None]}, "tag 2"),
    _row("tags missing", TAGS, {"tokens": ["a", "b"]}, "tags"),
    _second(
        "tag that is none of the names",
        TAGS,
        {"tokens": ["a"], "tags": ["O"]},
        {"tokens": ["b"], "tags": ["B-LOC"]},
        "B-LOC",
        data=TAG_NAMES,
    ),
    _row("context missing", QA, {"question": "who?", "answers": {"text": ["a"], "answer_start": [0]}}, "context"),
    _row("question blank", QA, ROWS[QA] | {"question": " "}, "question", "blank"),
    _row("answer not in its context", QA, ROWS[QA] | {"answers": {"text": ["tim"], "answer_start": [0]}}, "tim"),
    _row("answer_start negative", QA, ROWS[QA] | {"answers": {"text": ["tom"], "answer_start": [-3]}}, "-3"),
    _row("answer_start a text", QA, ROWS[QA] | {"answers": {"text": ["tom"], "answer_start": ["x"]}}, "answer_start"),
    _row("answers of two lengths", QA, ROWS[QA] | {"answers": {"text": ["tom"], "answer_start": []}}, "answers"),
    _row("answers a text", QA, ROWS[QA] | {"answers": "tom"}, "answers"),
    _row("answer to what has none", QA, ROWS[QA] | {"is_impossible": True}, "is_impossible"),
    _row("answer blank", QA, ROWS[QA] | {"answers": {"text": [" "], "answer_start": [3]}}, "an answer is"),
    BadFile("context null in SQuAD", QA, "squad.json", squad(QUESTION, context=None), ("squad.json:1", "context")),
    BadFile("answer elsewhere in SQuAD", QA, "squad.json", squad(QUESTION, context="no tom"), ("squad.json:1", "tom")),
    _row("positive missing", VECTORS, {"anchor": "a"}, "positive"),
    _row("anchor a mapping", VECTORS, {"anchor": {"text": "a"}, "positive": "b"}, "anchor"),
    _row("negative a number", VECTORS, {"anchor": "a", "positive": "b", "negative": 3}, "negative"),
    _second(
        "score that is no number",
        VECTORS,
        SCORED,
        SCORED | {"score": "high"},
        "score",
        "high",
    ),
    _second(
        "score NaN",
        VECTORS,
        SCORED,
        '{"text": "a", "text_pair": "b", "score": NaN}',
        "score",
    ),
    _second("score missing", VECTORS, SCORED, {"text": "a", "text_pair": "b"}, "score"),
    _second("score out of range", VECTORS, SCORED, SCORED | {"score": 4}, "4", "score_range"),
    BadFile(
        "text blank in a compressed table",
        CLS,
        "rows.csv.gz",
        gzip.compress(b"text,label\na,x\nb,z\n,y\n"),
        ("rows.csv.gz:4", "text", "blank"),
    ),
    _second("template that makes nothing", LM, {"q": "a"}, {"q": ""}, "blank", source={"template": "{{ q }}"}),
    BadFile("text blank in a table", CLS, "rows.csv", b"text,label\na,x\n,y\n", ("rows.csv:3", "text", "blank")),
    BadFile(
        "null in Parquet", CLS, "rows.parquet", partial(parquet, text=["a", None], label=["x", "y"]), ("rows.parquet:2", "text")
    ),
    BadFile("columns of no format", CLS, "rows.jsonl", lines({"a": 1, "b": 2}), ("rows.jsonl", "`a`, `b`")),
]

BAD_FILES = [*FILES, *ROWS_OF_TASKS]
