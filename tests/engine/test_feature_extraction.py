"""FEATURE_EXTRACTION: pooled vectors and the losses that bring texts together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from peftkit.formats.base import RowError
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import EmbeddingSettings, Encoding
from peftkit.tasks.example import Runtime
from peftkit.tasks.feature_extraction_torch import pooled
from tests.conftest import bert_like_tokenizer, pair_rows, write_jsonl
from tests.runs import curve, run_cli, tiny_recipe, train

PAIR = {"anchor": "the cat", "positive": "a cat sat"}
SCORED = [{"sentence1": row["anchor"], "sentence2": row["positive"], "score": n % 6} for n, row in enumerate(pair_rows(21))]


def runtime_of(max_length: int = 48, truncation: str = "error", **embedding: Any) -> Runtime:
    settings = Encoding(max_length, truncation, embedding=EmbeddingSettings(**embedding))
    return TASKS["FEATURE_EXTRACTION"].runtime(bert_like_tokenizer(), settings)


def batch_of(runtime: Runtime, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return runtime.collate([example for row in rows for example in runtime.encode(row, "rows:1")])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("mean", [2.0, 3.0]), ("cls", [1.0, 2.0]), ("last", [3.0, 4.0]), ("max", [3.0, 4.0])],
)
def test_padding_takes_no_part_in_pooling(pooling: str, expected: list[float]) -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    assert pooled(hidden, torch.tensor([[1, 1, 0]]), pooling).tolist() == [expected]


def test_texts_of_a_row_become_vectors_in_order(models_dir: Path) -> None:
    runtime = runtime_of()
    batch = batch_of(runtime, [PAIR | {"negative": ["two birds", "seven small dogs"]}, PAIR])
    assert batch["labels"][:, :2].tolist() == [[0, 0], [0, 1], [0, 2], [0, 2], [1, 0], [1, 1]]
    model = AutoModel.from_pretrained(models_dir / "bert").eval()
    vectors = runtime.forward(model, batch)
    alone = runtime.forward(model, batch_of(runtime, [PAIR]))
    assert torch.allclose(vectors[4:], alone, atol=1e-6)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(6))


def test_vectors_keep_their_length_without_normalize(models_dir: Path) -> None:
    model = AutoModel.from_pretrained(models_dir / "bert").eval()
    runtime = runtime_of(normalize=False)
    batch = batch_of(runtime, [PAIR])
    assert not torch.allclose(runtime.forward(model, batch).norm(dim=-1), torch.ones(2))


# Two anchors along the axes, positives beside them; cosines 0.8 with the own positive and 0.6 with the other one.
VECTORS = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
LABELS = torch.tensor([[0, 0, math.nan], [0, 1, math.nan], [1, 0, math.nan], [1, 1, math.nan]])


def test_the_contrastive_loss_tells_the_positive_from_the_other_rows() -> None:
    loss = runtime_of(loss="contrastive", scale=10.0).loss_sum(VECTORS, LABELS)
    assert float(loss) == pytest.approx(2 * math.log(1 + math.exp(-2)), rel=1e-5)


def test_negatives_are_candidates_for_every_anchor() -> None:
    vectors = torch.cat([VECTORS, torch.tensor([[0.6, -0.8]])])
    labels = torch.cat([LABELS, torch.tensor([[1, 2, math.nan]])])
    loss = runtime_of(loss="contrastive", scale=10.0).loss_sum(vectors, labels)
    first = math.log(1 + math.exp(-2) + math.exp(-2))
    second = math.log(1 + math.exp(-2) + math.exp(-16))
    assert float(loss) == pytest.approx(first + second, rel=1e-5)


def test_the_triplet_loss_averages_a_rows_negatives() -> None:
    vectors = torch.cat([VECTORS[:2], torch.tensor([[0.6, 0.8], [-1.0, 0.0]])])
    labels = torch.tensor([[0, 0, math.nan], [0, 1, math.nan], [0, 2, math.nan], [0, 2, math.nan]])
    # Distances: 0.2 to the positive, 0.4 and 2 to the negatives.
    assert float(runtime_of(loss="triplet", margin=0.5).loss_sum(vectors, labels)) == pytest.approx((0.3 + 0) / 2, rel=1e-5)


def test_the_cosine_loss_is_the_squared_error_of_the_similarity() -> None:
    labels = LABELS.clone()
    labels[:2, 2], labels[2:, 2] = 1.0, 0.5
    assert float(runtime_of(loss="cosine").loss_sum(VECTORS, labels)) == pytest.approx(0.2**2 + 0.3**2, rel=1e-5)


def test_scores_are_stretched_from_their_range() -> None:
    runtime = runtime_of(loss="cosine", score_range=(1.0, 5.0))
    assert batch_of(runtime, [PAIR | {"score": 4.0}])["labels"][:, 2].tolist() == [0.75, 0.75]
    with pytest.raises(RowError, match=r"the score 6 is outside of embedding.score_range \[1, 5\]"):
        runtime.encode(PAIR | {"score": 6.0}, "rows:1")


def test_joined_labels_count_the_rows_on() -> None:
    runtime = runtime_of()
    joined = runtime.join_labels([LABELS, LABELS[:2], LABELS])
    assert joined[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert runtime.couples_rows
    assert not runtime_of(loss="cosine").couples_rows


def test_a_row_without_targets_has_no_loss() -> None:
    runtime = runtime_of()
    (example,) = runtime.encode(PAIR, "rows:1")
    labels = runtime.collate([example.without_targets()])["labels"]
    assert float(runtime.loss_sum(VECTORS[:2], labels)) == 0.0


def test_long_texts_are_cut_each_for_itself() -> None:
    (example,) = runtime_of(5, "right").encode({"anchor": "cat", "positive": "seven small dogs ran home"}, "rows:1")
    assert [len(ids) for ids in example.inputs["input_ids"]][1] == 5
    assert example.num_tokens > 5


def retrieval_results(vectors: list[list[list[float]]], texts: list[list[str]]) -> list[dict[str, Any]]:
    rows = zip(vectors, texts, strict=True)
    roles = [0, 1, 2, 2]
    return [
        {
            "_vectors": torch.tensor(row),
            "_texts": words,
            "_labels": torch.tensor([[0, role, math.nan] for role in roles[: len(row)]]),
        }
        for row, words in rows
    ]


def test_retrieval_metrics_are_those_worked_out_by_hand() -> None:
    # The first anchor's positive comes second, after the other row's; the second anchor's comes first.
    results = retrieval_results([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [1.0, 0.0]]], [["a", "p"], ["b", "q"]])
    found = runtime_of(scale=1.0).summarise(results)
    assert (found["recall_at_1"], found["recall_at_5"]) == (0.5, 1.0)
    assert found["mrr"] == (1 / 2 + 1) / 2
    assert found["ndcg_at_10"] == pytest.approx((1 / math.log2(3) + 1) / 2)
    assert found["loss"] == pytest.approx((math.log(1 + math.e) + math.log(1 + math.exp(-0.2))) / 2, rel=1e-5)


def test_a_text_that_occurs_twice_is_one_candidate() -> None:
    results = retrieval_results([[[1.0, 0.0], [0.8, 0.6]], [[0.6, 0.8], [0.8, 0.6]]], [["a", "p"], ["b", "p"]])
    assert runtime_of().summarise(results)["recall_at_1"] == 1.0


def test_other_positives_of_the_same_anchor_do_not_compete() -> None:
    results = retrieval_results([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.8, 0.6]]], [["a", "p"], ["a", "q"]])
    assert runtime_of().summarise(results)["recall_at_1"] == 1.0


@pytest.mark.parametrize(
    ("kind", "pooling"), [("decoder", "last"), ("encoder", "mean"), ("encoder-decoder", "mean"), (None, "mean")]
)
def test_pooling_follows_the_model_where_the_recipe_is_silent(kind: str | None, pooling: str) -> None:
    settled = TASKS["FEATURE_EXTRACTION"].settle(
        Encoding(8, embedding=EmbeddingSettings(pooling="auto", loss="auto")), [PAIR], kind
    )
    assert settled.embedding is not None
    assert (settled.embedding.pooling, settled.embedding.loss) == (pooling, "contrastive")


@pytest.mark.parametrize("data", ["pairs", "scores", "triplets"])
def test_losses_are_the_same_for_every_micro_batch(models_dir: Path, tmp_path: Path, data: str) -> None:
    sections = {"pairs": {}, "scores": {"score_range": [0, 5]}, "triplets": {"loss": "triplet"}}
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [row | {"negative": "two red birds"} for row in pair_rows(21)],
        "scores": SCORED,
        "triplets": [row | {"negative": ["two birds", row["anchor"]]} for row in pair_rows(21)],
    }
    curves = []
    for size in (8, 4, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        recipe = tiny_recipe(
            "FEATURE_EXTRACTION", models_dir, folder, training={"micro_batch_size": size}, embedding=sections[data]
        )
        write_jsonl(folder / "rows.jsonl", rows[data])
        train(recipe, folder / "run")
        curves.append([value for line in curve(folder / "run", "loss", "grad_norm") for value in line])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


@pytest.fixture(scope="module")
def run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on pairs, with six test rows."""
    folder = tmp_path_factory.mktemp("vectors")
    test = write_jsonl(folder / "test.jsonl", pair_rows(30)[-6:])
    train(tiny_recipe("FEATURE_EXTRACTION", models_dir, folder, data={"test": str(test)}), folder / "run")
    return folder / "run"


def test_vectors_are_not_written_with_the_metrics(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "evaluations/test.predictions.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"row", "similarity"}] * 6


@pytest.mark.parametrize("batch_size", [1, 4])
def test_metrics_do_not_depend_on_the_batch_size(run: Path, batch_size: int) -> None:
    one, many = (run_cli("evaluate", run, "--json", "--batch-size", size).json["metrics"] for size in (16, batch_size))
    assert many == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("column", ["text", "anchor", "sentence1", "prompt"])
def test_a_text_in_any_column_gets_its_vector(run: Path, tmp_path: Path, column: str) -> None:
    alone = run_cli("infer", "--adapter", run, "--prompt", "the cat sat", "--json").json["prediction"]
    source = write_jsonl(tmp_path / "in.jsonl", [{column: "the cat sat", "id": 1}, {column: "two birds", "id": 2}])
    assert run_cli("infer", "--adapter", run, "--input", source, "--output", tmp_path / "out.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0]["prediction"] == pytest.approx(alone, abs=1e-6)
    assert math.hypot(*rows[1]["prediction"]) == pytest.approx(1.0, rel=1e-5)
    assert len(alone) == 32


@pytest.mark.parametrize(
    ("rows", "embedding", "words"),
    [
        (pair_rows(21), {"margin": 0.2}, "embedding.margin: has no effect"),
        (SCORED, {"score_range": [0, 5], "scale": 3}, "embedding.scale: has no effect with `loss: cosine`"),
        (SCORED, {"score_range": [5, 0]}, "embedding.score_range: [5, 0] is empty"),
        (SCORED, {"loss": "contrastive"}, "the training rows have a `score`"),
        (pair_rows(21), {"loss": "triplet"}, "needs a `negative` in every training row"),
        (SCORED, {}, "the score 2 is outside of embedding.score_range [0, 1]"),
    ],
)
def test_rows_and_settings_that_do_not_go_together_are_refused(
    models_dir: Path, tmp_path: Path, rows: list[dict[str, Any]], embedding: dict[str, Any], words: str
) -> None:
    recipe = tiny_recipe("FEATURE_EXTRACTION", models_dir, tmp_path, embedding=embedding)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    result = run_cli("plan", recipe)
    assert result.code in (2, 3)
    assert words in result.err


def test_the_section_has_no_effect_for_other_tasks(models_dir: Path, tmp_path: Path) -> None:
    result = run_cli("validate", tiny_recipe("SEQ_CLS", models_dir, tmp_path, embedding={"pooling": "cls"}))
    assert result.code == 2
    assert "embedding: has no effect for SEQ_CLS" in result.err


def test_a_metric_of_other_rows_is_refused_before_weights_are_loaded(models_dir: Path, tmp_path: Path) -> None:
    sections = {"data": {"validation": 0.2}, "training": {"metric_for_best_model": "spearman"}}
    result = run_cli("plan", tiny_recipe("FEATURE_EXTRACTION", models_dir, tmp_path, **sections))
    assert result.code == 2
    assert "`spearman` does not go with these rows; there are loss, recall_at_1" in result.err
