"""Metrics of resamples: those of the libraries on the rows that were drawn, for every task."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peftkit.tasks import TASKS
from peftkit.tasks.encoding import EmbeddingSettings, Encoding, SpanSettings
from peftkit.tasks.generations import AnswerSettings
from peftkit.tasks.generations_torch import AnswerScorer
from tests.conftest import WORDS, bert_like_tokenizer, tiny_tokenizer

NAMES = ("a", "b", "c", "never")
TAGS = ("O", "B-WHO", "I-WHO", "B-DID")
Row = dict[str, Any]


def loss_of(dice: random.Random) -> Row:
    return {"loss_sum": dice.random(), "num_targets": 1}


def class_row(dice: random.Random) -> Row:
    return {"label": dice.choice(NAMES[:3]), "prediction": dice.choice(NAMES[:3]), **loss_of(dice)}


def set_row(dice: random.Random) -> Row:
    label, guess = ([name for name in NAMES if dice.random() < 0.4] for _ in range(2))
    return {"label": label, "prediction": guess, **loss_of(dice)}


def number_row(dice: random.Random) -> Row:
    truth = float(dice.randrange(4))
    return {"label": truth, "prediction": truth + dice.choice([-1.0, 0.0, 1.0]), **loss_of(dice)}


def tag_row(dice: random.Random) -> Row:
    size = dice.randrange(1, 6)
    label, guess = ([dice.choice(TAGS) for _ in range(size)] for _ in range(2))
    return {"label": label, "prediction": guess, "loss_sum": dice.random(), "num_targets": size, "num_words_cut": 0}


def plain_tag_row(dice: random.Random) -> Row:
    row = tag_row(dice)
    return row | {name: [tag.replace("-", "") for tag in row[name]] for name in ("label", "prediction")}


def span_row(dice: random.Random) -> Row:
    answers = dice.choice([[], ["a cat"], ["two dogs", "dogs"]])
    figures = {"f1": dice.random(), "exact_match": float(dice.random() < 0.5)}
    kept = {"null_score": dice.random(), "_with_answer": figures, "_without": float(not answers)}
    return {"answers": answers, "loss_sum": dice.random(), "num_targets": dice.randrange(1, 3), **figures, **kept}


def token_row(dice: random.Random) -> Row:
    return {"loss_sum": dice.random() * 9, "num_targets": 2.5, "num_tokens": 3, "num_correct": dice.randrange(4)}


def pair_row(dice: random.Random) -> Row:
    texts = [" ".join(dice.sample(WORDS, 2)) for _ in range(3)]
    vectors = torch.tensor([[dice.random() - 0.5 for _ in range(4)] for _ in texts])
    labels = torch.tensor([[0.0, role, torch.nan] for role in (0.0, 1.0, 2.0)])
    return {"_vectors": vectors, "_texts": texts, "_labels": labels, "similarity": 0.0}


def scored_row(dice: random.Random) -> Row:
    return pair_row(dice) | {"label": dice.randrange(6) / 5, "similarity": dice.random()}


CASES: dict[str, tuple[str, Callable[[random.Random], Row], dict[str, Any]]] = {
    "classes": ("SEQ_CLS", class_row, {"labels": NAMES, "problem_type": "single_label_classification"}),
    "sets": ("SEQ_CLS", set_row, {"labels": NAMES, "problem_type": "multi_label_classification"}),
    "numbers": ("SEQ_CLS", number_row, {"problem_type": "regression"}),
    "spans of words": ("TOKEN_CLS", tag_row, {"labels": TAGS}),
    "tags": ("TOKEN_CLS", plain_tag_row, {"labels": ("O", "BWHO", "IWHO", "BDID")}),
    "answers in a context": ("QUESTION_ANS", span_row, {"span": SpanSettings(unanswerable=True)}),
    "tokens": ("CAUSAL_LM", token_row, {}),
    "scored pairs": ("FEATURE_EXTRACTION", scored_row, {"embedding": EmbeddingSettings(loss="cosine")}),
}
TABLES = ("by_class", "confusion", "num_words_cut")


def runtime_of(task: str, settings: dict[str, Any]) -> Any:
    tokenizer = tiny_tokenizer() if task == "CAUSAL_LM" else bert_like_tokenizer()
    return TASKS[task].runtime(tokenizer, Encoding(32, **settings))


@pytest.mark.parametrize("name", CASES)
def test_a_resample_has_the_metrics_of_the_rows_that_were_drawn(name: str) -> None:
    task, make, settings = CASES[name]
    runtime, dice = runtime_of(task, settings), random.Random(name)
    rows = [make(dice) for _ in range(40)]
    counts = [[1] * 40, *([dice.randrange(4) for _ in rows] for _ in range(3))]
    found = runtime.resampler(rows)(torch.tensor(counts, dtype=torch.float64))
    for place, drawn in enumerate(counts):
        again = [row for row, count in zip(rows, drawn, strict=True) for _ in range(count)]
        expected = {key: value for key, value in runtime.summarise(again).items() if key not in TABLES}
        expected = {key: value for key, value in expected.items() if not key.startswith("best_")}
        assert {key: float(values[place]) for key, values in found.items()} == pytest.approx(expected, rel=1e-9), place


@pytest.mark.parametrize("loss", ["contrastive", "triplet"])
def test_resampled_anchors_keep_the_candidates_of_the_whole_split(loss: str) -> None:
    runtime, dice = runtime_of("FEATURE_EXTRACTION", {"embedding": EmbeddingSettings(loss=loss)}), random.Random(0)
    rows = [pair_row(dice) for _ in range(30)]
    once, anchor = torch.ones(1, 30, dtype=torch.float64), torch.zeros(1, 30, dtype=torch.float64)
    anchor[0, 7] = 2.0
    resampler = runtime.resampler(rows)
    whole = {key: float(value[0]) for key, value in resampler(once).items()}
    assert whole == pytest.approx(runtime.summarise(rows), rel=1e-9)
    assert float(resampler(anchor)["mrr"][0]) == pytest.approx(runtime.row_figures(rows)[7])


def test_generation_metrics_are_resampled_from_counts() -> None:
    metrics = ("rouge", "bleu", "chrf", "exact_match", "answer", "triples")
    scorer, dice = AnswerScorer(AnswerSettings(metrics, r"is (\w+)")), random.Random(1)
    texts = [f"it is {' '.join(dice.sample(WORDS, 5))}" for _ in range(30)]
    rows = [scorer.score(" ".join(dice.sample(text.split(), 5)), text) for text in texts]
    counts = [[1] * 30, [dice.randrange(3) for _ in rows]]
    found = scorer.resampler(rows)(torch.tensor(counts, dtype=torch.float64))
    for place, drawn in enumerate(counts):
        again = [row for row, count in zip(rows, drawn, strict=True) for _ in range(count)]
        assert {key: float(values[place]) for key, values in found.items()} == pytest.approx(scorer.summarise(again))
