"""Metrics against the libraries that they come from, and a few worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from peftkit.engine.paired import changes, differences, summary_of
from peftkit.tasks import TASKS, squad
from peftkit.tasks.encoding import EmbeddingSettings, Encoding, SpanSettings
from peftkit.tasks.resampling_torch import means_of
from tests.conftest import bert_like_tokenizer
from tests.engine.test_resampling import CASES, pair_row, runtime_of, span_row


def test_classes_by_hand() -> None:
    runtime = runtime_of(*[CASES["classes"][0], CASES["classes"][2]])
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "b")]
    rows = [{"label": truth, "prediction": guess, "loss_sum": 0.5, "num_targets": 1} for truth, guess in pairs]
    found = runtime.summarise(rows)
    # F1: a 2/3, b 1/2, c 0. MCC: (2*4 - (1*2 + 3*1)) / sqrt((16 - 10) * (16 - 6)).
    assert (found["accuracy"], found["loss"]) == (0.5, 0.5)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert found["mcc"] == pytest.approx(3 / math.sqrt(60))
    assert found["confusion"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert runtime.row_figures(rows) == [1.0, 0.0, 1.0, 0.0]


def test_entities_by_hand() -> None:
    runtime = runtime_of("TOKEN_CLS", CASES["spans of words"][2])
    truth, guess = ["B-WHO", "I-WHO", "O", "B-DID"], ["B-WHO", "O", "O", "B-DID"]
    rows = [{"label": truth, "prediction": guess, "loss_sum": 1.0, "num_targets": 4, "num_words_cut": 0}]
    found = runtime.summarise(rows)
    assert (found["precision"], found["recall"], found["f1"], found["token_accuracy"]) == (0.5, 0.5, 0.5, 0.75)
    assert found["by_class"]["DID"]["f1"] == 1.0
    assert found["by_class"]["WHO"]["f1"] == 0.0


def test_answers_are_compared_as_squad_does() -> None:
    assert squad.exact_match("The cat!", ["a dog", "cat"]) == 1.0
    assert squad.f1("the black cat sat", ["black cat"]) == pytest.approx(2 * 2 / 5)
    assert (squad.f1("", []), squad.f1("cat", [])) == (1.0, 0.0)


def test_the_best_threshold_is_that_of_an_exhaustive_search() -> None:
    dice = random.Random(3)
    rows = [(round(dice.uniform(-2, 2), 1), dice.random(), float(dice.random() < 0.4)) for _ in range(50)]

    def figure(threshold: float) -> float:
        return sum(answered if score <= threshold else without for score, answered, without in rows) / len(rows)

    best, threshold = squad.best_threshold(rows)
    assert best == pytest.approx(max(figure(bound / 10) for bound in range(-31, 31)))
    assert figure(threshold) == pytest.approx(best)
    assert squad.best_threshold([(0.5, 0.0, 1.0)]) == (1.0, -0.5)  # better never to answer


def test_a_threshold_is_offered_where_questions_have_no_answer() -> None:
    runtime, dice = runtime_of("QUESTION_ANS", {"span": SpanSettings(unanswerable=True)}), random.Random(0)
    found = runtime.summarise([span_row(dice) for _ in range(20)])
    assert found["best_f1"] >= found["f1"] * 0.5
    assert {"best_f1_threshold", "best_exact_match", "best_exact_match_threshold"} <= found.keys()


def test_retrieval_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

    settings = Encoding(32, embedding=EmbeddingSettings(loss="contrastive"))
    runtime, dice = TASKS["FEATURE_EXTRACTION"].runtime(bert_like_tokenizer(), settings), random.Random(5)
    rows = [pair_row(dice) | {"_texts": [f"anchor {n}", f"positive {n}", f"negative {n}"]} for n in range(25)]
    vectors = torch.nn.functional.normalize(torch.stack([row["_vectors"] for row in rows]), dim=-1)  # (25, 3, D)
    candidates = torch.cat([vectors[:, 1], vectors[:, 2]])
    scores, truth = vectors[:, 0] @ candidates.T, torch.eye(25, 50)
    found = runtime.summarise(rows)
    assert found["mrr"] == pytest.approx(label_ranking_average_precision_score(truth, scores))
    assert found["ndcg_at_10"] == pytest.approx(ndcg_score(truth, scores, k=10))
    top = scores.topk(5).indices
    assert found["recall_at_5"] == pytest.approx(sum(n in top[n] for n in range(25)) / 25)


def test_an_interval_covers_a_sure_difference_and_not_its_absence() -> None:
    dice = random.Random(0)
    base = [dice.random() for _ in range(400)]
    better = means_of({"same": base, "more": [value + dice.gauss(0.1, 0.2) for value in base]})
    found = differences(better, means_of({"same": base, "more": base}), 400, seed=0)
    assert found["same"] == {"difference": 0.0, "low": 0.0, "high": 0.0}
    low, difference, high = (found["more"][name] for name in ("low", "difference", "high"))
    # The normal interval of a mean of 400 numbers of standard deviation 0.2: 1.96 * 0.01 to each side.
    assert (difference - low, high - difference) == pytest.approx((0.0196, 0.0196), rel=0.25)
    assert found == differences(better, means_of({"same": base, "more": base}), 400, seed=0)


def test_pairs_of_rows_make_an_interval_narrow() -> None:
    dice = random.Random(1)
    base = [dice.random() for _ in range(200)]
    found = differences(means_of({"a": [value + 0.01 for value in base]}), means_of({"a": base}), 200, seed=0)["a"]
    assert (found["low"], found["high"]) == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize(("more_is_better", "better"), [(True, ["b"]), (False, ["c"])])
def test_rows_that_changed_are_told_by_the_direction_of_their_figure(more_is_better: bool, better: list[str]) -> None:
    found = summary_of(changes(["a", "b", "c"], [1.0, 2.0, 0.5], [1.0, 1.0, 1.0], more_is_better=more_is_better))
    assert (found["better"], found["worse"]) == (1, 1)
    assert [line["row"] for line in found["most_better"]] == better


def test_ten_thousand_rows_are_resampled_in_seconds() -> None:
    import time

    task, make, settings = CASES["classes"]
    runtime, dice = runtime_of(task, settings), random.Random(0)
    rows = [make(dice) for _ in range(10_000)]
    started = time.process_time()
    differences(runtime.resampler(rows), runtime.resampler(rows), len(rows), seed=0)
    assert time.process_time() - started < 20
