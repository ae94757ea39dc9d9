"""TOKEN_CLS: one tag per word."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from peftkit.formats.base import RowError
from peftkit.tasks.base import Rows, Task, labels_of
from peftkit.tasks.encoding import Encoding

_SPAN_TAG = re.compile(r"O|[BIES]-.+")


def has_spans(tags: Sequence[str]) -> bool:
    """Whether tags mark spans of words: in BIO (B- or I- and a kind, O outside) or BIOES (E- last word, S- only word)."""
    return all(_SPAN_TAG.fullmatch(tag) for tag in tags) and any(tag != "O" for tag in tags)


def inner_tag(tag: str) -> str:
    """The tag of a word's further tokens: in BIO and BIOES they are inside of what the word begins or is alone."""
    return f"I-{tag[2:]}" if tag[:2] in ("B-", "S-") else tag


def _settle(stated: Encoding, rows: Rows, model_kind: str | None) -> Encoding:
    """The tags that occur, where the recipe names none."""
    labels = stated.labels or labels_of({str(tag) for row in rows for tag in row["tags"]})
    if len(labels) < 2:
        raise RowError(f"the training rows have {len(labels)} tag(s) ({', '.join(labels)}); a tagger needs two")
    return dataclasses.replace(stated, labels=labels)


SPAN_METRICS = ("loss", "f1", "precision", "recall", "token_accuracy")
TAG_METRICS = ("loss", "f1", "f1_macro", "token_accuracy")

TOKEN_CLS = Task(
    name="TOKEN_CLS",
    summary="one tag per word; names of persons and places, parts of speech",
    auto_class="AutoModelForTokenClassification",
    pipeline_tag="token-classification",
    reads=(("tokens", "tags"),),
    metrics={"loss": False, "f1": True, "precision": True, "recall": True, "f1_macro": True, "token_accuracy": True},
    default_metric="f1",
    generates=False,
    uses_chat_template=False,
    learns_tokens=True,
    has_head=True,
    has_labels=True,
    train_on=(),
    truncations=("error", "left", "right", "drop", "split"),
    own_keys=("data.label_all_tokens",),
    runtime_module="peftkit.tasks.token_cls_torch",
    settle=_settle,
    metrics_under=lambda settings: SPAN_METRICS if has_spans(settings.labels) else TAG_METRICS,
)
