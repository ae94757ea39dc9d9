"""How rows become token ids and outputs become answers: the settings of a task that are stored with an adapter."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SpanSettings:
    """How answers are found in a context (QUESTION_ANS).

    Attributes:
        doc_stride: tokens of the context that two windows share; at most half of what a window has room for.
        max_answer_length: longest answer, in tokens.
        null_score_threshold: how much higher than the best answer's the score of "no answer" must be.
        unanswerable: whether questions without answer were learned, so that "no answer" is one; None until rows are read.
    """

    doc_stride: int = 128
    max_answer_length: int = 30
    null_score_threshold: float = 0.0
    unanswerable: bool | None = None


@dataclass(frozen=True)
class EmbeddingSettings:
    """How texts become vectors and what these learn (FEATURE_EXTRACTION).

    Attributes:
        pooling: `mean`, `cls`, `last` or `max` over the tokens' hidden states (`auto` until it is decided).
        normalize: whether vectors have length 1.
        loss: `contrastive`, `cosine` or `triplet` (`auto` until it is decided).
        scale: of the similarities of the contrastive loss.
        margin: of the triplet loss, as a cosine distance.
        score_range: lowest and highest `score` of a row.
    """

    pooling: str = "mean"
    normalize: bool = True
    loss: str = "contrastive"
    scale: float = 20.0
    margin: float = 0.5
    score_range: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Encoding:
    """How rows become token ids; stored with the adapter, so that inference repeats it.

    Attributes:
        max_length: tokens per example (per window or text, where an example has several).
        truncation: `error`, `left`, `right`, `drop` or `split`.
        train_on: which tokens are targets.
        labels: names of the classes in order, for tasks that have them.
        numbered: whether a whole number may stand for the label at that place: the recipe has named them in order.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`, for SEQ_CLS.
        adds_end: whether a text gets an end token where the tokenizer gives it none: models with a decoder pool that token.
        label_all_tokens: whether a word's tag is learned at all of its tokens, for TOKEN_CLS.
        source_prefix: text before every source, for SEQ_2_SEQ_LM.
        chat_template_kwargs: further variables of the chat template.
        template_date: the day (ISO) that a chat template wrote, if it writes one.
        task_names: what `task_id` may be, in order, for methods that learn from several tasks.
        span: for QUESTION_ANS.
        embedding: for FEATURE_EXTRACTION.
    """

    max_length: int
    truncation: str = "error"
    train_on: str = "completion"
    labels: tuple[str, ...] = ()
    numbered: bool = False
    problem_type: str = ""
    adds_end: bool = False
    label_all_tokens: bool = False
    source_prefix: str = ""
    chat_template_kwargs: dict[str, str | int | float | bool] = field(default_factory=dict)
    template_date: str | None = None
    task_names: tuple[str, ...] = ()
    span: SpanSettings | None = None
    embedding: EmbeddingSettings | None = None

    @property
    def num_outputs(self) -> int:
        """Outputs of the head, where the rows decide on them; else 0."""
        return 1 if self.problem_type == "regression" else len(self.labels)

    def for_prompts(self, max_length: int | None) -> Encoding:
        """How prompts become token ids: bound by what the model takes (None: anything), and none is cut in silence."""
        return dataclasses.replace(self, max_length=max_length or sys.maxsize, truncation="error")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Encoding:
        """What `dataclasses.asdict` and JSON have made of it; keys of later versions of peftkit are missing in old files.

        Raises:
            TypeError: a key that is not known here.
        """
        values = dict(data) | {name: tuple(data.get(name, ())) for name in ("labels", "task_names")}
        if values.get("span"):
            values["span"] = SpanSettings(**values["span"])
        if values.get("embedding"):
            embedding = EmbeddingSettings(**values["embedding"])
            low, high = embedding.score_range
            values["embedding"] = dataclasses.replace(embedding, score_range=(low, high))
        return cls(**values)
