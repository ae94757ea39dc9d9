"""Turns of a conversation in canonical form: roles, texts, tool calls and weights, from the spellings that are in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftkit.formats.base import RawRow, RowError, flag_of, is_missing, json_of, kind_of, shown, text_of

Message = dict[str, Any]

ROLES = {
    **{"system": "system", "developer": "developer", "user": "user", "human": "user"},
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
}
_FLAGS, _WEIGHTS = ("train", "training", "loss"), ("weight", "loss_weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def messages_of(turns: Any, column: str, where: str = "") -> list[Message]:
    """A list of turns ({role, content} or {from, value}) as messages; a blank system turn is none.

    Args:
        turns: what the column holds.
        column: its name, for messages.
        where: what follows "turn 3" in messages.

    Raises:
        RowError: naming the number of the turn.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError(f"column `{column}` holds {shown(turns)}; it must be a list of turns, each with role and content")
    messages = [message_of(turn, f"turn {number}{where}") for number, turn in enumerate(turns, 1)]
    kept = [message for message in messages if message["content"] or message["role"] not in ("system", "developer")]
    if not kept:
        raise RowError(f"column `{column}` holds only a blank system turn")
    return kept


def message_of(turn: Any, where: str) -> Message:
    """One turn as a message.

    Raises:
        RowError: beginning with `where`.
    """
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {kind_of(turn)}, not a mapping with role and content")
    name = next((turn[key] for key in ("role", "from") if not is_missing(turn.get(key))), None)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{where} has the role {shown(name)}; allowed: {', '.join(ROLES)}")
    calls = _called(turn, where) if name == "function_call" else _tool_calls(turn, role, where)
    content = "" if name == "function_call" else _content(turn, role, bool(calls), where)
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    message |= _extras(turn, role, where)
    weight = _weight(turn, role, where)
    return message if weight is None or role != "assistant" else message | {"weight": weight}


def _content(turn: RawRow, role: str, may_be_empty: bool, where: str) -> str:
    key = next((key for key in ("content", "value") if not is_missing(turn.get(key))), "content")
    value = turn.get(key)
    if is_missing(value):
        if not may_be_empty:
            raise RowError(f"{where} has no text in `{key}`; only assistant turns with `tool_calls` need none")
        return ""
    text = _joined(value, key, where)
    if text.strip():
        return text
    if may_be_empty or role in ("system", "developer"):
        return ""
    raise RowError(f"{where} is a blank {role} turn")


def _joined(value: Any, key: str, where: str) -> str:
    """A text, or the text of a list of parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{where}: `{key}` holds {kind_of(value)}, not text")
    return "".join(_part(part, f"{where}: part {number} of `{key}`") for number, part in enumerate(value, 1))


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise RowError(f"{where} is {kind_of(part)}, not a mapping with type and text")
    if part.get("type") != "text":
        raise RowError(f"{where} has the type {shown(part.get('type'))}; only parts of type 'text' can be learned")
    if any(not is_missing(part.get(name)) for name in (*_FLAGS, *_WEIGHTS)):
        raise RowError(f"{where} says whether it is learned; turns are learned whole, `segments` in parts")
    text = next((part[key] for key in ("text", "content", "value") if not is_missing(part.get(key))), None)
    if not isinstance(text, str):
        raise RowError(f"{where} has no text in `text`")
    return text


def _extras(turn: RawRow, role: str, where: str) -> Message:
    """Name, id of the answered call, and reasoning, where the turn has them."""
    found: Message = {}
    for key in ("name", "tool_call_id"):
        value = turn.get(key)
        if is_missing(value) or value == "":
            continue
        if not isinstance(value, str):
            raise RowError(f"{where}: `{key}` holds {kind_of(value)}, not text")
        found[key] = value
    key = next((key for key in _REASONING if not is_missing(turn.get(key))), "")
    reasoning = _joined(turn[key], key, where) if key else ""
    if reasoning.strip():
        if role != "assistant":
            raise RowError(f"{where} is a {role} turn with `{key}`; only assistant turns have one")
        found["reasoning_content"] = reasoning
    return found


def _weight(turn: RawRow, role: str, where: str) -> float | None:
    """How much a turn counts, where it says so."""
    if not is_missing(turn.get("train_detail")):
        raise RowError(f"{where} has `train_detail`; turns are learned whole, `segments` in parts")
    stated = {name: _stated(turn[name], name, where) for name in (*_FLAGS, *_WEIGHTS) if not is_missing(turn.get(name))}
    if not stated:
        return None
    if len(set(stated.values())) > 1:
        raise RowError(f"{where} says how much it counts in {', '.join(f'`{name}`' for name in stated)}, which disagree")
    name, weight = next(iter(stated.items()))
    if role != "assistant" and weight:
        raise RowError(
            f"{where} is a {role} turn with `{name}: {shown(turn[name])}`; only assistant turns are learned one by one "
            "(`data.train_on: all` learns every token)"
        )
    return weight


def _stated(value: Any, name: str, where: str) -> float:
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise RowError(f"{where}: `{name}` holds {shown(value)}; it must be true or false")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise RowError(f"{where}: `{name}` holds {shown(value)}; it must be a number from 0 on")
    return float(value)


def _called(turn: RawRow, where: str) -> list[Message]:
    """The calls in a turn of the role function_call: JSON of {name, arguments}, or a list of them."""
    value = next((turn[key] for key in ("value", "content") if not is_missing(turn.get(key))), None)
    if isinstance(value, str):
        value = json_of(value, f"{where}, a function call,")
    calls = _calls(value if isinstance(value, list) else [value], where)
    if not calls:
        raise RowError(f"{where} is a function call without a call")
    return calls


def _tool_calls(turn: RawRow, role: str, where: str) -> list[Message]:
    """OpenAI's `tool_calls`, or its older `function_call` of a single one."""
    value, single = turn.get("tool_calls"), turn.get("function_call")
    if isinstance(value, str) and value.strip():
        value = json_of(value, f"{where}: `tool_calls`")
    if not value and not is_missing(single):
        value = [single]
    if is_missing(value) or value in ("", []):
        return []
    if role != "assistant":
        raise RowError(f"{where} is a {role} turn with `tool_calls`; only assistant turns have them")
    if not isinstance(value, list):
        raise RowError(f"{where}: `tool_calls` holds {kind_of(value)}; it must be a list of calls")
    return _calls(value, where)


def _calls(calls: Sequence[Any], where: str) -> list[Message]:
    return [_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, 1)]


def _call(call: Any, where: str) -> Message:
    function = _function(call, where)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = json_of(arguments, f"{where}: `arguments`")
    arguments = {} if is_missing(arguments) or arguments == "" else arguments
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: `arguments` holds {shown(arguments)}; it must be a mapping, or JSON of one")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if is_missing(call.get("id")):
        return made
    if not isinstance(call["id"], str):
        raise RowError(f"{where}: `id` holds {kind_of(call['id'])}, not text")
    return made | {"id": call["id"]}


def _function(value: Any, where: str) -> Message:
    """The function in {type: function, function: {name, ...}}, or bare; its name is checked."""
    if not isinstance(value, dict):
        raise RowError(f"{where} is {kind_of(value)}, not a mapping with a `function`")
    kind, function = value.get("type"), value.get("function", value)
    if kind not in (None, "function") and "function" in value:
        raise RowError(f"{where} has the type {shown(kind)}; only functions are known")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where} has no function with a `name`: {shown(value)}")
    return dict(function)


def tools_of(row: RawRow) -> Message:
    """The columns `tools`, a list or JSON of one, as the canonical column; empty where the row has none.

    Raises:
        RowError: naming the tool that is none.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = json_of(tools, "column `tools`")
    if is_missing(tools) or tools == [] or (isinstance(tools, str) and not tools.strip()):
        return {}
    if not isinstance(tools, list):
        raise RowError(f"column `tools` holds {shown(tools)}; it must be a list of functions, or JSON of one")
    made = []
    for number, tool in enumerate(tools, 1):
        function = _function(tool, f"tool {number} in `tools`")
        if isinstance(function.get("parameters"), str):  # so that one table can hold tools of different shapes
            function["parameters"] = json_of(function["parameters"], f"tool {number} in `tools`: `parameters`")
        made.append({"type": "function", "function": function})
    return {"tools": made}


def with_system(messages: list[Message], row: RawRow) -> list[Message]:
    """The messages after the text in the column `system` (or `system_prompt`), unless they begin with a system turn."""
    system = text_of(row, "system", "system_prompt", required=False)
    if not system or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system}, *messages]


def as_prompt(messages: Sequence[Message]) -> list[Message]:
    """The messages as something to answer: assistant turns have the weight 0, unless they state one."""
    return [{"weight": 0.0} | message if message["role"] == "assistant" else message for message in messages]


def before_answer(messages: Sequence[Message]) -> list[Message]:
    """The messages without the assistant turns at the end.

    Raises:
        RowError: there is no other turn.
    """
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise RowError("there is no turn to answer: every turn is an assistant turn")
    return list(messages[:end])


def check_answer(messages: Sequence[Message]) -> None:
    """Refuse messages without an assistant turn to learn.

    Raises:
        RowError: there is none, or each has the weight 0.
    """
    weights = [message.get("weight", 1.0) for message in messages if message["role"] == "assistant"]
    if not weights:
        raise RowError("no assistant turn: there is nothing to learn")
    if not any(weights):
        raise RowError("every assistant turn has the weight 0 (or `train: false`): there is nothing to learn")


def check_only_text(row: RawRow) -> None:
    """Refuse rows that are more than text.

    Raises:
        RowError: the row has images, videos or audios.
    """
    for name in ("images", "videos", "audios"):
        if not is_missing(row.get(name)) and row[name] not in ("", []):
            raise RowError(f"column `{name}` is not empty; only text can be learned")


def check_wanted(row: RawRow) -> None:
    """Refuse answers that are there to be avoided, as in sets for KTO: LLaMA-Factory tags them `kto_tag`, TRL `label`.

    Raises:
        RowError: the tag says false.
    """
    name = "label" if row.get("label") is False else "kto_tag" if flag_of(row, "kto_tag") is False else None
    if name is not None:
        raise RowError(f"column `{name}` says false: a bad answer, which must not be learned; leave such rows out")
