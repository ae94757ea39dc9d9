"""The plan: a recipe with every `auto` decided for one machine. Pure and torch-free: facts in, decisions out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import Problem, RecipeError
from peftkit.methods import METHODS
from peftkit.methods.base import Method
from peftkit.recipe import LoadedRecipe, Recipe
from peftkit.recipe.quantization import Quantization, stated_quantization, trains_biases
from peftkit.tasks import TASKS
from peftkit.tasks.base import Task

Precision = Literal["no", "bf16", "fp16"]
RowLayout = Literal["padded", "packed", "end_to_end"]
MICRO_BATCH = "training.micro_batch_size"
MAX_AUTO_MICRO_BATCH = 8


@dataclass(frozen=True)
class Hardware:
    """What `auto` is decided on.

    Attributes:
        device: torch device type.
        device_name: for people.
        supports_bf16: whether the device computes in bfloat16 natively.
        memory_bytes: memory of the device (of the machine, for cpu).
        num_processes: processes among which rows are shared out.
        divided_by: processes that divide each layer and have the same rows.
        cp_size: processes that share out the tokens of each row.
    """

    device: Literal["cpu", "cuda", "mps"]
    device_name: str
    supports_bf16: bool
    memory_bytes: int
    num_processes: int = 1
    divided_by: int = 1
    cp_size: int = 1


@dataclass(frozen=True)
class Choice:
    """One decision that the recipe left open: key, value and the reason."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """A recipe and every decision for this machine.

    Attributes:
        recipe: the recipe.
        recipe_dir: folder that relative paths are looked up in first.
        hardware: what the decisions are for.
        dtype: dtype of the frozen weights.
        mixed_precision: autocast, in accelerate's words.
        micro_batch_size: sequences per process and forward pass.
        learning_rate: peak learning rate.
        choices: the decisions with their reasons.
        rows: how the rows of a pass are laid out: padded to one length, packed into sequences of max_length, or all of them
            end to end in one sequence; decided when the model's modules are known.
        quantization: how the base's linear layers are quantised; None: they are not.
    """

    recipe: Recipe
    recipe_dir: Path
    hardware: Hardware
    dtype: Literal["float32", "bfloat16", "float16"]
    mixed_precision: Precision
    micro_batch_size: int
    learning_rate: float
    choices: tuple[Choice, ...] = field(default=())
    rows: RowLayout = "padded"
    quantization: Quantization | None = None

    @property
    def task(self) -> Task:
        """The task's facts."""
        return TASKS[self.recipe.task]

    @property
    def method(self) -> Method:
        """The method's facts."""
        return METHODS[self.recipe.adapter.method]

    def decides(self, key: str) -> bool:
        """Whether the recipe leaves a key of `section.name` open."""
        section, _, name = key.partition(".")
        return bool(getattr(getattr(self.recipe, section), name) == "auto")

    @property
    def keeps_best(self) -> bool:
        """Whether the best adapter is kept rather than the last."""
        wanted = self.recipe.training.load_best_model_at_end
        has_validation = self.recipe.data is not None and self.recipe.data.validation is not None
        return has_validation if wanted is None else wanted


def with_micro_batch(plan: Plan, size: int, reason: str) -> Plan:
    """The plan with another decision on `training.micro_batch_size`."""
    others = tuple(choice for choice in plan.choices if choice.key != MICRO_BATCH)
    return dataclasses.replace(plan, micro_batch_size=size, choices=(*others, Choice(MICRO_BATCH, size, reason)))


def make_plan(loaded: LoadedRecipe, hardware: Hardware) -> Plan:
    """Decide everything that the recipe leaves open.

    Raises:
        RecipeError: settings that this machine cannot follow.
    """
    recipe, training = loaded.recipe, loaded.recipe.training
    problems = [loaded.problem(key, what) for key, what in _machine_problems(recipe, hardware)]
    if problems:
        raise RecipeError(problems)
    dtype, choices = _choose_dtype(recipe, hardware)
    precision = training.mixed_precision
    if precision == "auto":
        precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype]  # type: ignore[assignment]
        choices.append(Choice("training.mixed_precision", precision, f"the weights are {dtype}"))
    micro = training.micro_batch_size
    if micro == "auto":
        micro = max(1, min(MAX_AUTO_MICRO_BATCH, training.batch_size // hardware.num_processes))
        reason = f"at most {MAX_AUTO_MICRO_BATCH}, and {training.batch_size} over {hardware.num_processes} process(es)"
        choices.append(Choice(MICRO_BATCH, micro, reason))
    rate = training.learning_rate
    if rate == "auto":
        rate, source = METHODS[recipe.adapter.method].learning_rate_for(recipe.task)
        choices.append(Choice("training.learning_rate", rate, source))
    plan = Plan(recipe, loaded.path.parent, hardware, dtype, precision, micro, rate, tuple(choices))  # type: ignore[arg-type]
    return quantized(plan, stated_quantization(recipe))


_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def quantized(plan: Plan, quantization: Quantization | None) -> Plan:
    """The plan on a base that is quantised like this, the dtype of its products decided.

    Raises:
        RecipeError: this machine or these settings cannot follow.
    """
    if quantization is None:
        return plan
    before = plan.quantization.computes_in if plan.quantization is not None else None
    stated, choices = quantization.compute_dtype, plan.choices
    if quantization.computes_in == "auto":
        dtype, reason = _choose_compute_dtype(plan)
        quantization = dataclasses.replace(quantization, compute_dtype=dtype)
        if before is None:
            choices = (*choices, Choice("model.quantization.compute_dtype", dtype, reason))
    if problems := list(_quantization_problems(plan, quantization, stated)):
        raise RecipeError([Problem("", key, what) for key, what in problems])
    plan = dataclasses.replace(plan, quantization=quantization, choices=choices)
    return _in_float16(plan) if quantization.method == "awq" and plan.hardware.device == "cuda" else plan


def _in_float16(plan: Plan) -> Plan:
    """The plan with float16 where it was free to take bfloat16: transformers (5.23) loads AWQ in no bfloat16 on a GPU."""
    decided = {"model.dtype": "float16", "training.mixed_precision": "fp16"}
    found = {"model.dtype": plan.dtype, "training.mixed_precision": plan.mixed_precision}
    taken = {key: value for key, value in decided.items() if found[key] in ("bfloat16", "bf16")}
    free = {choice.key for choice in plan.choices}
    if stated := [key for key in taken if key not in free]:
        what = "AWQ layers know no bfloat16 on a GPU, and would be loaded in float16"
        raise RecipeError([Problem("", key, f"is {found[key]}, but {what}; use {taken[key]}") for key in stated])
    choices = [choice for choice in plan.choices if choice.key not in taken]
    choices += [Choice(key, value, "AWQ layers know no bfloat16 on a GPU") for key, value in taken.items()]
    final: dict[str, Any] = found | taken
    dtype, precision = final["model.dtype"], final["training.mixed_precision"]
    return dataclasses.replace(plan, dtype=dtype, mixed_precision=precision, choices=tuple(choices))


def _choose_compute_dtype(plan: Plan) -> tuple[str, str]:
    if trains_biases(plan.method, plan.recipe.adapter):
        return "float32", "biases are trained, which quantised layers round to it"
    if plan.mixed_precision != "no":
        return _DTYPES[plan.mixed_precision], f"training.mixed_precision is {plan.mixed_precision}"
    return plan.dtype, f"the other weights are {plan.dtype}"


def _quantization_problems(plan: Plan, quantization: Quantization, stated: str) -> Iterator[tuple[str, str]]:
    device, dtype = plan.hardware.device, quantization.computes_in
    if device == "mps":
        yield "model.quantization", "quantised layers work on CUDA GPUs and CPUs only, this machine has neither in use"
    if dtype == "float16" and device == "cpu":
        yield "model.quantization.compute_dtype", "float16 needs a GPU, this machine has none; use bfloat16 or float32"
    if dtype == "bfloat16" and device == "cuda" and not plan.hardware.supports_bf16:
        yield "model.quantization.compute_dtype", f"{plan.hardware.device_name} has no bfloat16; use float16"
    if not trains_biases(plan.method, plan.recipe.adapter):
        return
    what = "biases are trained, which quantised layers round to the type that they compute in"
    if dtype not in (None, "float32"):
        yield "model.quantization.compute_dtype", f"is {stated}, but {what}; use float32"
    if quantization.layers == "8bit" and (plan.mixed_precision, plan.dtype) != ("no", "float32"):
        yield "model.quantization.bits", f"{what}: 8 bits need `dtype: float32` and `mixed_precision: no` here; or use 4 bits"


def _choose_dtype(recipe: Recipe, hardware: Hardware) -> tuple[Any, list[Choice]]:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype, []
    if METHODS[recipe.adapter.method].stands_alone:
        return "float32", [Choice("model.dtype", "float32", "every weight is trained: small updates are lost in 16 bits")]
    if recipe.training.mixed_precision == "fp16":
        return "float16", [Choice("model.dtype", "float16", "training.mixed_precision is fp16")]
    if hardware.device == "cuda" and hardware.supports_bf16 and recipe.training.mixed_precision in ("auto", "bf16"):
        return "bfloat16", [Choice("model.dtype", "bfloat16", f"{hardware.device_name} computes in bfloat16")]
    reason = f"exact, and {hardware.device_name} asks for no less"
    if hardware.device == "cpu" and recipe.training.mixed_precision == "auto":
        faster = "is faster here" if hardware.supports_bf16 else "would be slower: no bfloat16 instructions"
        reason += f"; `training.mixed_precision: bf16` {faster}"
    return "float32", [Choice("model.dtype", "float32", reason)]


def _machine_problems(recipe: Recipe, hardware: Hardware) -> list[tuple[str, str]]:
    problems, device = [], hardware.device
    training = recipe.training
    key = "model.dtype" if training.mixed_precision == "auto" else "training.mixed_precision"
    fp16 = training.mixed_precision == "fp16" or (training.mixed_precision == "auto" and recipe.model.dtype == "float16")
    if fp16 and device == "cpu":
        problems.append((key, "float16 training needs a GPU, this machine has none; use bfloat16 or float32"))
    bf16 = training.mixed_precision == "bf16" or (training.mixed_precision == "auto" and recipe.model.dtype == "bfloat16")
    if bf16 and device == "cuda" and not hardware.supports_bf16:
        problems.append((key, f"{hardware.device_name} has no bfloat16; use fp16 (float16)"))
    if training.optim.startswith("paged_") and device != "cuda":
        problems.append(
            ("training.optim", f"`{training.optim}` pages between GPU and CPU memory; without a GPU it has no effect")
        )
    if METHODS[recipe.adapter.method].stands_alone and recipe.model.dtype == "float16":
        problems.append(("model.dtype", "weights that are trained themselves lose their updates in float16; use float32"))
    problems += _needs_cuda(recipe, device)
    if training.torch_compile and device == "mps":
        problems.append(("training.torch_compile", "compiles for the CPU and for CUDA GPUs, not for an Apple GPU; use false"))
    if training.batch_size < hardware.num_processes:
        what = f"{training.batch_size} sequences cannot feed {hardware.num_processes} processes"
        problems.append(("training.batch_size", what))
    return problems


def _needs_cuda(recipe: Recipe, device: str) -> list[tuple[str, str]]:
    if device == "cuda":
        return []
    problems = []
    if str(recipe.model.attn_implementation).startswith("flash_attention"):
        problems.append(("model.attn_implementation", f"`{recipe.model.attn_implementation}` needs a CUDA GPU; use sdpa"))
    if recipe.training.activation_offloading:
        what = "moves activations from a CUDA GPU to the CPU's memory; this machine has no such GPU, so it has no effect"
        problems.append(("training.activation_offloading", what))
    if field := METHODS[recipe.adapter.method].needs_cuda(recipe.adapter):
        value = getattr(recipe.adapter, field)
        problems.append((f"adapter.{field}", f"`{value}` needs a CUDA GPU, this machine has none"))
    return problems


def steps_per_epoch(plan: Plan, num_rows: int) -> int:
    """Optimizer steps in one pass over the training rows; the last one may be smaller."""
    return math.ceil(num_rows / plan.recipe.training.batch_size)


def num_steps(plan: Plan, num_rows: int) -> int:
    """Optimizer steps of the whole run."""
    training = plan.recipe.training
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * steps_per_epoch(plan, num_rows)))


def warmup_steps(plan: Plan, total: int) -> int:
    """Warm-up in steps; a value below 1 is a fraction of `total`."""
    value = plan.recipe.training.warmup_steps
    return math.ceil(value * total) if value < 1 else int(value)
