"""The preference format: prompts beside the answers or in them, and pairs that teach nothing."""

from __future__ import annotations

from typing import Any

import pytest

from peftkit.formats import FORMATS
from peftkit.formats.base import RowError

PREFERENCE = FORMATS["preference"]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    """One turn."""
    return {"role": role, "content": content, **more}


USER, BE = said("user", "hi"), said("system", "be")
GOOD, BAD = said("assistant", "ho"), said("assistant", "he")
TEXTS = {"chosen": "ho", "rejected": "he"}
TURNS = {"chosen": [GOOD], "rejected": [BAD]}
WHOLE = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
PAIR: list[dict[str, Any]] = [
    {"prompt": "hi", **TEXTS},
    {"prompt": "hi", **TURNS},
    {"prompt": "hi", **WHOLE},
    {"prompt": "hi", "chosen": {"from": "gpt", "value": "ho"}, "rejected": BAD},
    {"prompt": [USER], **TEXTS},
    {"prompt": [USER], **TURNS},
    {"prompt": [USER], **WHOLE},
    WHOLE,
    {"instruction": "hi", **TEXTS},
    {"question": "hi", "input": "", **TEXTS},
    {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "ho"}, "rejected": BAD},
    {"messages": [USER], **TEXTS},
    # ultrafeedback_binarized: here `messages` is the better conversation, not the prompt
    {"prompt": "hi", "messages": [USER, GOOD], "score_chosen": 8.5, **WHOLE},
]


@pytest.mark.parametrize("row", PAIR)
def test_every_layout_becomes_two_whole_conversations(row: dict[str, Any]) -> None:
    assert PREFERENCE.convert(row, True) == {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


@pytest.mark.parametrize("row", PAIR)
def test_the_system_column_begins_both(row: dict[str, Any]) -> None:
    converted = PREFERENCE.convert({**row, "system": "be"}, True)
    assert converted == {"chosen": [BE, USER, GOOD], "rejected": [BE, USER, BAD]}


@pytest.mark.parametrize("row", PAIR)
def test_inference_sees_the_prompt_alone(row: dict[str, Any]) -> None:
    assert PREFERENCE.convert({**row, "system": "be"}, False) == {"messages": [BE, USER]}


def test_inference_needs_no_answers() -> None:
    assert PREFERENCE.convert({"prompt": "hi"}, False) == {"messages": [USER]}


def test_instruction_input_and_history_come_before_the_answers() -> None:
    row = {"instruction": "hi", "input": "you", "history": [["a", "b"]], **TEXTS}
    assert PREFERENCE.convert(row, True)["chosen"][:-1] == [
        *(said("user", "a"), said("assistant", "b", weight=0.0)),
        said("user", "hi\nyou"),
    ]


def test_assistant_turns_that_both_share_are_not_learned() -> None:
    turns = [USER, GOOD, USER]
    converted = PREFERENCE.convert({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}, True)
    assert converted["chosen"] == [USER, GOOD | {"weight": 0.0}, USER, GOOD]
    assert converted["rejected"] == [USER, GOOD | {"weight": 0.0}, USER, BAD]


def test_a_system_turn_in_the_answers_is_kept_beside_the_prompt() -> None:
    row = {"prompt": "hi", "chosen": [BE, USER, GOOD], "rejected": [BE, USER, BAD]}
    assert PREFERENCE.convert(row, True)["chosen"] == [BE, USER, GOOD]


def test_answers_of_several_turns_may_differ_in_all_but_the_first() -> None:
    more = [GOOD, said("user", "so"), GOOD]
    assert PREFERENCE.convert({"prompt": "hi", "chosen": more, "rejected": [BAD]}, True)["chosen"] == [USER, *more]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "hi", "chosen": "ho", "rejected": "ho"}, "`chosen` and `rejected` are the same"),
        ({"prompt": "hi", "chosen": " ", "rejected": "he"}, "column `chosen` is blank"),
        ({"prompt": "hi", "chosen": "ho", "rejected": ""}, "column `rejected` is blank"),
        ({"prompt": "hi", "chosen": "ho"}, "no column `rejected`; the row has `prompt`, `chosen`"),
        ({"prompt": "hi", "chosen": 3, "rejected": "he"}, "column `chosen` holds a number, not text"),
        ({"prompt": "hi", "chosen": [], "rejected": "he"}, "column `chosen` holds []; it must be a list of turns"),
        ({"prompt": "hi", "chosen": [said("x", "ho")], "rejected": "he"}, "turn 1 of `chosen` has the role 'x'"),
        ({"prompt": "hi", "chosen": {"value": "ho"}, "rejected": "he"}, "`chosen` has the role None"),
        ({"prompt": " ", **TEXTS}, "column `prompt` is blank"),
        ({"prompt": 3, **TEXTS}, "column `prompt` holds a number, not text"),
        (TEXTS, "`chosen` is an answer, and the row has no `prompt` (or messages, conversations, instruction, question)"),
        ({"prompt": "ha", **WHOLE}, "`chosen` is a whole conversation, and the prompt beside it is not in it"),
        ({"chosen": [USER, GOOD], "rejected": [said("user", "ha"), BAD]}, "differ from the first turn on; both must begin"),
        ({"chosen": [BE, USER, GOOD], "rejected": [BE, said("user", "ha"), BAD]}, "`chosen` goes on with user and ends with"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "`chosen` goes on with assistant and ends with user"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "`chosen` is the beginning of the other conversation"),
        ({"prompt": "hi", "chosen": [GOOD | {"train": False}], "rejected": "he"}, "every assistant turn has the weight 0"),
        ({"prompt": "hi", "images": ["a.png"], **TEXTS}, "column `images` is not empty"),
    ],
)  # fmt: skip
def test_a_pair_that_teaches_nothing_is_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        PREFERENCE.convert(row, True)
    assert words in str(caught.value)


def test_inference_without_a_prompt_is_refused() -> None:
    with pytest.raises(RowError, match="no `prompt`"):
        PREFERENCE.convert(TEXTS, False)
