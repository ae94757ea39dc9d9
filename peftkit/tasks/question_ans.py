"""QUESTION_ANS: find the answer to a question in a context, or that there is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from peftkit.tasks.base import Rows, Task
from peftkit.tasks.encoding import Encoding, SpanSettings


def _settle(stated: Encoding, rows: Rows, model_kind: str | None) -> Encoding:
    """Whether there are questions without answer to learn."""
    span = stated.span or SpanSettings()
    unanswerable = any(not row["answers"]["text"] for row in rows)
    return dataclasses.replace(stated, span=dataclasses.replace(span, unanswerable=unanswerable))


def _idle_keys(settings: Encoding) -> Mapping[str, str]:
    idle = {
        "data.truncation": f"has no effect for {QUESTION_ANS.name}: a long context becomes several windows",
        "training.label_smoothing_factor": f"has no effect for {QUESTION_ANS.name}",
    }
    if settings.span and settings.span.unanswerable is False:
        idle["evaluation.null_score_threshold"] = "has no effect: every question in train has an answer"
    return idle


QUESTION_ANS = Task(
    name="QUESTION_ANS",
    summary="the span of a context that answers a question",
    auto_class="AutoModelForQuestionAnswering",
    pipeline_tag="question-answering",
    reads=(("question", "context", "answers"),),
    metrics={"loss": False, "f1": True, "exact_match": True},
    default_metric="f1",
    generates=False,
    uses_chat_template=False,
    has_head=True,
    has_labels=False,
    train_on=(),
    truncations=("error",),
    runtime_module="peftkit.tasks.question_ans_torch",
    num_outputs=2,  # a start and an end
    own_keys=("data.doc_stride", "evaluation.max_answer_length", "evaluation.null_score_threshold"),
    settle=_settle,
    idle_keys=_idle_keys,
    plain_note="PEFT's class drops `token_type_ids`: where the base model has them, call `model.base_model.model` instead.",
)
