"""How the rows of a step are laid out in forward passes: by length, packed, dealt to processes; the loss is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from peftkit.engine.packing import best_fit, block_positions
from peftkit.plan import Plan
from peftkit.tasks.example import IGNORE_INDEX, Example

Pass = list[list[int]]  # the sequences of one forward pass, each the places of its rows: one, or several that are packed


@dataclass(frozen=True)
class Layout:
    """How steps are divided.

    Attributes:
        micro_batch_size: sequences per process and forward pass.
        by_length: whether sequences of like length share a pass.
        pack_length: tokens that a pack may have; None: rows are not packed.
        end_to_end: whether the rows of a pass are joined to one sequence.
    """

    micro_batch_size: int
    by_length: bool = True
    pack_length: int | None = None
    end_to_end: bool = False

    @property
    def joins(self) -> bool:
        """Whether sequences consist of several rows."""
        return self.pack_length is not None or self.end_to_end

    def passes(self, lengths: Sequence[int], num_processes: int = 1, process: int = 0) -> list[Pass]:
        """This process's passes of a step with rows of these lengths: as many in every process, some of them perhaps empty."""
        sequences = [[place] for place in range(len(lengths))] if self.pack_length is None else self._packs(lengths)
        if self.by_length:  # the longest first: memory that does not suffice shows at once
            sequences.sort(key=lambda places: -sum(lengths[place] for place in places))
        width = self.micro_batch_size * num_processes
        # Dealt like cards, so that a short last chunk is spread over the processes.
        passes = [sequences[start : start + width][process::num_processes] for start in range(0, len(sequences), width)]
        return [[list(chain(*chosen))] if chosen else [] for chosen in passes] if self.end_to_end else passes

    def _packs(self, lengths: Sequence[int]) -> list[list[int]]:
        """As few packs as best fit finds, of the smallest size that so many of them can have: less to pad."""
        assert self.pack_length is not None
        packs = best_fit(lengths, self.pack_length)
        low, high = max(*lengths, -(-sum(lengths) // len(packs))), self.pack_length
        while low < high:
            middle = (low + high) // 2
            found = best_fit(lengths, middle)
            if len(found) <= len(packs):
                packs, high = found, middle
            else:
                low = middle + 1
        return packs


def layout_of(plan: Plan, max_length: int) -> Layout:
    """The layout that a plan wants; packs are as long as the longest row may be."""
    pack_length = max_length if plan.rows == "packed" else None
    return Layout(plan.micro_batch_size, plan.recipe.training.group_by_length, pack_length, plan.rows == "end_to_end")


def fill_rate(lengths: Sequence[Sequence[int]], layout: Layout) -> float:
    """The share of all places in the passes of some steps that hold a token, not padding.

    Args:
        lengths: of the rows of each step.
        layout: how they are laid out.
    """
    tokens = places = 0
    for step in lengths:
        for sequences in layout.passes(step):
            sizes = [sum(step[row] for row in rows) for rows in sequences]
            tokens += sum(sizes)
            places += max(sizes) * len(sizes)
    return tokens / places if places else 1.0


def join(examples: Sequence[Example]) -> Example:
    """Several rows as one sequence, in which none of them sees another: positions start over with each.

    The first token of a row is no target: nothing of its own comes before it.
    """
    ids = [token for example in examples for token in example.inputs["input_ids"]]
    positions = block_positions([example.length for example in examples], len(ids))
    labels = [label for example in examples for label in [IGNORE_INDEX, *example.labels[1:]]]
    weights = [weight for example in examples for weight in example.weights or [1.0] * len(example.labels)]
    return Example(
        {"input_ids": ids, "position_ids": positions},
        labels,
        sum(example.num_targets for example in examples),
        ", ".join(example.origin for example in examples),
        len(ids),
        weights=weights if any(example.weights for example in examples) else None,
    )
