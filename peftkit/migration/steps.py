"""Steps that several tools share: settings that follow from several of their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peftkit.migration.base import Draft, is_on, listed
from peftkit.migration.ours import names_of
from peftkit.recipe.yaml_file import parse_yaml

OPTIMIZERS: Mapping[str, str] = {
    **{name: name for name in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor")},
    **{name: name for name in ("adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit")},
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_torch_xla": "adamw_torch",
    "adamw_torch_npu_fused": "adamw_torch_fused",
    "adamw_torch_8bit": "adamw_bnb_8bit",
    "ao_adamw_8bit": "adamw_bnb_8bit",
}
SCHEDULES: Mapping[str, str] = {
    **{name: name for name in names_of("training", "lr_scheduler_type")},
    "cosine_warmup_with_min_lr": "cosine_with_min_lr",
}
TRACKERS, KERNELS = names_of("output", "report_to"), names_of("model", "attn_implementation")
BATCH = "rows of a whole step over all devices; on N devices theirs is N times as much, so multiply it by N for the same step"
_LOSS = ("loss", "eval_loss")


def batch(draft: Draft, micro: str, accumulation: str, default: int, devices: int = 1) -> None:
    """Rows per step from rows per device, accumulation and devices."""
    per_device, accumulated = draft.number(micro, default), draft.number(accumulation, 1)
    whole = per_device * accumulated * devices
    why = BATCH if devices == 1 else f"{per_device} x {accumulated} x {devices} devices"
    draft.put("training.batch_size", whole, micro, accumulation, why=why)
    draft.add("training.batch_size", whole)
    draft.put("training.micro_batch_size", per_device, micro)


def length_of_run(draft: Draft, epochs: str) -> None:
    """Steps where they are limited, else passes over the rows."""
    steps = draft.number("max_steps", -1)
    if steps > 0:
        draft.put("training.max_steps", int(steps), "max_steps")
        draft.drop(epochs, "has no effect beside max_steps, there and here")
    else:
        draft.drop("max_steps", "is no limit")
        if draft.get(epochs) is not None:
            draft.put("training.num_train_epochs", draft.get(epochs), epochs)
    norm = draft.number("max_grad_norm", 1.0)
    draft.put("training.max_grad_norm", norm if norm > 0 else None, "max_grad_norm")


def optimizer(draft: Draft, key: str) -> None:
    """The optimizer, or the nearest that there is."""
    if draft.is_on("adafactor"):
        draft.put("training.optim", "adafactor", "adafactor")
    name = draft.get(key)
    if name is None:
        return
    ours = OPTIMIZERS.get(str(name))
    if ours is None:
        draft.drop(
            key, f"`{name}` is no optimizer here; adamw_torch_fused is taken, which needs another learning rate", "no_equal"
        )
    elif ours == "adamw_bnb_8bit" and str(name) not in (ours, "adamw_8bit"):
        draft.put("training.optim", ours, key, why=f"{name} is torchao's; the 8-bit Adam here is bitsandbytes'")
    else:
        draft.put("training.optim", ours, key)


def schedule(draft: Draft, key: str) -> None:
    """Learning rate over time: the schedule, its arguments, and the warm-up."""
    name = str(draft.get(key, ""))
    if name:
        ours = SCHEDULES.get(name)
        if ours is None:
            draft.drop(key, f"`{name}` is no schedule here; linear is taken", "no_equal")
        else:
            draft.put("training.lr_scheduler_type", ours, key)
    kwargs = draft.get("lr_scheduler_kwargs", {})
    if isinstance(kwargs, str):  # of a command line
        kwargs = parse_yaml(f"kwargs: {kwargs}".encode(), draft.config.where("lr_scheduler_kwargs"))[0]["kwargs"]
    if isinstance(kwargs, dict) and kwargs:
        draft.put("training.lr_scheduler_kwargs", kwargs, "lr_scheduler_kwargs")
    _warmup(draft)


def _warmup(draft: Draft) -> None:
    steps, ratio = draft.number("warmup_steps", 0), draft.number("warmup_ratio", 0)
    key, value = ("warmup_steps", steps) if steps else ("warmup_ratio", ratio)
    for name in ("warmup_steps", "warmup_ratio"):
        if name != key:
            draft.drop(name, f"has no effect beside {key}" if value else "there is no warm-up")
    if not value:
        draft.drop(key, "there is no warm-up")
    elif draft.value("training.lr_scheduler_type") == "constant":
        draft.drop(key, "has no effect with a constant learning rate, there and here")
    else:
        draft.put("training.warmup_steps", value, key, why="below 1 it is a fraction of all steps" if "ratio" in key else "")


def precision(draft: Draft) -> None:
    """Types of weights and computation from bf16 and fp16."""
    for key, kind, dtype in (("bf16", "bf16", "bfloat16"), ("fp16", "fp16", "float16")):
        value = draft.get(key)
        if value == "auto":
            draft.drop(key, "`auto` is what peftkit does: bf16 where the GPU has it")
        elif is_on(value):
            draft.put("training.mixed_precision", kind, key)
            draft.add("model.dtype", dtype, f"{draft.tool.title} loads the base so with {key}")
        elif key in draft.config.values:
            draft.drop(key, "is off")
    if draft.value("training.mixed_precision") is None and draft.get("bf16") is False and not draft.is_on("fp16"):
        draft.put("training.mixed_precision", "no", "bf16")


def evaluation(draft: Draft, batch_size: str) -> None:
    """When to evaluate and what to keep, where there are rows to evaluate on."""
    keys = ("eval_strategy", "evaluation_strategy", "eval_steps", "eval_on_start", batch_size, "load_best_model_at_end")
    if "data.validation" not in draft.entries:
        for key in (*keys, "metric_for_best_model"):
            draft.drop(key, "has no effect without rows to evaluate on")
        return
    if draft.get(batch_size) is not None:
        draft.put("evaluation.batch_size", draft.get(batch_size), batch_size)
    for key in ("eval_on_start", "load_best_model_at_end"):
        if draft.get(key) is not None:
            draft.put(f"training.{key}", draft.is_on(key), key)
    draft.add("training.load_best_model_at_end", False)
    _eval_steps(draft)
    metric = draft.get("metric_for_best_model")
    if str(metric) in _LOSS:
        draft.drop("metric_for_best_model", "the loss decides here too")
    elif metric is not None:
        draft.drop("metric_for_best_model", f"`{metric}` is no metric here; the loss decides", "no_equal")


def _eval_steps(draft: Draft) -> None:
    key = "eval_strategy" if "eval_strategy" in draft.config.values else "evaluation_strategy"
    strategy, steps = draft.get(key), draft.get("eval_steps")
    if strategy in (None, "steps") and steps is not None:
        _every(draft, "eval_steps", "training.eval_steps")
        draft.drop(key, "follows from training.eval_steps")
    elif strategy == "steps":
        why = "left out, eval_steps is logging_steps there"
        draft.put("training.eval_steps", draft.get("logging_steps", draft.tool.logging_steps), key, why=why)
    elif strategy == "epoch":
        draft.drop(key, "is when peftkit evaluates")
    elif strategy is not None:
        draft.drop(key, "with validation rows, peftkit evaluates at the end of each epoch", "changed")
    if "eval_steps" not in draft.notes:
        draft.drop("eval_steps", f"has no effect with {key}: {strategy}")


def _every(draft: Draft, key: str, ours: str, otherwise: str = "it happens at the end of each epoch here") -> None:
    value = draft.get(key)
    if isinstance(value, int) and value > 0:
        draft.put(ours, value, key)
    else:
        draft.drop(key, f"`{value}` is no whole number of steps; {otherwise}", "changed")


def saving(draft: Draft) -> None:
    """When checkpoints are written, and lines of the log."""
    strategy = draft.get("save_strategy")
    if draft.get("save_steps") is not None and strategy in (None, "steps"):
        _every(draft, "save_steps", "training.save_steps")
    else:
        draft.drop("save_steps", f"has no effect with save_strategy: {strategy}")
    if strategy in ("steps", "epoch"):
        draft.drop(
            "save_strategy", "follows from training.save_steps; left out, checkpoints are written at the end of each epoch"
        )
    elif strategy is not None:
        draft.drop("save_strategy", "a run always has checkpoints, at the end of each epoch", "changed")
    if draft.get("logging_steps") is not None:
        _every(draft, "logging_steps", "training.logging_steps", "a line is written every 10 steps here")


def trackers(draft: Draft) -> None:
    """Trackers that there are here too."""
    named = [name for name in listed(draft.get("report_to", [])) if name not in ("none", "all")]
    known, others = [name for name in named if name in TRACKERS], [name for name in named if name not in TRACKERS]
    if known:
        draft.put("output.report_to", known, "report_to", why=f"{', '.join(others)} cannot be had here" if others else "")
    elif others:
        draft.drop("report_to", f"{', '.join(others)} cannot be had here; {', '.join(TRACKERS)} can", "no_equal")
    else:
        draft.drop("report_to", "no tracker gets the metrics")


def launch(draft: Draft) -> None:
    """The launch file of ours for their DeepSpeed or FSDP settings."""
    deepspeed = draft.get("deepspeed")
    if deepspeed is not None:
        stage = "2" if re.search(r"(zero|z|stage|stage\W+)_?[012](?!\d)", str(deepspeed)) else "3"
        launched(draft, "deepspeed", f"configs/deepspeed_zero{stage}.yaml")
    for key in ("fsdp", "fsdp_config"):
        if is_on(draft.get(key)):
            quantized = "_qlora" if "model.quantization" in draft.entries else ""
            launched(draft, key, f"configs/fsdp2{quantized}.yaml")
        else:
            draft.drop(key, "is off")


def launched(draft: Draft, key: str, file: str) -> None:
    """Note that a launch file of ours says what this key of theirs does."""
    draft.launch = draft.launch or file
    draft.drop(key, f"a launch file says it here: `peftkit train RECIPE --launch {file}`", "changed")


def checkpointing(draft: Draft, key: str) -> None:
    """Whether layers are computed again in the backward pass."""
    value = draft.get(key)
    if value in ("offload", "offload_disk"):
        draft.put(
            "training.gradient_checkpointing", True, key, why="what is kept stays on the GPU; `activation_offloading` moves it"
        )
    elif value is not None:
        draft.put("training.gradient_checkpointing", is_on(value), key)


def attention(draft: Draft, key: str) -> None:
    """The attention kernel, where there is the same."""
    wanted = draft.get(key)
    if wanted is None:
        return
    if str(wanted) in KERNELS:
        draft.put("model.attn_implementation", str(wanted), key)
    else:
        draft.drop(key, f"`{wanted}` cannot be had here; transformers picks what fits the model", "no_equal")


def lora_targets(value: Any, everything: str) -> Any:
    """Their target modules as ours: `all-linear`, a list, or a regular expression as it is."""
    names = listed(value)
    if everything in names or "all-linear" in names:
        return "all-linear"
    is_pattern = isinstance(value, str) and any(mark in value for mark in "^$*()[]\\|")
    return value if is_pattern else names
