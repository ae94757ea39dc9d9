"""Turns of conversations: roles, texts, tool calls, weights, history, and what is said of those that are wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from peftkit.formats import FORMATS
from peftkit.formats.base import RowError

Turn = dict[str, Any]


def said(role: str, content: Any, **more: Any) -> Turn:
    """One turn."""
    return {"role": role, "content": content, **more}


def called(name: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One tool call in canonical form."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def chat(*turns: Any, target: bool = True, **columns: Any) -> dict[str, Any]:
    """A chat row in canonical columns."""
    return FORMATS["chat"].convert({"messages": list(turns), **columns}, target)


USER, ANSWER = said("user", "hi"), said("assistant", "ho")
ADD = {"name": "add", "arguments": {"a": 2}}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *(("human", "user"), ("user", "user"), ("system", "system"), ("developer", "developer")),
        *((name, "assistant") for name in ("gpt", "bot", "model", "assistant")),
        *((name, "tool") for name in ("tool", "observation", "function", "ipython")),
    ],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("role", "value")])
def test_every_name_of_a_role_becomes_ours(theirs: str, ours: str, keys: tuple[str, str]) -> None:
    assert chat(dict(zip(keys, (theirs, "x"), strict=True)), USER, ANSWER)["messages"][0] == said(ours, "x")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (said("assistant", "ho", name="bo"), said("assistant", "ho", name="bo")),
        (said("tool", "3", name="add", tool_call_id="c1"), said("tool", "3", name="add", tool_call_id="c1")),
        (said("assistant", "ho", thinking="hm"), said("assistant", "ho", reasoning_content="hm")),
        (said("assistant", "ho", reasoning="hm"), said("assistant", "ho", reasoning_content="hm")),
        (said("assistant", "ho", reasoning_content="hm"), said("assistant", "ho", reasoning_content="hm")),
        (said("assistant", "ho", reasoning_content=" "), ANSWER),
        (said("assistant", [{"type": "text", "text": "h"}, {"type": "text", "text": "o"}]), ANSWER),
        (said("user", [{"type": "text", "value": "hi"}]), USER),
        (said("assistant", "ho", id=7, markdown=True), ANSWER),
        # A table's columns are there for every turn: null says nothing.
        ({"role": None, "from": "gpt", "content": None, "value": "ho", "weight": None, "tool_calls": None}, ANSWER),
    ],
)
def test_a_turn_becomes_a_message(turn: Turn, message: Turn) -> None:
    assert chat(turn, ANSWER)["messages"][0] == message


@pytest.mark.parametrize(
    ("turn", "calls"),
    [
        ({"from": "function_call", "value": json.dumps(ADD)}, [called("add", {"a": 2})]),
        ({"from": "function_call", "value": json.dumps([ADD, ADD])}, [called("add", {"a": 2})] * 2),
        ({"from": "function_call", "value": json.dumps({**ADD, "arguments": '{"a": 2}'})}, [called("add", {"a": 2})]),
        ({"from": "function_call", "value": ADD}, [called("add", {"a": 2})]),
        (said("assistant", None, tool_calls=[called(**ADD, id="c1")]), [called("add", {"a": 2}, id="c1")]),
        (said("assistant", "", tool_calls=[{"function": {"name": "now"}}]), [called("now", {})]),
        ({"role": "assistant", "tool_calls": [{**ADD, "arguments": '{"a": 2}'}]}, [called("add", {"a": 2})]),
        (said("assistant", None, tool_calls=json.dumps([ADD])), [called("add", {"a": 2})]),
        (said("assistant", None, function_call={**ADD, "arguments": ""}), [called("add", {})]),
    ],
)  # fmt: skip
def test_tool_calls_become_a_list_of_functions_with_mappings_as_arguments(turn: Turn, calls: list[dict[str, Any]]) -> None:
    assert chat(USER, turn)["messages"][1] == said("assistant", "", tool_calls=calls)


def test_the_text_beside_a_tool_call_is_kept() -> None:
    assert chat(USER, said("assistant", "Let me see.", tool_calls=[ADD]))["messages"][1]["content"] == "Let me see."


FUNCTION = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    ("tools", "made"),
    [
        *(([TOOL], [TOOL]), ([FUNCTION], [TOOL]), (json.dumps([FUNCTION, TOOL]), [TOOL, TOOL])),
        ([{**FUNCTION, "parameters": '{"type": "object"}'}], [TOOL]),
        *(([], None), (None, None), (" ", None), ("[]", None), (float("nan"), None)),
    ],
)
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("chat", {"messages": [USER, ANSWER]}),
        ("instruction", {"instruction": "hi", "output": "ho"}),
        ("prompt_completion", {"prompt": [USER], "completion": [ANSWER]}),
        ("preference", {"prompt": "hi", "chosen": "ho", "rejected": "he"}),
    ],
)
def test_tools_come_along_wrapped_as_functions(name: str, row: dict[str, Any], tools: Any, made: Any) -> None:
    assert FORMATS[name].convert({**row, "tools": tools}, True).get("tools") == made
    assert FORMATS[name].convert({**row, "tools": tools}, False).get("tools") == made


@pytest.mark.parametrize(
    ("stated", "weight"),
    [
        *(({name: flag}, float(flag)) for name in ("train", "training", "loss") for flag in (False, True)),
        *(({"weight": 0.3}, 0.3), ({"weight": 2}, 2.0), ({"weight": 0}, 0.0), ({"loss_weight": 0.5}, 0.5)),
        *(({"train": False, "weight": 0}, 0.0), ({}, None), ({"train": None, "weight": float("nan")}, None)),
    ],
)
def test_a_weight_is_there_where_the_row_states_one(stated: Turn, weight: float | None) -> None:
    message = chat(USER, said("assistant", "ho", **stated), ANSWER)["messages"][1]
    assert message == ANSWER | ({} if weight is None else {"weight": weight})


@pytest.mark.parametrize("stated", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
def test_a_weight_of_nothing_on_other_turns_is_dropped(stated: Turn) -> None:
    assert chat(USER | stated, ANSWER) == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("first", "system", "beginning"),
    [
        ([], "be", [said("system", "be")]),
        ([], " ", []),
        ([said("system", "is")], "be", [said("system", "is")]),
        ([said("developer", "is")], "be", [said("developer", "is")]),
        ([said("system", " ")], "be", [said("system", "be")]),
        ([said("system", "")], None, []),
        ([said("system", "is")], None, [said("system", "is")]),
    ],
)
def test_a_conversation_begins_with_its_system_turn_or_else_the_column(
    first: list[Turn], system: Any, beginning: list[Turn]
) -> None:
    assert chat(*first, USER, ANSWER, system=system)["messages"] == [*beginning, USER, ANSWER]


def test_turns_of_one_role_may_follow_each_other_and_the_last_may_be_a_users() -> None:
    turns = [USER, USER, ANSWER, ANSWER, USER]
    assert chat(*turns) == {"messages": turns}


def test_inference_stops_before_the_last_answer() -> None:
    turns = [USER, said("assistant", "", tool_calls=[called("add", {})]), said("tool", "3")]
    assert chat(*turns, ANSWER, ANSWER, target=False) == {"messages": turns}


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ("hi", "turn 2 is text, not a mapping with role and content"),
        (None, "turn 2 is null, not a mapping"),
        (said("robot", "ho"), "turn 2 has the role 'robot'; allowed: system, developer, user, human, assistant, gpt, bot"),
        ({"content": "hi"}, "turn 2 has the role None"),
        (said(["user"], "hi"), "turn 2 has the role ['user']"),
        (said("User", "hi"), "turn 2 has the role 'User'"),
        (said("user", None), "turn 2 has no text in `content`; only assistant turns with `tool_calls` need none"),
        (said("assistant", None, tool_calls=[]), "turn 2 has no text in `content`"),
        (said("assistant", " "), "turn 2 is a blank assistant turn"),
        (said("user", ""), "turn 2 is a blank user turn"),
        (said("tool", ""), "turn 2 is a blank tool turn"),
        (said("user", 3), "turn 2: `content` holds a number, not text"),
        ({"from": "gpt", "value": {"a": 1}}, "turn 2: `value` holds a mapping, not text"),
        (said("user", []), "turn 2 is a blank user turn"),
        (said("user", ["hi"]), "turn 2: part 1 of `content` is text, not a mapping with type and text"),
        (said("user", [{"type": "image_url"}]), "turn 2: part 1 of `content` has the type 'image_url'; only parts of type"),
        (said("user", [{"type": "text", "text": None}]), "turn 2: part 1 of `content` has no text in `text`"),
        (said("assistant", [{"type": "text", "text": "x", "train": True}]), "says whether it is learned; turns"),
        (said("assistant", "ho", train_detail=[{"train": False}]), "turn 2 has `train_detail`; turns are learned whole"),
        (said("assistant", "ho", name=3), "turn 2: `name` holds a number, not text"),
        (said("tool", "ho", tool_call_id=3), "turn 2: `tool_call_id` holds a number, not text"),
        (said("user", "ho", thinking="hm"), "turn 2 is a user turn with `thinking`; only assistant turns have one"),
        (said("assistant", "ho", thinking=3), "turn 2: `thinking` holds a number, not text"),
        (said("assistant", "ho", train="no"), "turn 2: `train` holds 'no'; it must be true or false"),
        (said("assistant", "ho", train=0), "turn 2: `train` holds 0; it must be true or false"),
        (said("assistant", "ho", weight=-1), "turn 2: `weight` holds -1; it must be a number from 0 on"),
        (said("assistant", "ho", weight=True), "turn 2: `weight` holds True; it must be a number from 0 on"),
        (said("assistant", "ho", weight="1"), "turn 2: `weight` holds '1'; it must be a number from 0 on"),
        (said("assistant", "ho", weight=float("inf")), "turn 2: `weight` holds inf; it must be a number from 0 on"),
        (said("assistant", "ho", train=False, weight=1), "says how much it counts in `train`, `weight`, which disagree"),
        (said("user", "ho", train=True), "turn 2 is a user turn with `train: True`; only assistant turns are learned"),
        (said("tool", "ho", weight=0.5), "turn 2 is a tool turn with `weight: 0.5`"),
        (said("user", "ho", tool_calls=[ADD]), "turn 2 is a user turn with `tool_calls`; only assistant turns"),
        (said("assistant", None, tool_calls={"a": 1}), "turn 2: `tool_calls` holds a mapping; it must be a list of calls"),
        (said("assistant", None, tool_calls="add(2)"), "turn 2: `tool_calls` is not valid JSON"),
        (said("assistant", None, tool_calls=["add"]), "turn 2: tool call 1 is text, not a mapping"),
        (said("assistant", None, tool_calls=[None]), "turn 2: tool call 1 is null, not a mapping"),
        (said("assistant", None, tool_calls=[{"function": None}]), "turn 2: tool call 1 has no function with a `name`"),
        (said("assistant", None, tool_calls=[{"name": " "}]), "turn 2: tool call 1 has no function with a `name`"),
        (said("assistant", None, tool_calls=[{**ADD, "id": 3}]), "turn 2: tool call 1: `id` holds a number, not text"),
        (said("assistant", None, tool_calls=[{"type": "mcp", "function": ADD}]), "tool call 1 has the type 'mcp'; only"),
        (said("assistant", None, tool_calls=[{**ADD, "arguments": [2]}]), "`arguments` holds [2]; it must be a mapping, or"),
        (said("assistant", None, tool_calls=[{**ADD, "arguments": "a=2"}]), "tool call 1: `arguments` is not valid JSON"),
        ({"from": "function_call", "value": "add(2)"}, "turn 2, a function call, is not valid JSON"),
        ({"from": "function_call", "value": "[" * 100_000}, "turn 2, a function call, is not valid JSON"),
        ({"from": "function_call", "value": "[]"}, "turn 2 is a function call without a call"),
        ({"from": "function_call", "value": None}, "turn 2: tool call 1 is null"),
    ],
)  # fmt: skip
def test_a_bad_turn_is_refused_with_its_number(turn: Any, words: str) -> None:
    with pytest.raises(RowError) as caught:
        chat(USER, turn, ANSWER)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "no `messages` (or `conversations`), a list of turns; the row has no columns"),
        ({"messages": []}, "column `messages` holds []; it must be a list of turns"),
        ({"messages": None, "conversations": None}, "column `messages` holds None; it must be a list of turns"),
        ({"conversations": "hi"}, "column `conversations` holds 'hi'; it must be a list of turns"),
        ({"messages": [said("system", " ")]}, "column `messages` holds only a blank system turn"),
        ({"messages": [USER]}, "no assistant turn: there is nothing to learn"),
        ({"messages": [USER, ANSWER | {"train": False}]}, "every assistant turn has the weight 0 (or `train: false`)"),
        ({"messages": [USER, ANSWER], "system": 3}, "column `system` holds a number, not text"),
        ({"messages": [USER, ANSWER], "tools": "add"}, "column `tools` is not valid JSON"),
        ({"messages": [USER, ANSWER], "tools": TOOL}, "it must be a list of functions, or JSON of one"),
        ({"messages": [USER, ANSWER], "tools": [None]}, "tool 1 in `tools` is null, not a mapping"),
        ({"messages": [USER, ANSWER], "tools": [TOOL, {}]}, "tool 2 in `tools` has no function with a `name`"),
        ({"messages": [USER, ANSWER], "tools": [{**FUNCTION, "parameters": "x"}]}, "tool 1 in `tools`: `parameters` is not"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "column `images` is not empty; only text can be learned"),
        ({"messages": [USER, ANSWER], "kto_tag": False}, "column `kto_tag` says false: a bad answer, which must not be"),
        ({"messages": [USER, ANSWER], "kto_tag": "no"}, "column `kto_tag` holds 'no'; it must be true or false"),
    ],
)  # fmt: skip
def test_a_bad_conversation_is_refused(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS["chat"].convert(row, True)
    assert words in str(caught.value)


def test_inference_needs_a_turn_to_answer() -> None:
    with pytest.raises(RowError, match="there is no turn to answer"):
        chat(ANSWER, target=False)


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"]],
        [("a", "b")],
        [said("user", "a"), said("assistant", "b")],
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    ],
)
def test_history_is_a_list_of_pairs_or_of_turns(history: Any) -> None:
    row = {"history": history, "instruction": "hi", "output": "ho"}
    assert FORMATS["instruction"].convert(row, True)["messages"] == [said("user", "a"), said("assistant", "b"), USER, ANSWER]


@pytest.mark.parametrize("history", [None, [], "", float("nan")])
def test_an_empty_history_is_none(history: Any) -> None:
    row = {"history": history, "instruction": "hi", "output": "ho"}
    assert FORMATS["instruction"].convert(row, True) == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    ("more", "question"),
    [
        ({"input": "you"}, "hi\nyou"),
        ({"context": "you"}, "hi\nyou"),
        ({"input": "", "context": "you"}, "hi\nyou"),
        ({"input": "you", "context": {"title": ["x"]}}, "hi\nyou"),
    ],
)
def test_a_question_is_followed_by_its_input_or_context(more: dict[str, Any], question: str) -> None:
    messages = FORMATS["instruction"].convert({"instruction": "hi", "output": "ho", **more}, True)["messages"]
    assert messages[0]["content"] == question


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ("a b", "column `history` holds 'a b' as round 1; it must be a list of [user text, assistant text] pairs"),
        ([["a", None]], "column `history` holds ['a', None] as round 1"),
        ([["a", "b"], said("user", "c")], "as round 2; it must be a list of"),
        ([["a", "b"], ["c", " "]], "round 2 of `history` has a blank text"),
        ([said("x", "a")], "turn 1 of `history` has the role 'x'"),
    ],
)
def test_a_bad_history_is_refused_with_its_round(history: Any, words: str) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS["instruction"].convert({"history": history, "instruction": "hi", "output": "ho"}, True)
    assert words in str(caught.value)
