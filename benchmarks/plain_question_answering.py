"""The baseline: extractive question answering with transformers' Trainer and peft alone, no peftkit.

    python benchmarks/plain_question_answering.py --model FOLDER --train train.jsonl --test test.jsonl --method lora

Rows are SQuAD's {"question", "context", "answers": {"text": [...], "answer_start": [...]}}, all of them answerable. Long
contexts become windows that share 128 tokens; windows without the answer point to the first token. Prints one JSON object:
exact match and F1 of the best span over all windows of a test row (at most 30 tokens), by SQuAD's normalisation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

import numpy as np
from plain_common import adapt, fit, parse_options, read_rows, report
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, set_seed

LEARNING_RATES = {"lora": 2e-3, "full": 2e-4}
STRIDE = 128
MAX_ANSWER_LENGTH = 30


def windows_of(row: dict[str, Any], tokenizer: Any, max_length: int) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Inputs of all windows of a row, and for each (length, 2) characters of its tokens; -1 outside the context."""
    texts = tokenizer(
        [row["question"]],
        [row["context"]],
        truncation="only_second",
        max_length=max_length,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    inputs, characters = [], []
    for index, offsets in enumerate(texts["offset_mapping"]):
        inputs.append({key: texts[key][index] for key in ("input_ids", "token_type_ids", "attention_mask")})
        of_context = np.array([part == 1 for part in texts.sequence_ids(index)])
        characters.append(np.where(of_context[:, None], np.array(offsets), -1))
    return inputs, characters


def labelled(row: dict[str, Any], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Windows of a training row with the positions of its first answer."""
    start = row["answers"]["answer_start"][0]
    end = start + len(row["answers"]["text"][0])
    inputs, characters = windows_of(row, tokenizer, max_length)
    for window, places in zip(inputs, characters, strict=True):
        first = np.flatnonzero((places[:, 0] <= start) & (places[:, 1] > start))
        last = np.flatnonzero((places[:, 0] < end) & (places[:, 1] >= end) & (places[:, 0] >= 0))
        whole = len(first) > 0 and len(last) > 0
        window |= {"start_positions": int(first[0]) if whole else 0, "end_positions": int(last[0]) if whole else 0}
    return inputs


def best_span(start_logits: np.ndarray, end_logits: np.ndarray, places: np.ndarray) -> tuple[float, int, int]:
    """Score, first and last character of a window's best span within the context."""
    length = len(places)
    inside = places[:, 0] >= 0
    scores = start_logits[:length, None] + end_logits[None, :length]  # (start, end)
    allowed = np.triu(np.ones((length, length), bool)) & ~np.triu(np.ones((length, length), bool), MAX_ANSWER_LENGTH)
    scores = np.where(allowed & inside[:, None] & inside[None, :], scores, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(places[first, 0]), int(places[last, 1])


def normalise(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(found: str, true: str) -> float:
    """F1 of the words of two answers."""
    found_words, true_words = normalise(found).split(), normalise(true).split()
    common = sum((Counter(found_words) & Counter(true_words)).values())
    return 2 * common / (len(found_words) + len(true_words)) if common else 0.0


def main() -> None:
    """Train, evaluate, print."""
    options = parse_options(__doc__, LEARNING_RATES, epochs=2, batch_size=4, max_length=384)
    set_seed(options.seed)
    train, test = read_rows(options.train, options.max_rows), read_rows(options.test)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForQuestionAnswering.from_pretrained(options.model)
    # No task type: peft's class for QUESTION_ANS would drop token_type_ids.
    model = adapt(model, options.method, modules_to_save=["qa_outputs"])
    inputs = [window for row in train for window in labelled(row, tokenizer, options.max_length)]
    trainer, seconds = fit(model, inputs, DataCollatorWithPadding(tokenizer), options)
    windows = [windows_of(row, tokenizer, options.max_length) for row in test]
    starts, ends = trainer.predict([window for inputs, _ in windows for window in inputs]).predictions
    exact, overlap, at = [], [], 0
    for row, (_, characters) in zip(test, windows, strict=True):
        spans = [best_span(starts[at + index], ends[at + index], places) for index, places in enumerate(characters)]
        at += len(characters)
        _, first, last = max(spans)
        found, answers = row["context"][first:last], row["answers"]["text"]
        exact.append(max(normalise(found) == normalise(answer) for answer in answers))
        overlap.append(max(f1(found, answer) for answer in answers))
    report(options, model, seconds, {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))})


if __name__ == "__main__":
    main()
