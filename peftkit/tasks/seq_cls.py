"""SEQ_CLS: one label, several labels or a number for a text or a pair of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peftkit.formats.base import RowError
from peftkit.tasks.base import Rows, Task, labels_of
from peftkit.tasks.encoding import Encoding

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
METRICS_BY_PROBLEM = {
    SINGLE: ("loss", "accuracy", "f1_macro", "f1_weighted", "mcc"),
    MULTI: ("loss", "f1_micro", "f1_macro", "f1_weighted", "f1_samples", "exact_match"),
    REGRESSION: ("loss", "mse", "mae", "pearson", "spearman"),
}


def number_of(label: Any) -> float | None:
    """A label as a number, where it is one or, as in CSV files, the text of one."""
    if isinstance(label, int | float):
        return float(label)
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def class_of(label: Any) -> str:
    """The name of a class; 3 and 3.0 are the same one."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _problem_type(rows: Rows) -> str:
    """What the labels are; those of a few odd rows do not decide, so that these are named when they are encoded.

    Raises:
        RowError: some are fractions and some no numbers.
    """
    num_lists = num_rows = 0
    fraction = word = None
    for row in rows:
        label = row["label"]
        num_rows += 1
        num_lists += isinstance(label, list)
        number = None if isinstance(label, list) else number_of(label)
        fraction = label if number is not None and not number.is_integer() else fraction
        word = label if number is None and not isinstance(label, list) else word
    if 2 * num_lists >= num_rows:
        return MULTI
    if fraction is not None and word is not None:
        raise RowError(
            f"some labels are numbers with fractions, such as {fraction!r}, and some no numbers, such as {word!r}: "
            "`data.problem_type` says what is meant (regression, or single_label_classification)"
        )
    return REGRESSION if fraction is not None else SINGLE


def _settle(stated: Encoding, rows: Rows, model_kind: str | None) -> Encoding:
    """The problem type and the names of the classes, where the recipe names neither."""
    stated = dataclasses.replace(stated, adds_end=model_kind == "encoder-decoder")
    kind = _problem_type(rows) if stated.problem_type == "auto" else stated.problem_type
    if kind == REGRESSION:
        return dataclasses.replace(stated, problem_type=kind, labels=())
    found = {class_of(part) for row in rows for part in (row["label"] if isinstance(row["label"], list) else [row["label"]])}
    labels = stated.labels or labels_of(found)
    if len(labels) < (2 if kind == SINGLE else 1):
        needs = "a classifier needs two" if kind == SINGLE else "there is nothing to learn"
        raise RowError(f"the training rows have {len(labels)} class(es) ({', '.join(labels)}); {needs}")
    return dataclasses.replace(stated, problem_type=kind, labels=labels)


def _idle_keys(settings: Encoding) -> Mapping[str, str]:
    if settings.problem_type != REGRESSION:
        return {}
    return dict.fromkeys(("data.labels", "training.label_smoothing_factor"), "has no effect for regression")


_METRICS = {
    **{"loss": False, "accuracy": True, "f1_macro": True, "f1_weighted": True, "mcc": True},
    **{"f1_micro": True, "f1_samples": True, "exact_match": True},
    **{"mse": False, "mae": False, "pearson": True, "spearman": True},
}

SEQ_CLS = Task(
    name="SEQ_CLS",
    summary="one label, several labels or a number per text (or pair of texts)",
    auto_class="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    reads=(("text", "label"),),
    metrics=_METRICS,
    default_metric="accuracy",
    generates=False,
    uses_chat_template=False,
    has_head=True,
    has_labels=True,
    train_on=(),
    runtime_module="peftkit.tasks.seq_cls_torch",
    other_default_metrics=("f1_micro", "spearman"),
    own_keys=("data.problem_type",),
    settle=_settle,
    idle_keys=_idle_keys,
    metrics_under=lambda settings: METRICS_BY_PROBLEM.get(settings.problem_type, tuple(_METRICS)),
)
