"""Which settings of a recipe cannot train where processes share out what the run holds; told before any of them starts."""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.methods import METHODS
from peftkit.recipe.findings import written
from peftkit.recipe.schema import Recipe

# Their updates look at each number alone, so that parts of a tensor can be stepped apart.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd")


def why_not_sharded(recipe: Recipe, kind: str) -> Iterator[tuple[str, str]]:
    """Keys of a recipe with what is wrong with them under `fsdp`, `zero1`, `zero2` or `zero3`; nothing under `ddp`."""
    if kind == "ddp":
        return
    zero, name = kind.startswith("zero"), "DeepSpeed" if kind.startswith("zero") else "FSDP"
    method, training, quantization = METHODS[recipe.adapter.method], recipe.training, recipe.model.quantization
    if training.optim not in ELEMENTWISE and (zero or method.stands_alone):
        what = f"`{training.optim}` looks at whole tensors, of which each process has a part under {name}"
        yield "training.optim", f"{what}; it takes {', '.join(ELEMENTWISE)} there"
    if zero and "fp16" in (training.mixed_precision, {"float16": "fp16"}.get(recipe.model.dtype)):
        yield "training.mixed_precision", "fp16 has a loss scale, which DeepSpeed keeps to itself; use bf16, or FSDP2"
    if zero and method.reads_gradients(recipe.adapter):
        what = f"`{method.name}` looks at gradients after each step, and DeepSpeed has let go of them then"
        yield "adapter.method", f"{what}; use FSDP2 or DDP"
    for key in written(recipe.evaluation, "generation_metrics", "samples") if kind in ("fsdp", "zero3") else ():
        what = f"answers are not generated while {name} shares the model out"
        yield f"evaluation.{key}", f"{what}; `peftkit evaluate` generates them after training"
    if quantization is not None and kind in ("fsdp", "zero3"):
        shares = kind == "fsdp" and quantization.bits == 4 and quantization.method == "bitsandbytes"
        if not shares:
            what = f"{name} cannot share these layers out"
            yield "model.quantization", f"{what}; under FSDP2 4 bits of bitsandbytes can be, under DDP all kinds are whole"
