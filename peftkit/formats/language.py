"""Formats for language models: instruction, chat, prompt_completion, text, seq2seq."""

from __future__ import annotations

from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, text_of

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ALLOWED_ROLES = ("system", "user", "assistant", "tool")
_ANSWERS = ("output", "answer", "response", "completion")
_QUESTIONS = ("instruction", "question")


def _instruction(row: RawRow, target: bool) -> CanonicalRow:
    messages: list[dict[str, Any]] = []
    system = text_of(row, "system", required=False)
    if system:
        messages.append({"role": "system", "content": system})
    history = row.get("history") or []
    for turn in history if isinstance(history, list | tuple) else [None]:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise RowError("`history` must be a list of [user text, assistant text] pairs")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = text_of(row, *_QUESTIONS)
    extra = text_of(row, "input", required=False)
    messages.append({"role": "user", "content": f"{question}\n{extra}" if extra.strip() else question})
    if target:
        messages.append({"role": "assistant", "content": text_of(row, *_ANSWERS)})
    return {"messages": messages}


def _chat(row: RawRow, target: bool) -> CanonicalRow:
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("no `messages` (or `conversations`): a list of turns with role and content")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    if target and not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn: there is nothing to learn")
    if not target:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    return {"messages": messages}


def _message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is not a mapping with role and content")
    role = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(role), role)
    if role not in _ALLOWED_ROLES:
        raise RowError(f"turn {number} has the role {role!r}; allowed: {', '.join(_ALLOWED_ROLES)}, human, gpt")
    content = turn.get("content", turn.get("value"))
    if not isinstance(content, str):
        raise RowError(f"turn {number} has no text in `content`")
    if role == "assistant" and not content.strip():
        raise RowError(f"turn {number} is a blank assistant turn")
    return {"role": role, "content": content}


def _prompt_completion(row: RawRow, target: bool) -> CanonicalRow:
    result = {"prompt": text_of(row, "prompt")}
    return result | {"completion": text_of(row, "completion", "response")} if target else result


def _text(row: RawRow, target: bool) -> CanonicalRow:
    return {"text": text_of(row, "text")}


def _seq2seq(row: RawRow, target: bool) -> CanonicalRow:
    result = {"prompt": text_of(row, "source")}
    return result | {"completion": text_of(row, "target")} if target else result


INSTRUCTION = Format(
    name="instruction",
    summary="instruction (or question), optional input, system, history; output (or answer, response)",
    yields=("messages",),
    matches=lambda names: bool(names & {*_QUESTIONS}) and bool(names & {*_ANSWERS}),
    convert=_instruction,
)
CHAT = Format(
    name="chat",
    summary="messages [{role, content}] or conversations [{from, value}], optional system",
    yields=("messages",),
    matches=lambda names: bool(names & {"messages", "conversations"}),
    convert=_chat,
)
PROMPT_COMPLETION = Format(
    name="prompt_completion",
    summary="prompt and completion (or response), used as they are, without chat template",
    yields=("prompt", "completion"),
    matches=lambda names: "prompt" in names and bool(names & {"completion", "response"}),
    convert=_prompt_completion,
)
TEXT = Format(
    name="text",
    summary="text, every token of which is learned (continued pretraining)",
    yields=("text",),
    matches=lambda names: "text" in names and "label" not in names,
    convert=_text,
)
SEQ2SEQ = Format(
    name="seq2seq",
    summary="source and target, used as they are",
    yields=("prompt", "completion"),
    matches=lambda names: {"source", "target"} <= names,
    convert=_seq2seq,
)
