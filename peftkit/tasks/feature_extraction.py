"""FEATURE_EXTRACTION: texts become vectors that are near where the texts belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from peftkit.formats.base import RowError
from peftkit.tasks.base import Rows, Task
from peftkit.tasks.encoding import EmbeddingSettings, Encoding

RETRIEVAL_METRICS = ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr", "ndcg_at_10")
SCORE_METRICS = ("loss", "pearson", "spearman")
_LOSS_OF_KEY = {"embedding.scale": "contrastive", "embedding.margin": "triplet", "embedding.score_range": "cosine"}


def _settle(stated: Encoding, rows: Rows, model_kind: str | None) -> Encoding:
    """Loss and pooling, where the recipe leaves them open.

    Raises:
        RowError: the rows lack what the loss needs.
    """
    embedding = stated.embedding or EmbeddingSettings()
    scored = any("score" in row for row in rows)  # those that differ are named when they are encoded
    loss = embedding.loss if embedding.loss != "auto" else "cosine" if scored else "contrastive"
    if (loss == "cosine") != scored:
        has, takes = ("a", "pairs without one") if scored else ("no", "rows with one")
        raise RowError(f"the training rows have {has} `score`, and `embedding.loss: {loss}` takes {takes}")
    if loss == "triplet" and not any(row.get("negative") for row in rows):
        raise RowError("`embedding.loss: triplet` needs a `negative` in every training row")
    pooling = embedding.pooling if embedding.pooling != "auto" else "last" if model_kind == "decoder" else "mean"
    return dataclasses.replace(stated, embedding=dataclasses.replace(embedding, loss=loss, pooling=pooling))


def _idle_keys(settings: Encoding) -> Mapping[str, str]:
    loss = settings.embedding.loss if settings.embedding else "auto"
    if loss == "auto":
        return {"embedding.margin": "has no effect without `loss: triplet`"}
    idle = {key: f"has no effect with `loss: {loss}`" for key, needed in _LOSS_OF_KEY.items() if needed != loss}
    if loss != "contrastive":
        idle["training.label_smoothing_factor"] = f"has no effect with `embedding.loss: {loss}`"
    return idle


def _metrics(settings: Encoding) -> tuple[str, ...]:
    loss = settings.embedding.loss if settings.embedding else "auto"
    return SCORE_METRICS if loss == "cosine" else RETRIEVAL_METRICS


FEATURE_EXTRACTION = Task(
    name="FEATURE_EXTRACTION",
    summary="a vector per text; search, clustering, similarity",
    auto_class="AutoModel",
    pipeline_tag="feature-extraction",
    encoder_auto_class="AutoModelForTextEncoding",
    only_hidden_states=True,
    reads=(("anchor", "positive"),),
    metrics={
        **{"loss": False, "recall_at_1": True, "recall_at_5": True, "recall_at_10": True, "mrr": True, "ndcg_at_10": True},
        **{"pearson": True, "spearman": True},
    },
    default_metric="ndcg_at_10",
    other_default_metrics=("spearman",),
    generates=False,
    uses_chat_template=False,
    has_head=False,
    has_labels=False,
    train_on=(),
    runtime_module="peftkit.tasks.feature_extraction_torch",
    own_keys=("embedding",),
    settle=_settle,
    idle_keys=_idle_keys,
    metrics_under=_metrics,
    plain_note="The model gives hidden states: `embedding` in `peftkit.json` says how training made a vector of them.",
)
