"""Evaluate a model on encoded rows; logits live for one batch only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from peftkit.engine.sharding import data_share, is_sharded
from peftkit.engine.step import Step
from peftkit.run import Run, write_json, write_text
from peftkit.tasks.example import Batch, Example


def score_examples(
    step: Step,
    examples: Sequence[Example],
    *,
    batch_size: int,
    device: torch.device,
    call: Callable[..., torch.Tensor] | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """One small result per example, in their order, gathered from all processes.

    Batches hold rows of like length; every process takes its share.

    Args:
        step: the model with its task.
        examples: the rows.
        batch_size: rows a pass.
        device: where the model is.
        call: what to call in its place, where it is wrapped.
        on_batch: told how many rows are done.
    """
    world, batches = _own_batches(step, examples, batch_size)
    was_training = step.training
    step.eval()
    results = []
    # FSDP2 keeps what it gathers: in inference mode, training could not use it afterwards.
    with torch.no_grad() if is_sharded(step.model) else torch.inference_mode():
        for indices in batches:
            chosen = [examples[index] for index in indices] or [examples[0]]
            batch = {name: tensor.to(device) for name, tensor in step.runtime.collate(chosen).items()}
            scores = scores_of(step, (call or step)(batch, outputs_only=True), batch, chosen)
            results += [
                {"index": index, "row": example.origin, **score}
                for index, example, score in zip(indices, chosen, scores, strict=False)
            ]
            on_batch(len(indices))
    step.train(was_training)
    return sorted(gather_object(results) if world > 1 else results, key=lambda result: result["index"])


def _own_batches(step: Step, examples: Sequence[Example], batch_size: int) -> tuple[int, list[list[int]]]:
    """How many processes there are, and the places of this one's rows, by length and in batches.

    Where layers are gathered by all processes together, each of them has as many batches, some perhaps empty.
    """
    world, rank = data_share(step.model)
    mine = sorted(range(rank, len(examples), world), key=lambda index: examples[index].length)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    if is_sharded(step.model):
        batches += [[]] * (math.ceil(math.ceil(len(examples) / world) / batch_size) - len(batches))
    return world, batches


def scores_of(step: Step, outputs: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """One small result per example, of what a step gives with `outputs_only`."""
    if step.head is None:
        return step.runtime.score(outputs, batch, examples)
    return step.runtime.score_states(outputs, batch, step.head.logits)


def write_evaluation(
    run: Run,
    split: str,
    metrics: dict[str, Any],
    results: Sequence[dict[str, Any]],
    answers: Sequence[dict[str, Any]] = (),
    signatures: Mapping[str, str] | None = None,
) -> None:
    """Write metrics and predictions of a split into the run directory; generated answers and how they were compared, if any."""
    metrics_path, predictions_path = run.evaluation_paths(split)
    write_text(predictions_path, evaluation_lines(results))
    facts: dict[str, Any] = {"split": split, "num_rows": len(results), "metrics": metrics}
    if answers:
        write_text(run.generations_path(split), evaluation_lines(answers))
        facts |= {"num_generated": len(answers), "signatures": dict(signatures or {})}
    write_json(metrics_path, facts)


def evaluation_lines(results: Sequence[dict[str, Any]]) -> str:
    """Results as JSON lines, without what is for the metrics alone."""
    rows = [{key: value for key, value in result.items() if key != "index" and not key.startswith("_")} for result in results]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def flat_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The single numbers among the metrics, without tables."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
