"""What CAUSAL_LM and SEQ_2_SEQ_LM share: the token loss, scores and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from peftkit.formats.base import RowError
from peftkit.tasks.example import IGNORE_INDEX, Example, LogitsOf
from peftkit.tasks.resampling_torch import Resampler, column, share

_SCORED_TOGETHER = 128  # positions whose logits are in memory together


def split_labels(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Target ids (B, T) and their weights (B, T), from labels (B, T), or (B, T, 2) where targets have weights."""
    if labels.dim() == 2:
        return labels, None
    return labels[..., 0].long(), labels[..., 1]


def join_weights(labels: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
    """Labels (B, T) as they are or, where an example has weights, with them: (B, T, 2), float32, exact up to 2**24 tokens."""
    if not any(example.weights for example in examples):
        return labels
    weights = torch.ones(labels.shape)
    for row, example in zip(weights, examples, strict=True):
        if example.weights:
            row[: len(example.weights)] = torch.tensor(example.weights)
    return torch.stack([labels.float(), weights], dim=-1)


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Sum of cross-entropy over the positions that have a target, each times its weight.

    Args:
        logits: (B, T, V), already aligned with `labels`.
        labels: (B, T), IGNORE_INDEX where there is no target, or (B, T, 2) with weights.
        label_smoothing: mass spread over the vocabulary (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    targets, weights = split_labels(labels)
    wanted = targets != IGNORE_INDEX
    chosen = logits[wanted].float()
    if weights is None:
        return functional.cross_entropy(chosen, targets[wanted], reduction="sum", label_smoothing=label_smoothing)
    losses = functional.cross_entropy(chosen, targets[wanted], reduction="none", label_smoothing=label_smoothing)
    return (losses * weights[wanted]).sum()


def score_tokens(states: torch.Tensor, labels: torch.Tensor, tokenizer: Any, logits_of: LogitsOf) -> list[dict[str, Any]]:
    """Per row: loss (weighted sum), weight of the targets, their number, right ones, and what the model would have said.

    Args:
        states: hidden states (B, T, D), aligned with `labels`.
        labels: (B, T), or (B, T, 2) with weights.
        tokenizer: the model's.
        logits_of: hidden states (N, D) -> logits (N, V); a few positions at a time are asked for.
    """
    results = []
    for row_states, row_labels in zip(states, labels, strict=True):
        targets, weights = split_labels(row_labels[None])
        wanted = targets[0] != IGNORE_INDEX
        ids = targets[0][wanted]
        losses, guesses = _each_token(row_states[wanted], ids, logits_of)
        weight = torch.ones_like(losses) if weights is None else weights[0][wanted].to(losses)
        results.append(
            {
                "loss_sum": float((losses * weight).sum()),
                "num_targets": len(ids) if weights is None else float(weight.sum()),
                "num_tokens": len(ids),
                "num_correct": int((guesses == ids).sum()),
                "next_token_prediction": tokenizer.decode(guesses, skip_special_tokens=True),
            }
        )
    return results


def _each_token(states: torch.Tensor, ids: torch.Tensor, logits_of: LogitsOf) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (N,) of every target, and the likeliest tokens (N,)."""
    losses, guesses = [torch.zeros(0, device=ids.device)], [ids[:0]]
    for part, targets in zip(states.split(_SCORED_TOGETHER), ids.split(_SCORED_TOGETHER), strict=True):
        logits = logits_of(part).detach().float()
        losses.append(functional.cross_entropy(logits, targets, reduction="none"))
        guesses.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(guesses)


def summarise_tokens(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss per target token, its exponential (perplexity), and the share of tokens guessed right."""
    num_targets = sum(result["num_targets"] for result in results)
    loss = math.fsum(result["loss_sum"] for result in results) / num_targets
    perplexity = math.exp(loss) if loss < 700 else math.inf
    accuracy = sum(row["num_correct"] for row in results) / sum(row["num_tokens"] for row in results)
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": accuracy}


def token_resampler(results: Sequence[Mapping[str, Any]]) -> Resampler:
    """The metrics of `summarise_tokens`, of many resamples."""
    names = ("loss_sum", "num_targets", "num_correct", "num_tokens")
    loss_sum, num_targets, num_correct, num_tokens = (column([result[name] for result in results]) for name in names)

    def resampled(counts: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = share(counts, loss_sum, num_targets)
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": share(counts, num_correct, num_tokens)}

    return resampled


def strip_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids without the end-of-sequence token that a tokenizer may add."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def flat_messages(row: Mapping[str, Any], target: bool) -> tuple[str, str]:
    """A conversation without template: everything before the last assistant turn, and that turn (empty without target).

    Raises:
        RowError: it holds what plain text cannot say, or does not end with an answer to learn.
    """
    messages = row["messages"]
    if row.get("tools") or any(message.get("tool_calls") for message in messages):
        raise RowError("tools and tool calls need a chat template, which this task does not use")
    last = messages[-1]
    if not target:
        asked = messages[:-1] if last["role"] == "assistant" else messages
        return "\n".join(message["content"] for message in asked), ""
    if last["role"] != "assistant" or last.get("weight", 1.0) != 1.0:
        raise RowError("the last turn, which alone is learned here, is no assistant turn with the weight 1")
    return "\n".join(message["content"] for message in messages[:-1]), last["content"]
