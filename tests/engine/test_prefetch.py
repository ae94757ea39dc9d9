"""The thread that prepares the next steps: the same results in the same order, errors in their place, and a clean end."""

from __future__ import annotations

import threading
import time

import pytest

from peftkit.engine.prefetch import Prefetcher


def test_results_come_in_the_order_of_the_steps() -> None:
    with Prefetcher(lambda step: step * step, 3, 9) as prefetcher:
        assert [prefetcher.get(step) for step in range(3, 9)] == [9, 16, 25, 36, 49, 64]


def test_steps_are_prepared_once_each_by_one_thread_and_not_too_far_ahead() -> None:
    calls: list[tuple[int, str]] = []

    def prepare(step: int) -> int:
        calls.append((step, threading.current_thread().name))
        return step

    with Prefetcher(prepare, 0, 100, ahead=2) as prefetcher:
        prefetcher.get(0)
        time.sleep(0.3)
        assert len(calls) <= 1 + 2 + 1  # taken, ready, and one that waits for room
    assert calls == [(step, "peftkit-prefetch") for step in range(len(calls))]


def test_an_error_is_raised_at_its_step() -> None:
    def prepare(step: int) -> int:
        if step == 2:
            raise ValueError("the third step")
        return step

    with Prefetcher(prepare, 0, 5) as prefetcher:
        assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
        with pytest.raises(ValueError, match="the third step"):
            prefetcher.get(2)


def test_the_thread_ends_with_the_block_whatever_ends_it() -> None:
    prefetcher = Prefetcher(lambda step: step, 0, 1000)
    with pytest.raises(KeyboardInterrupt), prefetcher:
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name == "peftkit-prefetch"]
