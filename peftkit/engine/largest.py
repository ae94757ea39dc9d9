"""The largest passes of a run: which rows they hold, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.batches import join, layout_of
from peftkit.engine.data import Data
from peftkit.engine.examples import Examples, step_rows
from peftkit.engine.packing import for_model, way_of
from peftkit.plan import Plan, num_steps
from peftkit.tasks.example import Batch, Runtime

_MOST_STEPS = 4000  # optimizer steps that are looked through
_MOST_PACKED_STEPS = 200  # packing a step takes a hundred times as long as dividing it


def largest_pass(plan: Plan, data: Data, model: nn.Module, runtime: Runtime) -> tuple[Batch, int]:
    """The batch of the training pass that needs most memory, as the model takes it, and how many passes its step has."""
    sample = data.sample
    weights = sizes_of(plan, sample, model)
    _, sequences, count = max(_passes(plan, data, weights), key=lambda found: found[0])
    packs = layout_of(plan, data.encoding.max_length).joins
    examples = [join([sample[row] for row in rows]) if packs else sample[rows[0]] for rows in sequences]
    batch = runtime.collate(examples)
    return (for_model(batch, model, way_of(model)) if packs else batch), count


def largest_evaluation(plan: Plan, data: Data, runtime: Runtime) -> tuple[Batch, list[Any]] | None:
    """The batch of the longest rows that are evaluated, and these rows; None where there are none."""
    settings = plan.recipe.evaluation
    found = [rows for rows in (split[: settings.max_rows] for split in data.held_out.values()) if rows]
    if not found:
        return None
    batches = [sorted(rows, key=lambda row: row.length)[-settings.batch_size :] for rows in found]
    largest = max(batches, key=lambda rows: max(row.length for row in rows) * sum(len(row.sequences) for row in rows))
    return runtime.collate(largest), largest


def sizes_of(plan: Plan, sample: Examples, model: nn.Module) -> list[tuple[int, int, float]]:
    """Of each row: its length, how many sequences it is, and what its targets weigh beside tokens.

    Logits of a target against activations of a token, both in float32 and roughly (see docs/memory.md): 12 bytes for each
    entry of the vocabulary, 160 for each hidden unit of each layer.
    """
    base: Any = base_of_adapted(model)
    config = base.config.get_text_config()
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 1
    layers = getattr(config, "num_hidden_layers", None) or 1
    weight = 12 * getattr(config, "vocab_size", 0) / (160 * width * layers) if plan.task.generates else 0.0
    columns = (sample.lengths, sample.column("num_input_tokens"), sample.column("num_target_tokens"))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(length, max(1, -(-tokens // max(1, length))), weight * targets) for length, tokens, targets in rows]


def _passes(plan: Plan, data: Data, sizes: list[tuple[int, int, float]]) -> Iterator[tuple[float, list[list[int]], int]]:
    """Of every training pass: what it weighs, its rows by sequence, and the passes of its step."""
    training, layout = plan.recipe.training, layout_of(plan, data.encoding.max_length)
    most = _MOST_STEPS if layout.pack_length is None else _MOST_PACKED_STEPS
    for step in range(min(most, num_steps(plan, data.train.num_rows))):
        rows = step_rows(len(sizes), training.batch_size, training.seed, step)
        passes = layout.passes([sizes[row][0] for row in rows], plan.hardware.num_processes)
        for sequences in passes:
            chosen = [[rows[place] for place in places] for places in sequences]
            if not chosen:
                continue
            longest = max(sum(sizes[row][0] for row in part) for part in chosen)
            count = sum(max(sizes[row][1] for row in part) for part in chosen)
            yield longest * count + sum(sizes[row][2] for part in chosen for row in part), chosen, len(passes)
