"""The memory of a run, by part and by phase, before it starts: `docs/memory.md` tells how it is found and how right it is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.blueprint import draw_blueprint
from peftkit.engine.certify import NUM_ROWS, kept_positions
from peftkit.engine.evaluate import scores_of
from peftkit.engine.fast import taken, without_mask
from peftkit.engine.hardware import autocast
from peftkit.engine.hooks import hook
from peftkit.engine.kernels import Kernels
from peftkit.engine.largest import largest_evaluation, largest_pass
from peftkit.engine.model import base_of, load_config, set_pad_token
from peftkit.engine.savings import Checkpointing, Offload, checkpoint_layers
from peftkit.engine.step import Step
from peftkit.engine.stored import Stored, checkpoint_bytes, stored
from peftkit.engine.survey import Survey
from peftkit.engine.token_loss import Head
from peftkit.engine.trace import Held, trace_inference, trace_training
from peftkit.launch_file import Sharding
from peftkit.methods import METHODS
from peftkit.plan import Plan
from peftkit.tasks.example import Batch, Runtime

# Resident memory of a CPU process that comes after the rows are read, whatever the model: accelerate, the threads and buffers
# of the kernels, the optimizer's code. Measured: docs/memory.md.
_LATER_BYTES = 60 * 2**20
_WORKSPACE_BYTES = 2 * 8_519_680  # cuBLAS, for the threads of the forward and the backward pass (torch 2.13, CUDABlas)
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "fragmentation", "overhead")


@dataclass(frozen=True)
class MemoryPlan:
    """What one process of a run will hold at most.

    Attributes:
        phases: bytes by part in each phase of the run; the fullest of them is the plan's peak.
        shape: sequences and tokens of the largest pass.
        how: what the activations are known from.
        held: what that pass holds beside the weights.
    """

    phases: dict[str, dict[str, int]]
    shape: tuple[int, int]
    how: str
    held: Held

    @property
    def peak(self) -> str:
        """The fullest phase."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.phases[self.peak].values())

    def report(self) -> dict[str, Any]:
        """What `plan --json` says of it."""
        totals = {name: sum(parts.values()) for name, parts in self.phases.items()}
        return {
            "memory_bytes": {part: self.phases[self.peak].get(part, 0) for part in PARTS} | {"total": self.total},
            "memory_phases": totals,
            "memory_peak": self.peak,
            "memory_from": f"{self.how}; largest pass: {self.shape[0]} x {self.shape[1]} tokens",
        }


def plan_memory(found: Survey, sharding: Sharding = Sharding()) -> MemoryPlan:  # noqa: B008 - frozen
    """The memory of a run, for each of its processes.

    Args:
        found: what is known before a weight is loaded.
        sharding: how the processes share weights, gradients and optimizer.
    """
    plan, model = found.plan, found.blueprint.model
    set_pad_token(base_of_adapted(model), found.tokenizer)
    runtime = plan.task.runtime(found.tokenizer, found.data.encoding)
    with taken(plan, model):
        batch, num_passes = largest_pass(plan, found.data, model, runtime)
    held, how = trace_step(found, runtime, batch, accumulates=num_passes > 1)
    held = dataclasses.replace(held, activations=held.activations + _gathered_bytes(plan, model, batch["input_ids"].numel()))
    size = stored(plan, model).shared(sharding)
    shape = next(tensor for name, tensor in batch.items() if name == "input_ids").shape
    phases = dict(phases_of(found, runtime, size, held))
    return MemoryPlan(phases, (shape[0], shape[1]), how, held)


def _gathered_bytes(plan: Plan, model: nn.Module, tokens: int) -> int:
    """Keys and values of other processes that share tokens with this one, which has so many; each layer keeps its own."""
    if plan.hardware.cp_size == 1:
        return 0
    config: Any = base_of_adapted(model).config.get_text_config()  # type: ignore[operator, union-attr]
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    repeats = plan.hardware.device == "cpu"  # keys of grouped heads, for a kernel with a mask
    width = 2 * size * (heads if repeats else getattr(config, "num_key_value_heads", None) or heads)
    kept = 1 if plan.recipe.training.gradient_checkpointing is True else layers
    return (plan.hardware.cp_size - 1) * tokens * width * kept * (4 if plan.mixed_precision == "no" else 2)


def phases_of(found: Survey, runtime: Runtime, size: Stored, held: Held) -> Iterator[tuple[str, dict[str, int]]]:
    """Bytes by part in each phase of a run, in order."""
    plan, on_cpu = found.plan, found.plan.hardware.device == "cpu"
    overhead = found.resident_bytes + _LATER_BYTES if on_cpu else _WORKSPACE_BYTES
    fixed = {"weights": size.weights, "adapter": size.adapter}
    if on_cpu:
        yield "loading", fixed | {"overhead": overhead + _loading_bytes(plan, found.blueprint.model, size)}
    training = fixed | {"optimizer": size.optimizer, "overhead": overhead + size.buckets}
    yield (
        "training",
        training
        | {"gradients": size.gradient_share(held.gradients), "activations": held.activations}
        | {"fragmentation": held.fragmentation},
    )
    yield "optimizer", training | {"gradients": size.gradients, "activations": size.step_scratch}
    logits = _certificate_bytes(found, runtime)
    if evaluated := _evaluation(found, runtime):
        yield "evaluation", training | {"activations": evaluated.total}
    if size.certified and (on_cpu or _is_certified_here(plan, size, training)):
        whole = training["weights"] + size.certified  # what processes share cannot be let go of by one of them
        yield "certificate", training | {"weights": whole, "activations": logits if on_cpu else 0}
    elif on_cpu:
        yield "certificate", fixed | {"activations": logits, "overhead": overhead + size.buckets}


def _is_certified_here(plan: Plan, size: Stored, training: dict[str, int]) -> bool:
    """Whether a GPU that has its part of a shared model has the fresh base too, as `certify` decides: else the CPU has it."""
    free = plan.hardware.memory_bytes - sum(training.values())
    return plan.quantization is not None or size.certified <= free // 2  # quantised weights are loaded onto the GPU


def _loading_bytes(plan: Plan, model: nn.Module, size: Stored) -> int:
    """What loading holds beside the weights as they lie: the file's, and those that are quantised once there."""
    of_file, quantization = checkpoint_bytes(base_of(plan), plan.dtype), plan.quantization
    if quantization is None or quantization.is_stored:
        return of_file
    if quantization.method != "bitsandbytes":
        return of_file + size.unquantised
    if plan.recipe.model.init == "random":  # the random model is saved, and loaded again
        return sum(weight.numel() * weight.element_size() for weight in model.parameters() if not weight.requires_grad)
    return of_file


def trace_step(found: Survey, runtime: Runtime, batch: Batch, *, accumulates: bool) -> tuple[Held, str]:
    """The fullest moment of a pass with this batch, and what it is known from.

    Args:
        found: the run.
        runtime: the task on tensors.
        batch: the batch, as the model takes it.
        accumulates: whether earlier passes of the step have left gradients.
    """
    plan, model = found.plan, found.blueprint.model
    if plan.method.trained_shapes is None:
        with contextlib.suppress(*UNTRACEABLE):
            held = _traced(plan, model, runtime, batch, accumulates=accumulates)
            return held, "traced: the model's own code, run on shapes"
    with contextlib.suppress(*UNTRACEABLE):
        twin = _lora_twin(found)
        held = _traced(twin.plan, twin.blueprint.model, runtime, batch, accumulates=accumulates)
        own = stored(plan, model)
        added = own.targets * plan.method.weight_copies
        what = f"estimated: {plan.method.name} cannot be run on shapes, activations are those of LoRA on the same model"
        gradients = own.gradients if accumulates else held.gradients
        return dataclasses.replace(held, activations=held.activations + added, gradients=gradients), what
    return _formula(plan, model, batch), "estimated by a formula: the model cannot be run on shapes"


# What model code raises on tensors without numbers.
UNTRACEABLE = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)


def _traced(plan: Plan, model: nn.Module, runtime: Runtime, batch: Batch, *, accumulates: bool) -> Held:
    kernels = kernels_of(plan, model)
    model.train()
    with taken(plan, model) as paths, _as_it_trains(plan, model, batch) as given:
        step = training_loss(plan, model, runtime, without_mask(given) if paths.drops_mask else given, paths.head)
        return trace_training(model, step, kernels, gradients_exist=accumulates)


def training_loss(
    plan: Plan, model: nn.Module, runtime: Runtime, batch: Batch, head: Head | None = None
) -> Callable[[], torch.Tensor]:
    """The forward pass of a micro-batch and its loss, as the trainer has them."""

    step = Step(model, runtime, head, plan.recipe.training.label_smoothing_factor)

    def loss_sum(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return runtime.loss_sum(outputs, labels, plan.recipe.training.label_smoothing_factor)

    def run() -> torch.Tensor:
        loss: torch.Tensor = step(batch)
        if batch_penalty := hook(plan.method, "batch_penalty"):
            loss = loss + batch_penalty(model, batch, loss_sum)
        if penalty := hook(plan.method, "penalty"):
            loss = loss + penalty(model)
        return loss

    return run


def kernels_of(plan: Plan, model: nn.Module) -> Kernels:
    """How the device of a plan computes this model."""
    return Kernels(
        plan.hardware.device,
        masks=not str(plan.recipe.model.attn_implementation).startswith("fl"),  # flash and flex attention take none
        quantised=frozenset(stored(plan, model).quantised),
        layers=plan.quantization.layers if plan.quantization else "4bit",
    )


@contextlib.contextmanager
def _as_it_trains(plan: Plan, model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """The model with autocast, checkpointing and an attention that runs on shapes, for as long as the context lasts."""
    base: Any = base_of_adapted(model)
    attention = base.config._attn_implementation
    if str(attention).startswith("fl"):
        base.set_attn_implementation("sdpa")
        batch = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    training = plan.recipe.training
    with (
        autocast_like(model, plan.mixed_precision),
        _checkpointing(base, training.gradient_checkpointing),
        _offloading(base, training.activation_offloading),
    ):
        try:
            yield batch
        finally:
            if base.config._attn_implementation != attention:
                base.config._attn_implementation = attention


@contextlib.contextmanager
def autocast_like(model: nn.Module, precision: str) -> Iterator[None]:
    """The model's forward pass as accelerate wraps it: under autocast, its outputs in float32."""

    def cast(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with autocast("cpu", precision):
                return forward(*args, **kwargs)

        return convert_outputs_to_fp32(run)

    with _wrapped(model, cast if precision != "no" else None):
        yield


class Away(Offload):
    """What training moves away, on shapes: they are gone until they are asked for."""

    def move_out(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Forget a tensor; returns what makes one like it."""
        if not tensor.is_meta:
            return lambda: tensor
        shape, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device="meta")


@contextlib.contextmanager
def _offloading(base: nn.Module, wanted: bool) -> Iterator[None]:
    """Large tensors that the base model's forward pass saves wait elsewhere until the backward pass asks for them."""
    offload = Away(base.parameters())

    def away(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with offload.context():
                return forward(*args, **kwargs)

        return run

    with _wrapped(base, away if wanted else None):
        yield


@contextlib.contextmanager
def _wrapped(model: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] | None) -> Iterator[None]:
    if wrap is None:
        yield
        return
    before = vars(model).get("forward")  # of a context around this one; else the class has its own
    model.forward = wrap(model.forward)
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


@contextlib.contextmanager
def _checkpointing(base: Any, wanted: Checkpointing) -> Iterator[None]:
    if not wanted:
        yield
        return
    checkpoint_layers(base, wanted)
    for module in base.modules():
        if checkpoint := getattr(module, "_gradient_checkpointing_func", None):
            # What is recomputed is compared with what was, the device too, which differs by who looks (engine.trace).
            module._gradient_checkpointing_func = functools.partial(checkpoint, determinism_check="none")
    try:
        yield
    finally:
        base.gradient_checkpointing_disable()


def _evaluation(found: Survey, runtime: Runtime) -> Held | None:
    """The fullest moment of an evaluation; None where nothing is evaluated, or it cannot be traced."""
    plan, model = found.plan, found.blueprint.model
    largest = largest_evaluation(plan, found.data, runtime)
    if largest is None or plan.method.trained_shapes is not None:
        return None
    batch, rows = largest
    model.eval()

    def score() -> None:
        step = Step(model, runtime, paths.head)
        outputs = step(batch, outputs_only=True)
        with contextlib.suppress(*UNTRACEABLE):  # scores are numbers, which there are none of
            scores_of(step, outputs, batch, rows)

    with taken(plan, model) as paths, contextlib.suppress(*UNTRACEABLE), autocast_like(model, plan.mixed_precision):
        return trace_inference(model, score, kernels_of(plan, model))
    return None


def _certificate_bytes(found: Survey, runtime: Runtime) -> int:
    """Logits of the rows that the certificate is about, of both models, and of one row while they are computed."""
    if not found.plan.task.generates:
        return 0
    rows = found.data.held_out.get("validation", found.data.sample)[:NUM_ROWS]
    config: Any = found.blueprint.config.get_text_config()
    lengths = [len(row.labels) for row in rows]
    kept = sum(len(kept_positions(length, config.vocab_size)) for length in lengths)
    return 4 * config.vocab_size * (2 * kept + max(lengths))


def _lora_twin(found: Survey) -> Survey:
    """The same run with LoRA on the same layers."""
    section: Any = found.plan.recipe.adapter
    fields = {name: getattr(section, name, None) for name in ("target_modules", "exclude_modules", "modules_to_save")}
    stated = {name: value for name, value in fields.items() if value is not None}
    adapter = METHODS["lora"].section.model_validate({"method": "lora"} | stated)
    recipe = found.plan.recipe.model_copy(update={"adapter": adapter})
    plan = dataclasses.replace(found.plan, recipe=recipe)
    return dataclasses.replace(
        found, plan=plan, blueprint=draw_blueprint(plan, found.data.encoding.num_outputs, found.tokenizer)
    )


def _formula(plan: Plan, model: nn.Module, batch: Batch) -> Held:
    """Korthikanti et al. 2022 (arXiv:2205.05198), section 4: 34 bytes per token, hidden unit and layer at 16 bits."""
    config: Any = load_config(base_of(plan)).get_text_config()
    tokens = batch["input_ids"].numel()
    width: int = getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 0
    layers: int = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None) or 0
    factor = 1 if plan.mixed_precision != "no" or plan.dtype != "float32" else 2
    layer = 34 * factor * width * tokens
    kept = 2 * factor * width * tokens * layers + layer if plan.recipe.training.gradient_checkpointing else layer * layers
    logits = 12 * tokens * getattr(config, "vocab_size", 0) if plan.task.generates else 0
    return Held(kept + logits, stored(plan, model).gradients)
