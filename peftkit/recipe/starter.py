"""The starter recipe that `peftkit init` writes: every key that is a choice, with its meaning as a comment."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection

from peftkit.methods.base import Method
from peftkit.recipe.explain import KeyInfo, all_keys
from peftkit.tasks.base import Task
from peftkit.tasks.encoding import Encoding

_MODELS = {
    "CAUSAL_LM": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "SEQ_2_SEQ_LM": "google/flan-t5-small",
    "SEQ_CLS": "embedded/all-MiniLM-L6-v2",
    "TOKEN_CLS": "google-bert/bert-base-cased",
    "QUESTION_ANS": "distilbert/distilbert-base-uncased",
    "FEATURE_EXTRACTION": "embedded/all-MiniLM-L6-v2",
}
_ROWS = {
    "CAUSAL_LM": '{"instruction": "...", "output": "..."}   or   {"messages": [{"role": "user", "content": "..."}, ...]}',
    "SEQ_2_SEQ_LM": '{"source": "...", "target": "..."}',
    "SEQ_CLS": '{"text": "...", "label": "..."}',
    "TOKEN_CLS": '{"tokens": ["Ada", "lives", "here"], "tags": ["B-PER", "O", "O"]}',
    "QUESTION_ANS": '{"question": "...", "context": "...", "answers": {"text": ["..."], "answer_start": [0]}}',
    "FEATURE_EXTRACTION": '{"anchor": "...", "positive": "..."}   or   {"text": "...", "text_pair": "...", "score": 0.8}',
}
_SHOWN = {
    "data": ("max_length", "truncation", "train_on"),
    "training": (
        "learning_rate", "num_train_epochs", "batch_size", "micro_batch_size", "warmup_steps", "lr_scheduler_type",
        "gradient_checkpointing", "logging_steps", "seed",
    ),
    "generation": ("max_new_tokens", "do_sample"),
    "embedding": ("pooling", "normalize", "loss"),
}  # fmt: skip
_VALUES = {"data.max_length": "512"}
# What nearly every method has and few recipes change; the fields before and after it are the method's own.
_COMMON = {
    "method", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias", "init_weights",
    "rank_pattern", "alpha_pattern",
}  # fmt: skip
_NUM_FIELDS = 6


def starter_recipe(task: Task, method: Method, model: str | None) -> str:
    """The text of a valid recipe for this task and method; its data file is for the user to write."""
    keys = {(info.path, info.method): info for info in all_keys()}
    lines = [
        "# A peftkit recipe. `peftkit explain KEY` tells more of a key, `peftkit schema` all of them.",
        f"task: {task.name}    # {task.summary}",
        "model:",
        f"  name_or_path: {model or _MODELS[task.name]}    # hub id or local folder",
        "adapter:",
        f"  method: {method.name}    # {method.summary}",
        *_adapter(method, keys),
        "data:",
        f"  # one row per line: {_ROWS[task.name]}" + ', each with a "task_id": "..."' * bool(method.num_tasks_field),
        "  train: train.jsonl",
        "  validation: 0.1    # a fraction of train, or a path",
        *_section("data", keys, leave_out=_without_effect(task)),
        "training:",
        *_section("training", keys),
    ]
    if task.generates:
        lines += ["generation:", *_section("generation", keys)]
    if "embedding" in task.own_keys:
        lines += ["embedding:", *_section("embedding", keys)]
    return "\n".join(lines) + "\n"


def _without_effect(task: Task) -> set[str]:
    return {*task.idle_keys(Encoding(max_length=1)), *(() if task.train_on else ("data.train_on",))}


def _adapter(method: Method, keys: dict[tuple[str, str], KeyInfo]) -> list[str]:
    own = [name for name in method.section.model_fields if name not in _COMMON]
    lines: list[str] = []
    for name in dict.fromkeys([*method.starter, *own[:_NUM_FIELDS]]):
        info = keys[(f"adapter.{name}", method.name)]
        lines += _key(name, info, method.starter.get(name, _yaml(info.default)))
    return lines


def _section(name: str, keys: dict[tuple[str, str], KeyInfo], *, leave_out: Collection[str] = ()) -> list[str]:
    lines: list[str] = []
    for key in _SHOWN[name]:
        info = keys.get((f"{name}.{key}", ""))
        if info is not None and info.path not in leave_out:
            lines += _key(key, info, _VALUES.get(info.path, _yaml(info.default)))
    return lines


def _key(name: str, info: KeyInfo, value: str) -> list[str]:
    return [*textwrap.wrap(info.description, 116, initial_indent="  # ", subsequent_indent="  # "), f"  {name}: {value}"]


def _yaml(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | list | dict) else str(value)
