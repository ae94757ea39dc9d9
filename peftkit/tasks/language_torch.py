"""What CAUSAL_LM and SEQ_2_SEQ_LM share: the token loss, scores and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from peftkit.tasks.base import IGNORE_INDEX


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Sum of cross-entropy over the positions that have a target.

    Args:
        logits: (B, T, V), already aligned with `labels`.
        labels: (B, T), IGNORE_INDEX where there is no target.
        label_smoothing: mass spread over the vocabulary (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    wanted = labels != IGNORE_INDEX
    return functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="sum", label_smoothing=label_smoothing)


def score_tokens(logits: torch.Tensor, labels: torch.Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """Per row: loss (sum), targets, right ones, and what the model would have said at the targets' positions."""
    results = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        wanted = row_labels != IGNORE_INDEX
        targets, guesses = row_labels[wanted], row_logits[wanted].argmax(-1)
        loss = (
            functional.cross_entropy(row_logits[wanted].float(), targets, reduction="sum") if len(targets) else torch.zeros(())
        )
        results.append(
            {
                "loss_sum": float(loss.detach()),
                "num_targets": int(wanted.sum()),
                "num_correct": int((guesses == targets).sum()),
                "next_token_prediction": tokenizer.decode(guesses, skip_special_tokens=True),
            }
        )
    return results


def summarise_tokens(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss per target token, its exponential (perplexity), and the share of tokens guessed right."""
    num_targets = sum(result["num_targets"] for result in results)
    loss = math.fsum(result["loss_sum"] for result in results) / num_targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": sum(row["num_correct"] for row in results) / num_targets}


def strip_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids without the end-of-sequence token that a tokenizer may add."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def flat_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Messages without template: everything before the last assistant turn, and that turn."""
    answer = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return "\n".join(message["content"] for message in before), answer
