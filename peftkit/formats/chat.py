"""The chat format: whole conversations."""

from __future__ import annotations

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, columns_text
from peftkit.formats.messages import (
    before_answer,
    check_answer,
    check_only_text,
    check_wanted,
    messages_of,
    tools_of,
    with_system,
)

_COLUMNS = ("messages", "conversations")


def _chat(row: RawRow, target: bool) -> CanonicalRow:
    check_only_text(row)
    column = next((name for name in _COLUMNS if row.get(name)), next((name for name in _COLUMNS if name in row), None))
    if column is None:
        raise RowError(f"no `messages` (or `conversations`), a list of turns; the row has {columns_text(row)}")
    messages = with_system(messages_of(row[column], column), row)
    if target:
        check_wanted(row)
        check_answer(messages)
    return {"messages": messages if target else before_answer(messages)} | tools_of(row)


CHAT = Format(
    name="chat",
    summary="messages [{role, content}] or conversations [{from, value}], optional system, tools; a turn may have train: false "
    "or a weight",
    yields=("messages",),
    matches=lambda names: bool(names & {*_COLUMNS}),
    read=_chat,
    example={"messages": [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]},
)
