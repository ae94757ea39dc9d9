"""Answers in the task's own form: generated text, or what the task makes of the model's outputs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, TextStreamer
from transformers.generation.configuration_utils import GenerationMode

from peftkit.engine.data import encode_rows
from peftkit.engine.decode import Decoder
from peftkit.engine.evaluate import score_examples
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.rows import with_system_prompt
from peftkit.engine.step import Step
from peftkit.engine.store import answering_config
from peftkit.errors import DataError
from peftkit.formats import FORMATS, detect_format
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.tasks.example import Example

Answer = dict[str, Any]

STATIC_FROM_TOKENS = 50_000  # tokens to generate from which a GPU's compiler is waited for (about a minute)
_OWN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_GPU_INTERVAL = 4  # tokens between two looks at which rows have ended


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
    loaded: LoadedAdapter, rows: Sequence[tuple[str, CanonicalRow]], settings: Mapping[str, Any], batch_size: int
) -> Iterator[Answer]:
    """One answer per row, in order.

    Args:
        loaded: the adapter.
        rows: origin and canonical row.
        settings: generation settings; those of the recipe where empty.
        batch_size: rows per forward pass.
    """
    examples = encode_prompts(loaded, rows)
    answers: dict[int, Answer] = {}
    for batch in answer_batches(loaded, examples, settings, batch_size=batch_size):
        answers |= batch
    yield from (answers[index] for index in range(len(examples)))


def encode_prompts(loaded: LoadedAdapter, rows: Sequence[tuple[str, CanonicalRow]]) -> list[Example]:
    """Rows to answer as token ids.

    Raises:
        DataError: a row is longer than the model can take.
    """
    examples = encode_rows(loaded.prompts, rows, "the input", target=False)
    if len(examples) != len(rows):
        raise DataError(f"{len(rows) - len(examples)} rows are longer than {loaded.runtime.settings.max_length} tokens")
    return examples


def answer_batches(
    loaded: LoadedAdapter,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[dict[int, Answer]]:
    """Answers by the numbers of their rows, a batch at a time; rows of like length share a batch.

    Args:
        loaded: the adapter.
        examples: rows to answer.
        settings: generation settings; those of the recipe where empty.
        batch_size: rows per forward pass.
        done: rows that need no answer.
    """
    if loaded.method is not None and loaded.method.rows_interact:
        batch_size = 1
    # The longest first: memory that does not suffice shows at once.
    left = [number for number in range(len(examples)) if number not in done]
    order = sorted(left, key=lambda number: -examples[number].length)
    config = generation_config(loaded, settings, len(order)) if loaded.task.generates else None
    most = config.max_new_tokens if config is not None else 0
    # Rows without room for a whole answer share a batch with those of as much room alone: no answer depends on another row.
    rooms = {number: min(most, loaded.room_after(examples[number].length)) if most else 0 for number in order}
    groups = [list(group) for _, group in itertools.groupby(order, key=rooms.__getitem__)]
    for numbers in (group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)):
        chosen = [examples[number] for number in numbers]
        if config is not None:
            answers = [{"prediction": text} for text in generate(loaded, chosen, config)]
        else:
            answers = predict(loaded, chosen)
        yield dict(zip(numbers, answers, strict=True))


def note_of_room(loaded: LoadedAdapter, examples: Sequence[Example], settings: Mapping[str, Any]) -> str | None:
    """Which answers can be cut short because the model has no positions for all the new tokens that are asked for."""
    if not loaded.task.generates:
        return None
    most = generation_config(loaded, settings).max_new_tokens
    short = [example for example in examples if loaded.room_after(example.length) < most]
    if not short:
        return None
    longest = max(short, key=lambda example: example.length)
    return (
        f"note: max_new_tokens is {most}, and the model has no room for so many after {len(short)} of "
        f"{len(examples)} prompts: their answers end at the last one ({longest.origin}: after "
        f"{loaded.room_after(longest.length)} tokens)"
    )


def predict(loaded: LoadedAdapter, examples: Sequence[Example]) -> list[Answer]:
    """What a task that writes nothing makes of a batch."""
    with loaded.inference():
        step = Step(loaded.model, loaded.runtime)
        results = score_examples(step, examples, batch_size=len(examples), device=loaded.device)
    return list(map(loaded.runtime.answer, results))


def generate(
    loaded: LoadedAdapter,
    examples: Sequence[Example],
    config: GenerationConfig,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Generated texts of a batch; with `on_text` (one example) pieces are handed out as they come."""
    tokenizer, model = loaded.runtime.tokenizer, loaded.model
    config = copy.deepcopy(config)
    config.max_new_tokens = min(config.max_new_tokens, loaded.room_after(max(example.length for example in examples)))
    batch = {name: tensor.to(loaded.device) for name, tensor in loaded.runtime.generation_batch(examples).items()}
    streamer = _Streamer(tokenizer, on_text) if on_text else None
    # transformers' own loop hands out pieces, and suits a static cache, whose compiled kernels want batches of one size.
    own_loop = config.get_generation_mode() in _OWN_MODES and config.cache_implementation is None and streamer is None
    decoder = {"custom_generate": _decoder(loaded, batch)} if own_loop else {}
    with loaded.inference():
        output = model.generate(**batch, generation_config=config, streamer=streamer, **decoder)  # type: ignore[operator]
    answers = loaded.runtime.new_tokens(output, batch)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _decoder(loaded: LoadedAdapter, batch: Mapping[str, Any]) -> Decoder:
    """The loop for a batch; rows stay to the end where the adapter holds something for each of them by its place."""
    adapter = getattr(loaded.model, "active_peft_config", None)
    by_place = "task_ids" in batch or getattr(adapter, "alora_invocation_tokens", None) is not None
    return Decoder(drops=not by_place, interval=1 if loaded.device.type == "cpu" else _GPU_INTERVAL)


def generation_config(loaded: LoadedAdapter, settings: Mapping[str, Any], num_rows: int = 1) -> GenerationConfig:
    """The config stored with the adapter, its recipe's settings, and those of this call, which is about so many rows."""
    tokenizer = loaded.runtime.tokenizer
    if (loaded.folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(str(loaded.folder))
    else:
        config = answering_config(loaded.model, tokenizer)
    merged = {"max_new_tokens": 256, "do_sample": False} | dict(loaded.facts.generation) | dict(settings)
    if not merged["do_sample"]:
        merged |= {"temperature": None, "top_p": None, "top_k": None}
    cache = merged.pop("cache_implementation", "auto")
    config.update(**merged)
    config.cache_implementation = "static" if _wants_static(loaded, config, cache, num_rows) else None
    config.max_length = None
    config.pad_token_id = tokenizer.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    return config


def _wants_static(loaded: LoadedAdapter, config: GenerationConfig, cache: str, num_rows: int) -> bool:
    """Whether keys and values get their place in advance, so that transformers compiles the model where there is a GPU."""
    if cache != "auto":
        return cache == "static"
    model: Any = loaded.model
    is_able = loaded.method is not None and not loaded.method.why_not_static and bool(model._can_compile_fullgraph)
    is_long: bool = num_rows * config.max_new_tokens >= STATIC_FROM_TOKENS
    return loaded.device.type == "cuda" and is_able and is_long and config.num_beams == 1


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
    """Hands text out as soon as its tokens make whole words."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece is ready."""
        self.on_text(text)
