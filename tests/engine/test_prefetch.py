"""The thread that prepares the next steps: the same results in the same order, errors in their place, and a clean end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.engine.prefetch import Prefetcher
from peftkit.engine.trainer import Trainer
from tests.runs import curve, tiny_recipe, train


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
    assert calls == [(step, "peftkit-prefetch_0") for step in range(len(calls))]


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
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("peftkit-prefetch")]


def test_a_run_whose_steps_a_thread_prepares_is_the_same(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    train(recipe, tmp_path / "plain")

    @contextlib.contextmanager
    def by_thread(self: Trainer) -> Iterator[Any]:
        with Prefetcher(self._prepare, self.progress.step, self.total_steps) as prefetcher:
            yield prefetcher.get

    monkeypatch.setattr(Trainer, "_prepared", by_thread)
    train(recipe, tmp_path / "ahead")
    assert curve(tmp_path / "ahead", "loss", "grad_norm") == curve(tmp_path / "plain", "loss", "grad_norm")


def test_the_thread_works_for_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with Prefetcher(lambda step: step, 0, 3, gpu=1) as prefetcher:
        assert [prefetcher.get(step) for step in range(3)] == [0, 1, 2]
    assert chosen == [1]
