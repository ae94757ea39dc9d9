"""Answers in the task's own form: generated text, or what the task makes of the model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, TextStreamer

from peftkit.engine.data import encode_rows
from peftkit.engine.evaluate import score_examples
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.rows import with_system_prompt
from peftkit.engine.step import Step
from peftkit.errors import DataError
from peftkit.formats import FORMATS, detect_format
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.tasks.example import Example

Answer = dict[str, Any]


def prompt_row(
    loaded: LoadedAdapter, text: str, history: Sequence[Mapping[str, str]] = (), *, task_id: str | None = None
) -> CanonicalRow:
    """A prompt typed by a user as the canonical row that the adapter was trained on.

    Args:
        loaded: the adapter.
        text: what the user typed.
        history: earlier turns of a chat.
        task_id: the task, for adapters that know several.

    Raises:
        DataError: the text is not what the task takes.
    """
    facts = loaded.facts
    columns = FORMATS[facts.format].yields if facts.format in FORMATS else ()
    tasks = {} if task_id is None else {"task_id": task_id}
    if not loaded.task.generates:
        try:
            return loaded.runtime.prompt_row(text) | tasks
        except RowError as error:
            raise DataError(str(error)) from error
    has_template = bool(loaded.runtime.tokenizer.chat_template)
    if {"messages", "chosen"} & {*columns} or (not columns and has_template):
        messages = [*history, {"role": "user", "content": text}]
        return with_system_prompt({"messages": messages}, facts.system_prompt) | tasks
    return {"text" if "text" in columns else "prompt": text} | tasks


def file_row(loaded: LoadedAdapter, row: Mapping[str, Any], origin: str, task_id: str | None = None) -> CanonicalRow:
    """A row of an input file as a canonical row without its target.

    Args:
        loaded: the adapter.
        row: as read.
        origin: `file:row`, for messages.
        task_id: the task of rows that name none, for adapters that know several.

    Raises:
        DataError: the row has not the columns of the training format, nor a `prompt` or `text`.
    """
    facts = loaded.facts
    renamed = facts.rename(row)
    task = renamed.get("task_id", task_id) if loaded.runtime.settings.task_names else None
    item = FORMATS.get(facts.format) or detect_format(frozenset(renamed), loaded.task.can_read)
    try:
        if item is not None and loaded.task.can_read(item.yields):
            canonical = with_system_prompt(item.convert(renamed, False), facts.system_prompt)
            return canonical | ({} if task is None else {"task_id": task})
    except RowError as error:
        if "prompt" not in renamed and "text" not in renamed:
            raise DataError(f"{origin}: {error}") from error
    text = renamed.get("prompt", renamed.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{origin}: no text in `prompt` or `text`; the row has {', '.join(row) or 'no columns'}")
    try:
        return prompt_row(loaded, text, task_id=task)
    except DataError as error:
        raise DataError(f"{origin}: {error}") from error


def answer_rows(
    loaded: LoadedAdapter,
    rows: Sequence[tuple[str, CanonicalRow]],
    settings: Mapping[str, Any],
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Iterator[Answer]:
    """One answer per row, in order, computed in batches of like length.

    Args:
        loaded: the adapter.
        rows: origin and canonical row.
        settings: generation settings; those of the recipe where empty.
        batch_size: rows per forward pass.
        on_batch: told how many rows are done.
    """
    if loaded.method is not None and loaded.method.rows_interact:
        batch_size = 1
    examples = encode_rows(loaded.prompts, rows, "the input", target=False)
    if len(examples) != len(rows):
        raise DataError(f"{len(rows) - len(examples)} rows are longer than {loaded.runtime.settings.max_length} tokens")
    if not loaded.task.generates:
        with loaded.inference():
            scores = score_examples(
                Step(loaded.model, loaded.runtime),
                examples,
                batch_size=batch_size,
                device=loaded.device,
                on_batch=on_batch,
            )
        yield from (loaded.runtime.answer(score) for score in scores)
        return
    order = sorted(range(len(examples)), key=lambda index: examples[index].length)
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        for index, text in zip(indices, generate(loaded, [examples[i] for i in indices], settings), strict=True):
            texts[index] = text
        on_batch(len(indices))
    yield from ({"prediction": texts[index]} for index in range(len(examples)))


def generate(
    loaded: LoadedAdapter,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Generated texts of a batch; with `on_text` (one example) pieces are handed out as they come."""
    tokenizer, model = loaded.runtime.tokenizer, loaded.model
    batch = {name: tensor.to(loaded.device) for name, tensor in loaded.runtime.generation_batch(examples).items()}
    streamer = _Streamer(tokenizer, on_text) if on_text else None
    with loaded.inference():
        output = model.generate(**batch, generation_config=generation_config(loaded, settings), streamer=streamer)  # type: ignore[operator]
    answers = loaded.runtime.new_tokens(output, batch)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def generation_config(loaded: LoadedAdapter, settings: Mapping[str, Any]) -> GenerationConfig:
    """The config stored with the adapter, its recipe's settings, and those of this call."""
    tokenizer = loaded.runtime.tokenizer
    if (loaded.folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(str(loaded.folder))
    else:
        config = GenerationConfig.from_dict(loaded.model.generation_config.to_dict())  # type: ignore[union-attr, operator]
    merged = {"max_new_tokens": 256, "do_sample": False} | dict(loaded.facts.generation) | dict(settings)
    if not merged["do_sample"]:
        merged |= {"temperature": None, "top_p": None, "top_k": None}
    config.update(**merged)
    config.max_length = None
    config.pad_token_id = tokenizer.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    return config


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
    """Hands text out as soon as its tokens make whole words."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece is ready."""
        self.on_text(text)
