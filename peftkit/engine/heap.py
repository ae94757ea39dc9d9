"""What glibc's allocator makes of a pass on the CPU: how much larger its heap grows than what is in use.

torch asks for blocks that begin at multiples of 64 bytes. glibc (2.36) cuts each out of a larger free piece and so needs a
little more than the block: a block that was freed is too small for the next of its size. The crumbs go to small objects, which
keep freed neighbours from becoming one piece for as long as they live. How many of them do is not known; `_WALLS` was found by
comparing with measured runs (docs/memory.md).
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

_WALLS = 0.25  # of all blocks have a small object behind them that outlives the pass's temporary ones
_CRUMB = 64
_ALIGNMENT = 96  # bytes that an aligned block is looked for with, beside its own
_PAGES = 128 * 1024  # glibc's first threshold for mappings, and what it grows the heap by
_LARGEST_THRESHOLD = 32 * 2**20
_LENGTHS = (0.75, 1.0, 0.6, 1.0, 0.85, 1.0)  # passes of a run, as parts of the largest


def heap_peak(events: Sequence[int], sizes: Sequence[int], fixed: set[int]) -> int:
    """The most bytes that heap and mappings take over a few passes of different lengths.

    Args:
        events: of one pass: n where storage n is made, ~n where it goes.
        sizes: of the storages, in the largest pass.
        fixed: storages whose size does not depend on the length of rows: gradients.
    """
    heap = _Heap()
    for number, part in enumerate(_LENGTHS):
        for event in events:
            storage = event if event >= 0 else ~event
            if sizes[storage] and event >= 0:
                heap.take((number, storage), int(sizes[storage] * (1.0 if storage in fixed else part)))
            elif sizes[storage]:
                heap.give_back((number, storage))
        heap.end_pass()
    return heap.peak


class _Heap:
    """One arena: the best fitting free piece, neighbours joined, large blocks as mappings of their own."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        self.threshold, self.trim_at = _PAGES, _PAGES
        self.top = self.end = self.mapped = self.peak = 0
        self.free: list[tuple[int, int]] = []  # (size, start)
        self.by_start: dict[int, int] = {}
        self.by_end: dict[int, int] = {}
        self.blocks: dict[tuple[int, int], tuple[int, int | None]] = {}
        self.walls: list[tuple[int, int]] = []

    def take(self, key: tuple[int, int], size: int) -> None:
        """A block of so many bytes."""
        place = bisect_left(self.free, (size + _ALIGNMENT, -1))
        start: int | None
        if place < len(self.free):
            room, start = self.free[place]
            self._remove(room, start)
            wall = self._wall(start + size)  # it fits: pieces are looked for with some room
            self._put(room - size - wall, start + size + wall)
        elif size < self.threshold or self.end - self.top >= size + _ALIGNMENT:
            start = self.top
            self.top += size + self._wall(start + size)
            self.end = max(self.end, self.top + _PAGES)
        else:
            start = None
            self.mapped += size
        self.blocks[key] = (size, start)
        self.peak = max(self.peak, self.mapped + self.end)

    def give_back(self, key: tuple[int, int]) -> None:
        """A block is free again."""
        size, start = self.blocks.pop(key)
        if start is not None:
            self._release(size, start)
            return
        self.mapped -= size
        if self.threshold < size <= _LARGEST_THRESHOLD:  # the threshold follows what is freed, and the trimming with it
            self.threshold, self.trim_at = size, 2 * size

    def end_pass(self) -> None:
        """What is left of a pass goes, and the small objects with it."""
        for key in list(self.blocks):
            self.give_back(key)
        for size, start in self.walls:
            self._release(size, start)
        self.walls = []

    def _wall(self, start: int) -> int:
        if self.draw.random() >= _WALLS:
            return 0
        self.walls.append((_CRUMB, start))
        return _CRUMB

    def _release(self, size: int, start: int) -> None:
        if start in self.by_end:
            before = self.by_end[start]
            self._remove(start - before, before)
            start, size = before, size + start - before
        if start + size in self.by_start:
            after = self.by_start[start + size]
            self._remove(after, start + size)
            size += after
        if start + size != self.top:
            self._put(size, start)
            return
        self.top = start
        if self.end - self.top > self.trim_at:
            self.end = self.top + _PAGES

    def _put(self, size: int, start: int) -> None:
        if size <= 0:
            return
        insort(self.free, (size, start))
        self.by_start[start], self.by_end[start + size] = size, start

    def _remove(self, size: int, start: int) -> None:
        del self.free[bisect_left(self.free, (size, start))]
        del self.by_start[start], self.by_end[start + size]
