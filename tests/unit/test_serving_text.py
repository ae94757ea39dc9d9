"""Text of an answer as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.serving.text import TextStream


def decode(ids: Sequence[int]) -> str:
    """Each token is a byte."""
    return bytes(ids).decode("utf-8", "replace")


def pieces(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """What is handed out at each byte, until the answer ends or is stopped, and then the rest."""
    stream, found = TextStream(decode, stop), []
    for byte in text.encode():
        found.append(stream.add(byte))
        if stream.stopped:
            return found
    return [*found, stream.rest()]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_an_answer_is_its_text_up_to_the_first_stop_text(text: str, stop: list[str]) -> None:
    ends = [place + len(part) for part in stop if (place := text.find(part)) >= 0]
    first = min((text[: min(ends)].find(part) for part in stop if part in text[: min(ends)]), default=0) if ends else len(text)
    assert "".join(pieces(text, tuple(stop))) == text[:first]


def test_no_half_characters_are_handed_out() -> None:
    assert pieces("a€b") == ["a", "", "", "€", "b", ""]


def test_what_may_become_a_stop_text_is_held_back() -> None:
    assert pieces("x\n\ny\n", ("\n\n\n",)) == ["x", "", "", "\n\ny", "", "\n"]


@pytest.mark.parametrize(
    ("text", "stop", "wanted"), [("one END two", ("END",), "one "), ("END", ("END",), ""), ("EN", ("END",), "EN")]
)
def test_a_stop_text_is_no_part_of_the_answer(text: str, stop: tuple[str, ...], wanted: str) -> None:
    assert "".join(pieces(text, stop)) == wanted


def test_a_character_that_never_ends_comes_with_the_rest() -> None:
    stream = TextStream(decode)
    assert [stream.add(byte) for byte in b"a\xe2"] == ["a", ""]
    assert stream.rest() == "\ufffd"
