"""Training rows that are read while training: shuffled among those in a buffer, encoded when their step comes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from peftkit.engine.examples import Examples
from peftkit.engine.rows import OpenedSplit, reader_of
from peftkit.errors import DataError
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.plan import Plan
from peftkit.tasks.example import Example, Runtime, TooLong

Row = tuple[str, CanonicalRow]


@dataclass
class Stream:
    """A stream of examples; which of them a step sees depends on the seed and the step alone.

    Attributes:
        opened: the sources.
        runtime: encodes rows.
        sample: the first rows, checked before training.
        buffer_size: rows among which one is drawn.
        seed: of the shuffling.
        num_rows: examples that the whole run will see, in place of the rows of an epoch.
        drops: whether rows that cannot be used are left out; else they stop the run.
        on_dropped: told the place of a row that is left out, and why.
    """

    opened: OpenedSplit
    runtime: Runtime
    sample: Examples
    buffer_size: int
    seed: int
    num_rows: int
    drops: bool = False
    on_dropped: Callable[[str, str], None] = lambda where, why: None
    _examples: Iterator[Example] | None = None
    _next_step: int = 0

    def step(self, step: int, batch_size: int, seed: int) -> list[Example]:
        """The examples of one optimizer step (from 0); a step that is not the next one starts the stream over.

        Raises:
            DataError: a row cannot be used.
        """
        if self._examples is None or step < self._next_step:
            self._examples, self._next_step = self._encoded(), 0
        for _ in range(self._next_step, step):  # resuming: the same rows in the same order, read again
            list(islice(self._examples, batch_size))
        self._next_step = step + 1
        return list(islice(self._examples, batch_size))

    def _encoded(self) -> Iterator[Example]:
        for origin, row in self._shuffled():
            try:
                yield from self.runtime.encode(row, origin)
            except TooLong as error:
                self._bad(origin, RowError(f"{error}, more than {self.runtime.settings.max_length} (`data.max_length`)"))
            except RowError as error:
                self._bad(origin, error)

    def _shuffled(self) -> Iterator[Row]:
        """Rows without end: pass after pass over the sources, each shuffled with a buffer of its own."""
        draw = random.Random(f"{self.seed} stream")
        while True:
            num_rows = 0
            for row in self._pass(draw):
                num_rows += 1
                yield row
            if not num_rows:
                raise DataError("the stream has no rows that can be used")

    def _pass(self, draw: random.Random) -> Iterator[Row]:
        """Every row once: the buffer is filled, then every row takes the place of one that is drawn from it."""
        buffer: list[Row] = []
        for origin, row in self.opened.rows():
            if isinstance(row, RowError):
                self._bad(origin, row)
            elif len(buffer) < self.buffer_size:
                buffer.append((origin, row))
            else:
                place = draw.randrange(len(buffer))
                yield buffer[place]
                buffer[place] = (origin, row)
        draw.shuffle(buffer)
        yield from buffer

    def _bad(self, origin: str, error: RowError) -> None:
        if not self.drops:
            remedy = "`data.on_bad_row: drop` would leave it out"
            if self.runtime.settings.labels:
                remedy += ", `data.labels` names labels that the first rows lack"
            raise DataError(f"{origin}: {error}; {remedy}") from error
        self.on_dropped(origin, str(error))


def open_stream(plan: Plan, runtime: Runtime, sample: Examples) -> Stream:
    """The stream of a recipe whose training sources stream."""
    data = plan.recipe.data
    assert data is not None
    opened = reader_of(plan).open(data.train)
    training = plan.recipe.training
    assert training.max_steps is not None, "rules refuse a stream without max_steps"
    num_rows = training.max_steps * training.batch_size
    drops = data.on_bad_row == "drop"
    return Stream(opened, runtime, sample, data.shuffle_buffer_size, training.seed, num_rows, drops)
