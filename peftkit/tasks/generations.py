"""Answers that a model writes beside those that its rows have: which metrics there are, and when two answers are the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from peftkit.formats.base import CanonicalRow, RowError

# A name of `evaluation.generation_metrics` -> the metrics that it gives, each with whether more of it is better.
TripleFormat = Literal["auto", "json", "tuples", "lines"]
GENERATION_METRICS: dict[str, dict[str, bool]] = {
    "rouge": {"rouge1": True, "rouge2": True, "rougeL": True},
    "bleu": {"bleu": True},
    "chrf": {"chrf": True},
    "exact_match": {"exact_match": True},
    "answer": {"answer_accuracy": True, "answer_missing": False},
    "triples": {"triple_precision": True, "triple_recall": True, "triple_f1": True, "triple_malformed": False},
}
PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}  # by import name
TOKENIZER_PACKAGES = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}
# Recipe keys that are about generated answers alone.
GENERATION_KEYS = tuple(
    f"evaluation.{name}"
    for name in (
        *("generation_metrics", "generation_rows", "answer_pattern", "bleu_tokenize"),
        *("triple_format", "triple_keys", "samples"),
    )
)
INSTALL_HINT = "`pip install 'peftkit[generation-metrics]'` adds it"

_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?|[-+]?\.\d+")


@dataclass(frozen=True)
class AnswerSettings:
    """What of generated answers is measured.

    Attributes:
        metrics: names of GENERATION_METRICS.
        answer_pattern: regular expression whose group is the answer within a text, for `answer`.
        bleu_tokenize: how sacrebleu splits words for BLEU.
        triple_format: how triples are written, for `triples`.
        triple_keys: names of head, relation and tail in JSON objects; None: the usual ones.
    """

    metrics: tuple[str, ...] = ()
    answer_pattern: str | None = None
    bleu_tokenize: str = "13a"
    triple_format: TripleFormat = "auto"
    triple_keys: tuple[str, ...] | None = None


def metrics_of(names: tuple[str, ...] | list[str]) -> dict[str, bool]:
    """The metrics that these names give, each with whether more of it is better."""
    return {metric: better for name in names for metric, better in GENERATION_METRICS[name].items()}


def question_of(row: CanonicalRow) -> tuple[CanonicalRow, str]:
    """What a model is asked with, and the answer that the row has.

    Raises:
        RowError: it has none.
    """
    tasks = {"task_id": row["task_id"]} if "task_id" in row else {}
    if "completion" in row:
        return {"prompt": row["prompt"]} | tasks, row["completion"]
    messages = row.get("messages") or row.get("chosen")
    if messages and messages[-1]["role"] == "assistant" and messages[-1]["content"]:
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return {"messages": messages[:-1]} | tools | tasks, messages[-1]["content"]
    raise RowError(
        "there is no answer to compare a generated one with: that takes a prompt with a completion, or a conversation whose "
        "last turn is a text of the assistant's"
    )


def extract_answer(text: str, pattern: str) -> str | None:
    """The group of the first match, as GSM8K's own grader takes it (Cobbe et al. 2021, arXiv:2110.14168); None without one."""
    found = re.search(pattern, text)
    return found[1].strip() if found and found[1] is not None else None


def is_same_answer(left: str, right: str) -> bool:
    """Whether two extracted answers are equal: as numbers where both are, `1,200` and `$1200.0` alike, else as texts."""
    numbers = _number(left), _number(right)
    return numbers[0] == numbers[1] if None not in numbers else _plain(left) == _plain(right)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip()


def _number(text: str) -> Decimal | None:
    """The number that a text is, a currency sign before it aside."""
    plain = _plain(text).lstrip("$€£ ")
    return Decimal(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None
