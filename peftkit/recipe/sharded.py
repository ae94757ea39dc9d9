"""Which settings of a recipe cannot train where processes share out what the run holds; told before any of them starts."""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.methods import METHODS
from peftkit.recipe.findings import written
from peftkit.recipe.schema import Recipe
from peftkit.tasks import TASKS

# Their updates look at each number alone, so that parts of a tensor can be stepped apart.
_SPLIT = "processes that share out tokens (parallelism_config_cp_size) lay rows end to end"

ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd")


def why_not_sharded(recipe: Recipe, kind: str) -> Iterator[tuple[str, str]]:
    """Keys of a recipe with what is wrong with them under `fsdp`, `zero1`, `zero2`, `zero3` or `tp`; nothing under `ddp`."""
    if kind == "ddp":
        return
    if kind in ("fsdp", "zero3", "tp"):
        for key in written(recipe.evaluation, "generation_metrics", "samples"):
            what = "answers are not generated while processes share the model out"
            yield f"evaluation.{key}", f"{what}; `peftkit evaluate` generates them after training"
    if kind == "tp":
        yield from _why_not_divided(recipe)
        return
    zero, name = kind.startswith("zero"), "DeepSpeed" if kind.startswith("zero") else "FSDP"
    method, training, quantization = METHODS[recipe.adapter.method], recipe.training, recipe.model.quantization
    if training.optim not in ELEMENTWISE and (zero or method.stands_alone):
        what = f"`{training.optim}` looks at whole tensors, of which each process has a part under {name}"
        yield "training.optim", f"{what}; it takes {', '.join(ELEMENTWISE)} there"
    if zero and _is_fp16(recipe):
        yield "training.mixed_precision", "fp16 has a loss scale, which DeepSpeed keeps to itself; use bf16, or FSDP2"
    if zero and method.reads_gradients(recipe.adapter):
        what = f"`{method.name}` looks at gradients after each step, and DeepSpeed has let go of them then"
        yield "adapter.method", f"{what}; use FSDP2 or DDP"
    if quantization is not None and kind in ("fsdp", "zero3"):
        shares = kind == "fsdp" and quantization.bits == 4 and quantization.method == "bitsandbytes"
        if not shares:
            what = f"{name} cannot share these layers out"
            yield "model.quantization", f"{what}; under FSDP2 4 bits of bitsandbytes can be, under DDP all kinds are whole"


def why_not_split(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that cannot be where processes share out the tokens of each row (context parallelism): it lays rows end to end."""
    method, training = METHODS[recipe.adapter.method], recipe.training
    if not TASKS[recipe.task].packs:
        yield (
            "task",
            f"a row of {recipe.task} is not shared out among processes (parallelism_config_cp_size); leave cp_size out",
        )
        return
    if reason := method.why_not_packed(recipe.adapter):
        yield "adapter.method", f"`{method.name}` with tokens shared out among processes (parallelism_config_cp_size): {reason}"
    if recipe.data is not None and recipe.data.packing is False:
        yield "data.packing", f"false: {_SPLIT}; leave it out, or say true"
    if recipe.model.attn_implementation not in (None, "sdpa"):
        yield "model.attn_implementation", f"`{recipe.model.attn_implementation}`: {_SPLIT} by sdpa attention"
    if not training.fast_paths:
        yield "training.fast_paths", f"false: {_SPLIT}, which is one of them"
    if training.torch_compile:
        yield "training.torch_compile", f"true: {_SPLIT}, for which layers are not compiled"
    if training.neftune_noise_alpha is not None:
        yield "training.neftune_noise_alpha", f"its noise depends on the length of a padded row, and {_SPLIT}"


def _is_fp16(recipe: Recipe) -> bool:
    return recipe.training.mixed_precision == "fp16" or recipe.model.dtype == "float16"


def _why_not_divided(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that cannot be where each layer is divided among processes."""
    method, training = METHODS[recipe.adapter.method], recipe.training
    if not method.divisible:
        can = ", ".join(name for name, other in METHODS.items() if other.divisible)
        yield "adapter.method", f"PEFT cannot divide `{method.name}` like the layers that it is in; it can: {can}"
    for name, info in type(recipe.adapter).model_fields.items():
        value = getattr(recipe.adapter, name)
        plain = value == info.get_default(call_default_factory=True) or (name == "init_lora_weights" and value == "gaussian")
        if method.divisible and name not in ("method", *method.divisible) and not plain:
            yield f"adapter.{name}", f"`{value}` needs whole layers, which are divided here (parallelism_config_tp_size)"
    if recipe.model.quantization is not None:
        yield "model.quantization", "quantised layers cannot be divided; leave one of the two out"
    if training.optim not in ELEMENTWISE:
        yield "training.optim", f"`{training.optim}` takes no layers that are divided; use one of {', '.join(ELEMENTWISE)}"
    if _is_fp16(recipe):
        yield "training.mixed_precision", "fp16 has a loss scale, which divided gradients do not go through; use bf16"
    if training.torch_compile:
        yield "training.torch_compile", "true: divided layers are not compiled; use false"
