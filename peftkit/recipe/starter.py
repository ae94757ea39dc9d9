"""The starter recipe that `peftkit init` writes: every key that is a choice, with its meaning as a comment."""

from __future__ import annotations

import textwrap

from peftkit.methods.base import Method
from peftkit.recipe.explain import KeyInfo, all_keys
from peftkit.tasks.base import Task

_MODELS = {
    "CAUSAL_LM": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "SEQ_2_SEQ_LM": "google/flan-t5-small",
    "SEQ_CLS": "embedded/all-MiniLM-L6-v2",
}
_ROWS = {
    "CAUSAL_LM": '{"instruction": "...", "output": "..."}   or   {"messages": [{"role": "user", "content": "..."}, ...]}',
    "SEQ_2_SEQ_LM": '{"source": "...", "target": "..."}',
    "SEQ_CLS": '{"text": "...", "label": "..."}',
}
_SHOWN = {
    "adapter": ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "init_lora_weights"),
    "data": ("max_length", "truncation", "train_on"),
    "training": (
        "learning_rate", "num_train_epochs", "batch_size", "micro_batch_size", "warmup_steps", "lr_scheduler_type",
        "gradient_checkpointing", "logging_steps", "seed",
    ),
    "generation": ("max_new_tokens", "do_sample"),
}  # fmt: skip
_VALUES = {"adapter.r": "8", "adapter.lora_alpha": "16", "adapter.target_modules": "all-linear", "data.max_length": "512"}


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
        *_section("adapter", keys, method.name),
        "data:",
        f"  # one row per line: {_ROWS[task.name]}",
        "  train: train.jsonl",
        "  validation: 0.1    # a fraction of train, or a path",
        *[line for line in _section("data", keys) if task.train_on or "train_on" not in line],
        "training:",
        *_section("training", keys),
    ]
    if task.generates:
        lines += ["generation:", *_section("generation", keys)]
    return "\n".join(lines) + "\n"


def _section(name: str, keys: dict[tuple[str, str], KeyInfo], method: str = "") -> list[str]:
    lines: list[str] = []
    for key in _SHOWN[name]:
        info = keys.get((f"{name}.{key}", method))
        if info is not None:
            lines += textwrap.wrap(info.description, 116, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(f"  {key}: {_VALUES.get(info.path, _yaml(info.default))}")
    return lines


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
