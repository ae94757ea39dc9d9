"""The starter recipe that `peftkit init` writes: every key that is a choice, with its meaning as a comment."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from peftkit.methods.base import Method
from peftkit.recipe.explain import KeyInfo, all_keys
from peftkit.recipe.yaml_file import parse_scalar
from peftkit.tasks.base import Task
from peftkit.tasks.encoding import Encoding

# Small ones to begin with: task -> (hub id, what it is); the first is the default.
MODELS = {
    "CAUSAL_LM": (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "135M parameters, English"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "494M parameters, many languages"),
        ("Qwen/Qwen2.5-7B-Instruct", "7.6B parameters, many languages, needs a GPU"),
    ),
    "SEQ_2_SEQ_LM": (
        ("google/flan-t5-small", "77M parameters, English, German, French and others"),
        ("google/mt5-small", "300M parameters, 101 languages"),
    ),
    "SEQ_CLS": (
        ("embedded/all-MiniLM-L6-v2", "23M parameters, English, comes by pip"),
        ("google-bert/bert-base-uncased", "110M parameters, English"),
        ("FacebookAI/xlm-roberta-base", "278M parameters, 100 languages"),
        ("google-bert/bert-base-chinese", "102M parameters, Chinese"),
    ),
    "TOKEN_CLS": (
        ("google-bert/bert-base-cased", "108M parameters, English"),
        ("FacebookAI/xlm-roberta-base", "278M parameters, 100 languages"),
        ("google-bert/bert-base-chinese", "102M parameters, Chinese"),
    ),
    "QUESTION_ANS": (
        ("distilbert/distilbert-base-uncased", "66M parameters, English"),
        ("FacebookAI/xlm-roberta-base", "278M parameters, 100 languages"),
    ),
    "FEATURE_EXTRACTION": (
        ("embedded/all-MiniLM-L6-v2", "23M parameters, English, comes by pip"),
        ("BAAI/bge-small-en-v1.5", "33M parameters, English"),
        ("intfloat/multilingual-e5-small", "118M parameters, 100 languages"),
    ),
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
# What nearly every method has and few recipes change; the fields before and after it are the method's own.
_COMMON = {
    "method", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias", "init_weights",
    "rank_pattern", "alpha_pattern",
}  # fmt: skip
_NUM_FIELDS = 6


@dataclass(frozen=True)
class StarterData:
    """The rows that a new recipe names, each source as its path and, of a saved dataset, its split.

    Attributes:
        train: rows to learn from.
        format: of all rows; empty: left to `auto`.
        columns: our names -> those in the files, where they differ.
        validation: a fraction of train, or a source; None: no validation.
        test: a source; None without.
    """

    train: tuple[str, str] = ("train.jsonl", "")
    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    validation: float | tuple[str, str] | None = 0.1
    test: tuple[str, str] | None = None


def starter_recipe(
    task: Task, method: Method, model: str | None, data: StarterData | None = None, max_length: int = 512
) -> str:
    """The text of a valid recipe for this task and method; without `data` its rows are for the user to write.

    Args:
        task: what is learned.
        method: how.
        model: hub id or folder; None: the first of MODELS.
        data: the rows.
        max_length: longest example in tokens.
    """
    keys = {(info.path, info.method): info for info in all_keys()}
    tasks_column = ', each with a "task_id": "..."' * bool(method.num_tasks_field)
    expected = [] if data else [f"  # one row per line: {_ROWS[task.name]}{tasks_column}"]
    lines = [
        "# A peftkit recipe. `peftkit explain KEY` tells more of a key, `peftkit schema` all of them.",
        f"task: {task.name}    # {task.summary}",
        "model:",
        f"  name_or_path: {_text(model or MODELS[task.name][0][0])}    # hub id or local folder",
        "adapter:",
        f"  method: {method.name}    # {method.summary}",
        *_adapter(method, keys),
        "data:",
        *expected,
        *_sources(data or StarterData()),
        *_section("data", keys, {"max_length": str(max_length)}, leave_out=_without_effect(task)),
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


def _sources(data: StarterData) -> list[str]:
    """The keys that say where rows are."""
    lines = _source("train", data.train, data)
    if isinstance(data.validation, tuple):
        lines += _source("validation", data.validation, data)
    elif data.validation is None:
        lines += ["  # validation: 0.1    # a fraction of train, or a path; there are too few rows for it"]
    else:
        lines += [f"  validation: {data.validation}    # a fraction of train, or a path"]
    return lines + (_source("test", data.test, data) if data.test else [])


def _source(name: str, source: tuple[str, str], data: StarterData) -> list[str]:
    path, split = source
    if not data.format:
        return [f"  {name}: {_text(path)}"]
    lines = [f"  {name}:", f"    path: {_text(path)}", f"    format: {data.format}"]
    lines += [f"    split: {_text(split)}"] if split else []
    columns = ", ".join(f"{ours}: {_text(theirs)}" for ours, theirs in data.columns.items())
    return lines + ([f"    columns: {{{columns}}}    # our names: those in the file"] if columns else [])


def _text(value: str) -> str:
    """A text as YAML, in quotes where it needs them; JSON's are YAML's too (YAML 1.2, section 1.3)."""
    is_plain = re.fullmatch(r"[\w./~][\w./~*-]*", value, re.ASCII) is not None and isinstance(parse_scalar(value), str)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _section(
    name: str,
    keys: dict[tuple[str, str], KeyInfo],
    values: Mapping[str, str] = MappingProxyType({}),
    *,
    leave_out: Collection[str] = (),
) -> list[str]:
    lines: list[str] = []
    for key in _SHOWN[name]:
        info = keys.get((f"{name}.{key}", ""))
        if info is not None and info.path not in leave_out:
            lines += _key(key, info, values.get(key, _yaml(info.default)))
    return lines


def _key(name: str, info: KeyInfo, value: str) -> list[str]:
    return [*textwrap.wrap(info.description, 116, initial_indent="  # ", subsequent_indent="  # "), f"  {name}: {value}"]


def _yaml(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool | list | dict) else str(value)
