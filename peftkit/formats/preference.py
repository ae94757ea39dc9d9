"""The preference format: two answers to the same turns, of which one is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, columns_text, is_missing, text_of
from peftkit.formats.instruction import QUESTIONS, asked
from peftkit.formats.messages import (
    Message,
    as_prompt,
    before_answer,
    check_answer,
    check_only_text,
    message_of,
    messages_of,
    tools_of,
    with_system,
)

_SIDES = ("chosen", "rejected")


def _preference(row: RawRow, target: bool) -> CanonicalRow:
    check_only_text(row)
    prompt = _prompt(row)
    if not target:
        messages = before_answer(_whole(row, "chosen", prompt)) if isinstance(row.get("chosen"), list) else prompt
        if not messages:
            raise RowError(f"no `prompt` (or messages, conversations, instruction, question); the row has {columns_text(row)}")
        return {"messages": with_system(messages, row)} | tools_of(row)
    chosen, rejected = (with_system(_whole(row, name, prompt), row) for name in _SIDES)
    num_shared = _num_shared(chosen, rejected)
    shared = as_prompt(chosen[:num_shared])
    return {"chosen": shared + chosen[num_shared:], "rejected": shared + rejected[num_shared:]} | tools_of(row)


def _prompt(row: RawRow) -> list[Message]:
    """The turns to be answered, where a column other than the answers has them."""
    if isinstance(row.get("prompt"), list):
        return messages_of(row["prompt"], "prompt", " of `prompt`")
    if not is_missing(row.get("prompt")):
        return [{"role": "user", "content": text_of(row, "prompt")}]
    for column in ("messages", "conversations"):
        if row.get(column):
            return messages_of(row[column], column)
    if any(not is_missing(row.get(name)) for name in QUESTIONS):
        return asked(row, *QUESTIONS)
    return []


def _whole(row: RawRow, column: str, prompt: list[Message]) -> list[Message]:
    """The conversation that ends with the answer in this column."""
    answer = _answer(row, column)
    if answer[0]["role"] == "assistant":
        if not prompt:
            raise RowError(
                f"`{column}` is an answer, and the row has no `prompt` (or messages, conversations, instruction, question) "
                f"that it answers: it has {columns_text(row)}"
            )
        return prompt + answer
    # Here the column holds the whole conversation; a prompt beside it must be the one that is in it.
    said = [(message["role"], message["content"]) for message in answer]
    if prompt and prompt != answer[: len(prompt)] and (prompt[-1]["role"], prompt[-1]["content"]) not in said:
        raise RowError(f"`{column}` is a whole conversation, and the prompt beside it is not in it")
    return answer


def _answer(row: RawRow, column: str) -> list[Message]:
    value: Any = row.get(column)
    if isinstance(value, list):
        return messages_of(value, column, f" of `{column}`")
    if isinstance(value, dict):
        return [message_of(value, f"`{column}`")]
    return [{"role": "assistant", "content": text_of(row, column)}]


def _num_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many turns both conversations begin with; after them each has its answer.

    Raises:
        RowError: they are equal, or differ in more than their answers.
    """
    if chosen == rejected:
        raise RowError("`chosen` and `rejected` are the same: there is no preference to learn")
    shorter = min(len(chosen), len(rejected))
    num_shared = next((index for index in range(shorter) if chosen[index] != rejected[index]), shorter)
    if not num_shared:
        raise RowError("`chosen` and `rejected` differ from the first turn on; both must begin with the same prompt")
    for name, turns in zip(_SIDES, (chosen[num_shared:], rejected[num_shared:]), strict=True):
        if not turns:
            raise RowError(f"`{name}` is the beginning of the other conversation and has no answer of its own")
        if turns[0]["role"] != "assistant" or turns[-1]["role"] != "assistant":
            raise RowError(
                f"`{name}` goes on with {turns[0]['role']} and ends with {turns[-1]['role']} after the {num_shared} turns "
                "that both share; the answers, which alone may differ, begin and end with assistant"
            )
        check_answer(turns)
    return num_shared


PREFERENCE = Format(
    name="preference",
    summary="chosen and rejected: answers to prompt (or messages, conversations, instruction), or whole conversations",
    yields=("chosen", "rejected"),
    matches=lambda names: {*_SIDES} <= names,
    read=_preference,
    example={"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "6"},
)
