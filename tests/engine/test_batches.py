"""The layout of a step: every row once, packs within their length, the same number of passes everywhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.engine.batches import Layout, fill_rate, join
from peftkit.tasks.example import IGNORE_INDEX, Example

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths=LENGTHS, micro=st.integers(1, 5), world=st.integers(1, 4), packs=st.booleans(), by_length=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_row_is_in_one_pass_of_one_process(lengths: Any, micro: int, world: int, packs: bool, by_length: bool) -> None:
    layout = Layout(micro, by_length, 50 if packs else None)
    passes = [layout.passes(lengths, world, process) for process in range(world)]
    assert len({len(part) for part in passes}) == 1
    rows = [row for part in passes for one in part for sequence in one for row in sequence]
    assert sorted(rows) == [*range(len(lengths))]
    assert all(len(one) <= micro for part in passes for one in part)


@given(lengths=LENGTHS, capacity=st.integers(50, 120))
@settings(max_examples=200, deadline=None)
def test_packs_keep_to_their_length_and_are_no_more_than_best_fit_needs(lengths: list[int], capacity: int) -> None:
    packs = [pack for one in Layout(1, pack_length=capacity).passes(lengths) for pack in one]
    assert all(sum(lengths[row] for row in pack) <= capacity for pack in packs)
    assert len(packs) <= max(1, -(-11 * -(-sum(lengths) // capacity) // 9) + 1)


def test_packs_are_levelled() -> None:
    packs = [pack for one in Layout(8, pack_length=100).passes([40, 30, 30, 20, 20, 10]) for pack in one]
    assert sorted(sum([40, 30, 30, 20, 20, 10][row] for row in pack) for pack in packs) == [70, 80]


def test_rows_of_like_length_share_a_pass_the_longest_first() -> None:
    assert Layout(2).passes([3, 9, 4, 8]) == [[[1], [3]], [[2], [0]]]
    assert Layout(2, by_length=False).passes([3, 9, 4, 8]) == [[[0], [1]], [[2], [3]]]


@pytest.mark.parametrize(
    ("layout", "rate"), [(Layout(2, by_length=False), 24 / 34), (Layout(2), 24 / 26), (Layout(2, pack_length=12), 1.0)]
)
def test_the_fill_rate_counts_tokens_over_places(layout: Layout, rate: float) -> None:
    assert fill_rate([[3, 9, 4, 8]], layout) == pytest.approx(rate)


def test_a_pack_starts_over_with_every_row_and_learns_no_first_token() -> None:
    rows = [Example({"input_ids": [5, 6, 7]}, [5, 6, 7], 2, "a:1", 3), Example({"input_ids": [8, 9]}, [-100, 9], 1, "a:2", 2)]
    pack = join(rows)
    assert pack.inputs == {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]}
    assert pack.labels == [IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9]
    assert (pack.num_targets, pack.origin, pack.weights) == (3, "a:1, a:2", None)


def test_weights_are_packed_along() -> None:
    half = Example({"input_ids": [5, 6]}, [5, 6], 0.5, "a:1", 2, weights=[0.5, 0.5])
    assert join([half, Example({"input_ids": [8]}, [8], 0, "a:2", 1)]).weights == [0.5, 0.5, 1.0]
