"""Records on disk come back as they were, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftkit.engine.examples import Examples, ExampleWriter
from peftkit.engine.records import Records, RecordWriter
from peftkit.tasks.example import Example

_PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=8))
_VALUES = st.recursive(
    st.one_of(_PLAIN, st.lists(st.integers(-100, 2**31 - 1), max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(min_size=1, max_size=4), inner, max_size=4)),
    max_leaves=12,
)


@given(records=st.lists(_VALUES, max_size=6))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_come_back_as_they_were(tmp_path: Path, records: list[Any]) -> None:
    writer = RecordWriter(tmp_path / "r", ("place",))
    for place, record in enumerate(records):
        writer.add(record, place)
    writer.finish()
    found = Records(tmp_path / "r", ("place",))
    assert [len(found), list(found), found.column("place").tolist()] == [len(records), records, [*range(len(records))]]


def test_records_are_read_at_any_place(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "r")
    for number in range(5):
        writer.add([number, "\ud800"])
    found = writer.finish()
    assert [found[-1], found[1:3]] == [[4, "\ud800"], [[1, "\ud800"], [2, "\ud800"]]]
    with pytest.raises(IndexError):
        found[5]


def example(*ids: int, **more: Any) -> Example:
    """An example that learns its last token."""
    return Example({"input_ids": list(ids)}, [-100] * (len(ids) - 1) + [ids[-1]], 1, f"rows:{ids[0]}", len(ids) + 3, **more)


def written(folder: Path, *examples: Example) -> tuple[Examples, str]:
    """Examples on disk, and their fingerprint."""
    writer = ExampleWriter(folder / "e")
    for one in examples:
        writer.add(one)
    return writer.finish(), writer.fingerprint


def test_examples_come_back_with_everything_but_notes(tmp_path: Path) -> None:
    first = example(1, 2, 3, weights=[0.0, 0.0, 0.5], details={"classes": ["a"]}, task_id=2)
    found, _ = written(tmp_path, first, example(4, 5, notes=("odd",)))
    assert list(found) == [first, example(4, 5)]
    totals = [found.total(name) for name in ("num_input_tokens", "num_target_tokens", "num_labels")]
    assert (found.lengths.tolist(), totals) == ([3, 2], [5, 2, 5])


def test_the_fingerprint_is_that_of_what_is_trained_on(tmp_path: Path) -> None:
    moved = example(1, 2)
    moved.origin = "elsewhere:9"
    prints = [written(tmp_path, one)[1] for one in (example(1, 2), moved, example(1, 3), example(1, 2, weights=[0.0, 2.0]))]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
