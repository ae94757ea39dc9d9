"""The instruction format: one question, one answer, and perhaps what was said before."""

from __future__ import annotations

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, is_missing, shown, text_of
from peftkit.formats.messages import Message, check_only_text, check_wanted, messages_of, tools_of, with_system

_ANSWERS = ("output", "answer", "response", "completion")
QUESTIONS = ("instruction", "question")


def _instruction(row: RawRow, target: bool) -> CanonicalRow:
    check_only_text(row)
    messages = asked(row, *QUESTIONS)
    if target:
        check_wanted(row)
        messages.append({"role": "assistant", "content": text_of(row, *_ANSWERS)})
    return {"messages": messages} | tools_of(row)


def asked(row: RawRow, *questions: str) -> list[Message]:
    """Everything before the answer: system, history, and the question with its input.

    Raises:
        RowError: there is no question, or `history` is not one.
    """
    question, extra = text_of(row, *questions), text_of(row, "input", "context", required=False)
    messages = with_system(_history(row), row)
    return [*messages, {"role": "user", "content": f"{question}\n{extra}" if extra else question}]


def _history(row: RawRow) -> list[Message]:
    history = row.get("history")
    if is_missing(history) or history in ("", []):
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return messages_of(history, "history", " of `history`")
    messages: list[Message] = []
    for number, turn in enumerate(history if isinstance(history, list | tuple) else [history], 1):
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise RowError(
                f"column `history` holds {shown(turn)} as round {number}; it must be a list of [user text, assistant text] "
                "pairs, or of turns with role and content"
            )
        if not all(part.strip() for part in turn):
            raise RowError(f"round {number} of `history` has a blank text")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


INSTRUCTION = Format(
    name="instruction",
    summary="instruction (or question), optional input (or context), system, history, tools; output (or answer, response)",
    yields=("messages",),
    matches=lambda names: bool(names & {*QUESTIONS}) and bool(names & {*_ANSWERS}),
    read=_instruction,
    example={"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
)
