"""Encoded rows on disk: written once, then read as often and in whatever order training wants them."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from peftkit.engine.records import Records, RecordWriter, to_bytes
from peftkit.tasks.example import Example

_COLUMNS = ("length", "num_input_tokens", "num_target_tokens", "num_labels")


class ExampleWriter:
    """Writes examples to a file; counts classes and fingerprints them on the way."""

    def __init__(self, path: Path) -> None:
        self._writer = RecordWriter(path, _COLUMNS)
        self._digest = hashlib.sha256()
        self.classes: Counter[str] = Counter()

    def add(self, example: Example) -> None:
        """Append an example."""
        self._digest.update(to_bytes([example.inputs, example.labels, example.weights, example.task_id]))
        self.classes.update(example.details.get("classes", ()))
        record = [
            example.inputs,
            example.labels,
            example.num_targets,
            example.origin,
            example.num_tokens,
            example.task_id,
            example.weights,
            example.details,
        ]
        num_labels = len(example.labels) if isinstance(example.labels, list) else 1
        numbers = (example.length, example.num_input_tokens, example.num_target_tokens, num_labels)
        self._writer.add(record, *numbers)

    @property
    def fingerprint(self) -> str:
        """sha256 of what the model is trained on: runs with equal ones trained on the same."""
        return self._digest.hexdigest()

    def finish(self) -> Examples:
        """Write the rest, and open what was written."""
        return Examples(self._writer.finish())


class Examples(Sequence[Example]):
    """The examples of one split."""

    def __init__(self, records: Records) -> None:
        self._records = records

    @classmethod
    def open(cls, path: Path) -> Examples:
        """Those that an `ExampleWriter` has written."""
        return cls(Records(path, _COLUMNS))

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        found = self._records[place]
        return [_example(record) for record in found] if isinstance(place, slice) else _example(found)

    def __iter__(self) -> Iterator[Example]:
        return map(_example, iter(self._records))

    @property
    def num_rows(self) -> int:
        """Examples of one epoch."""
        return len(self)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longest window or text of each example (N,)."""
        return self._records.column("length")

    def column(self, name: str) -> np.ndarray:
        """A number of each example (N,): see `total`."""
        return self._records.column(name)

    def total(self, name: str) -> int:
        """The sum of a number of all examples: `num_input_tokens` that the model reads, `num_target_tokens` that are learned,
        or `num_labels`, places that could be learned where these are tokens.
        """
        return int(self._records.column(name).sum())

    def step(self, step: int, batch_size: int, seed: int) -> list[Example]:
        """The examples of one optimizer step (from 0)."""
        return [self[row] for row in step_rows(len(self), batch_size, seed, step)]

    def batches(self, batch_size: int, seed: int) -> Iterator[list[Example]]:
        """The examples of one epoch, so many at a time, in the order of the first epoch."""
        order = epoch_order(len(self), seed, 0)
        for start in range(0, len(order), batch_size):
            yield [self[row] for row in order[start : start + batch_size]]


def _example(record: list[Any]) -> Example:
    inputs, labels, num_targets, origin, num_tokens, task_id, weights, details = record
    return Example(inputs, labels, num_targets, origin, num_tokens, task_id=task_id, weights=weights, details=details)


def step_rows(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the rows of one optimizer step (from 0): a pure function, so that resuming needs no replay.

    Every epoch is a permutation of its own; its last step holds what is left.
    """
    per_epoch = -(-num_rows // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = epoch_order(num_rows, seed, epoch)
    return order[place * batch_size : (place + 1) * batch_size]


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in one epoch; the last one used is kept."""
    key = (num_rows, seed, epoch)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = random.Random(f"{seed} {epoch}").sample(range(num_rows), num_rows)
    return _ORDERS[key]
