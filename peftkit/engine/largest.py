"""The largest passes of a run: which rows they hold, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
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
Sizes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LargestPass:
    """The training pass that needs most memory, and where in the run it is.

    Attributes:
        weight: what it is the largest by: tokens, with targets in tokens (see `sizes_of`).
        sequences: the rows of each of its sequences, as places in the sample.
        step: optimizer step that it belongs to, from 0.
        number: its place among the passes of that step.
        count: passes of that step.
        tokens: places of its batch, padding too.
        longest: of one sequence.
    """

    weight: float
    sequences: list[list[int]]
    step: int
    number: int
    count: int
    tokens: int
    longest: int


def find_largest_pass(plan: Plan, data: Data, model: nn.Module) -> LargestPass:
    """The largest pass of any process; of a stream, whose rows are not known, that of the rows that were checked."""
    return max(_passes(plan, data, sizes_of(plan, data.sample, model)), key=lambda found: found.weight)


def largest_pass(plan: Plan, data: Data, model: nn.Module, runtime: Runtime) -> tuple[Batch, int]:
    """The batch of the training pass that needs most memory, as the model takes it, and how many passes its step has.

    Where processes share out tokens it is as long as the part of one of them.
    """
    found, sample = find_largest_pass(plan, data, model), data.sample
    packs = layout_of(plan, data.encoding.max_length).joins
    examples = [join([sample[row] for row in rows]) if packs else sample[rows[0]] for rows in found.sequences]
    batch = runtime.collate(examples)
    if (cp_size := plan.hardware.cp_size) > 1:
        batch = {name: tensor.flatten(0, 1)[None] for name, tensor in batch.items()}
        batch = {name: tensor[:, : -(-tensor.shape[1] // cp_size)] for name, tensor in batch.items()}
    return (for_model(batch, model, way_of(model)) if packs else batch), found.count


def largest_evaluation(plan: Plan, data: Data, runtime: Runtime) -> tuple[Batch, list[Any]] | None:
    """The batch of the longest rows that are evaluated, and these rows; None where there are none."""
    settings = plan.recipe.evaluation
    found = [rows for rows in (split[: settings.max_rows] for split in data.held_out.values()) if rows]
    if not found:
        return None
    batches = [sorted(rows, key=lambda row: row.length)[-settings.batch_size :] for rows in found]
    largest = max(batches, key=lambda rows: max(row.length for row in rows) * sum(len(row.sequences) for row in rows))
    return runtime.collate(largest), largest


def sizes_of(plan: Plan, sample: Examples, model: nn.Module) -> Sizes:
    """Of each row: its length, how many sequences it is, and what its targets weigh beside tokens, each (N,).

    Logits of a target against activations of a token, both in float32 and roughly (see docs/memory.md): 12 bytes for each
    entry of the vocabulary, 160 for each hidden unit of each layer.
    """
    base: Any = base_of_adapted(model)
    config = base.config.get_text_config()
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 1
    layers = getattr(config, "num_hidden_layers", None) or 1
    weight = 12 * getattr(config, "vocab_size", 0) / (160 * width * layers) if plan.task.generates else 0.0
    lengths = sample.lengths
    counts = np.maximum(1, -(-sample.column("num_input_tokens") // np.maximum(1, lengths)))
    return lengths, counts, weight * sample.column("num_target_tokens")


def _passes(plan: Plan, data: Data, sizes: Sizes) -> Iterator[LargestPass]:
    """Every training pass, with what it weighs."""
    training, layout = plan.recipe.training, layout_of(plan, data.encoding.max_length)
    most = _MOST_STEPS if layout.pack_length is None else _MOST_PACKED_STEPS
    processes = plan.hardware.num_processes
    dealt = range(1 if layout.by_length else processes)  # the longest sequences go to the first process
    for step in range(min(most, num_steps(plan, data.train.num_rows))):
        rows = step_rows(len(data.sample), training.batch_size, training.seed, step)
        lengths, counts, targets = (column[rows].tolist() for column in sizes)
        for process in dealt:
            passes = layout.passes(lengths, processes, process)
            for number, sequences in enumerate(passes):
                if not sequences:
                    continue
                longest = max(sum(lengths[place] for place in places) for places in sequences)
                count = sum(max(counts[place] for place in places) for places in sequences)
                weight = longest * count + sum(targets[place] for places in sequences for place in places)
                chosen = [[rows[place] for place in places] for places in sequences]
                yield LargestPass(weight, chosen, step, number, len(passes), longest * count, longest)
