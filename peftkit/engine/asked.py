"""What a client of the server asks, as the rows that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.engine.generate import file_row
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.rows import with_system_prompt
from peftkit.engine.several import Named
from peftkit.errors import DataError
from peftkit.formats import FORMATS
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.formats.messages import messages_of
from peftkit.serving.jobs import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, ModelFacts


def chats(loaded: LoadedAdapter) -> bool:
    """Whether an adapter was trained on conversations, as far as is known."""
    columns = FORMATS[loaded.facts.format].yields if loaded.facts.format in FORMATS else ()
    trained = bool({"messages", "chosen"} & {*columns}) or (not columns and bool(loaded.runtime.tokenizer.chat_template))
    return trained and loaded.task.uses_chat_template


def canonical_row(loaded: LoadedAdapter, row: Mapping[str, Any], task_id: str | None) -> CanonicalRow:
    """A row of a request.

    Args:
        loaded: who is asked.
        row: `messages`, or `prompt` (a text that is continued as it stands), or the columns of the task's rows.
        task_id: the task, for adapters that know several.

    Raises:
        DataError: it is not what the adapter takes.
    """
    tasks = _tasks(loaded, task_id)
    if not loaded.task.generates:
        return file_row(loaded, row, "input", task_id)
    if "prompt" in row:
        return {"prompt": row["prompt"]} | tasks
    try:
        messages = messages_of(row["messages"], "messages")
    except RowError as error:
        raise DataError(str(error)) from error
    if chats(loaded):
        return with_system_prompt({"messages": messages}, loaded.facts.system_prompt) | tasks
    return {"prompt": _only_text(messages)} | tasks


def _only_text(messages: Sequence[Mapping[str, Any]]) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise DataError(
            "this adapter was trained on prompts and not on conversations: it takes one user message, or a prompt at "
            "/v1/completions"
        )
    return str(messages[0]["content"])


def _tasks(loaded: LoadedAdapter, task_id: str | None) -> dict[str, str]:
    if task_id is not None and not loaded.runtime.settings.task_names:
        raise DataError("`task_id` has no effect: this adapter was not trained on several tasks")
    return {} if task_id is None else {"task_id": task_id}


def facts_of(named: Named) -> ModelFacts:
    """What can be asked of an adapter."""
    loaded = named.loaded
    limit = loaded.position_limit if loaded.task.generates else loaded.runtime.settings.max_length
    labels = loaded.runtime.settings.labels
    return ModelFacts(named.name, loaded.task.name, loaded.facts.method, endpoints(named), labels, limit)


def endpoints(named: Named) -> tuple[str, ...]:
    """Where to ask it, the most fitting first."""
    loaded = named.loaded
    if loaded.task.generates:
        return (CHAT, COMPLETIONS) if chats(loaded) or not loaded.task.uses_chat_template else (COMPLETIONS, CHAT)
    return (CLASSIFY,) if loaded.task.has_head else (EMBEDDINGS,)


def wrong_endpoint(named: Named) -> str:
    """The same, for those who have asked elsewhere."""
    return f"`{named.name}` is for {named.loaded.task.name}: ask it at {' or '.join(endpoints(named))}"
