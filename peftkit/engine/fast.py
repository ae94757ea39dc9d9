"""Shorter ways to the same numbers: which of them a run takes and why, and the proof on the model itself.

What they are is told from the model's modules and config, on the meta device as well, so that `plan` shows them. With weights
each is compared with the plain way on rows of the run; one that differs is not taken, and the run says so.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.batches import join
from peftkit.engine.certify import TOLERANCE
from peftkit.engine.context_parallel import prove_split
from peftkit.engine.fused import fusable, fuse, separate, stirred
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.hardware import autocast
from peftkit.engine.packing import prove_packing, untouched
from peftkit.engine.segments import CONTEXT, SEGMENTS
from peftkit.engine.stored import quantised_weights
from peftkit.engine.tensor_parallel import divides_layers
from peftkit.engine.token_loss import Head, find_head
from peftkit.errors import Problem, RecipeError
from peftkit.plan import Choice, Plan, RowLayout
from peftkit.recipe.packing import packs_by, why_not_packed
from peftkit.tasks.example import Batch, Example, Runtime

_REFUSALS = (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError, NotImplementedError)
_LENGTHS = (16, 11, 6)  # of rows that ways are proven on: with padding, few logits
_COMPUTED = {"no": "", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class FastPaths:
    """The ways that a run takes.

    Attributes:
        rows: how the rows of a pass are laid out.
        by_row: whether attention runs on one row after the other.
        head: where the loss is taken from hidden states; None: from whole logits.
        drops_mask: whether right-padded rows go without a mask.
        fused: kind and module of layers with a shorter forward.
        choices: all of this in words, with reasons.
        attention: the model's own attention kernel.
    """

    rows: RowLayout
    by_row: bool
    head: Head | None
    drops_mask: bool
    fused: tuple[tuple[str, nn.Module], ...]
    choices: tuple[Choice, ...]
    attention: str = ""

    def leave(self, model: nn.Module) -> None:
        """Give a model that took these ways its own back."""
        for _, module in self.fused:
            separate(module)
        base_of_adapted(model).set_attn_implementation(self.attention)  # type: ignore[operator]


def find_fast_paths(plan: Plan, model: nn.Module) -> FastPaths:
    """What a plan and the modules of its (adapted) model allow, weights or not."""
    rows, by_row, layout = row_layout(plan, model)
    base: Any = base_of_adapted(model)
    attention: str = base.config._attn_implementation
    if not plan.recipe.training.fast_paths or divides_layers(model):
        return FastPaths(rows, by_row, None, False, (), (layout,), attention)
    choices = [layout]
    head = find_head(model, plan.hardware.device) if plan.task.learns_tokens else None
    if plan.task.learns_tokens:
        why = "logits at targets alone, a chunk at a time" if head else "the model names no output layer"
        choices.append(Choice("fast: loss", "from hidden states" if head else "whole logits", why))
    drops_mask = rows == "padded" and _sees_no_padding(plan)
    if drops_mask:
        choices.append(Choice("fast: mask", "none", "what a causal model sees of a row never lies behind it, in the padding"))
    training = plan.recipe.training
    if training.torch_compile or training.gradient_checkpointing == "selective":
        why = "torch.compile fuses them" if training.torch_compile else "selective checkpointing keeps the products within"
        choices.append(Choice("fast: layers", "as they are", why))
        return FastPaths(rows, by_row, head, drops_mask, (), tuple(choices), attention)
    fused = tuple(_shorter_layers(plan, model))
    if fused:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in fused).items())
        choices.append(Choice("fast: layers", kinds, "in fewer passes over memory, with less kept for the backward pass"))
    return FastPaths(rows, by_row, head, drops_mask, fused, tuple(choices), attention)


def _shorter_layers(plan: Plan, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is fused: on the meta device, layers that will be quantised are still plain ones."""
    quantised = quantised_weights(model, plan.quantization) if plan.quantization is not None else {}
    for kind, module in fusable(model):
        layer: Any = module
        if kind != "LoRA layers" or id(layer.base_layer.weight) not in quantised:
            yield kind, module


def _sees_no_padding(plan: Plan) -> bool:
    """Whether rows padded on the right need no mask; tried on the model where it has weights."""
    return plan.recipe.training.fast_paths and plan.task.packs and not plan.method.rows_interact


def row_layout(plan: Plan, model: nn.Module) -> tuple[RowLayout, bool, Choice]:
    """How rows are laid out, and whether attention runs row by row."""
    packing, attention = plan.recipe.data.packing if plan.recipe.data else False, plan.recipe.model.attn_implementation
    config = base_of_adapted(model).config.to_dict()  # type: ignore[operator, union-attr]
    why = why_not_packed(config, attention) or plan.method.why_not_packed(plan.recipe.adapter)
    why = why if plan.task.packs else f"a row of {plan.task.name} is a sequence of its own"
    one_sequence = not why and packs_by(config, attention) == "one_sequence"
    training = plan.recipe.training
    # A compiled layer would be compiled anew for every number of rows.
    by_row = not why and attention in (None, "sdpa") and training.fast_paths and not training.torch_compile
    by_row = by_row and takes_segments(model)
    kernel = "attention runs on one row after the other" if by_row else f"{attention} takes rows of any length"
    if packing is True:
        return "packed", by_row, Choice("data.packing", True, kernel if by_row or one_sequence else "a mask keeps rows apart")
    if training.neftune_noise_alpha is not None:
        return "padded", False, Choice("data.packing", False, "NEFTune's noise depends on the length of a padded batch")
    if packing == "auto" and (by_row or one_sequence):
        return "end_to_end", by_row, Choice("data.packing", "rows of a pass end to end", f"no padding; {kernel}")
    reason = why or (
        "as the recipe has it"
        if packing is False
        else "with torch.compile or without fast_paths, one mask for all rows costs more than padding does"
    )
    return "padded", False, Choice("data.packing", False, reason)


def takes_segments(model: nn.Module) -> bool:
    """Whether a model's layers ask transformers for their attention, so that it can run row by row."""
    base: Any = base_of_adapted(model)
    own = base.config._attn_implementation
    try:
        base.set_attn_implementation(SEGMENTS)
        return bool(base.config._attn_implementation == SEGMENTS)
    except _REFUSALS:
        return False
    finally:
        base.set_attn_implementation(own)


def take_fast_paths(
    plan: Plan, model: nn.Module, runtime: Runtime, examples: Sequence[Example], note: Callable[[str], None]
) -> FastPaths:
    """Find the ways, prove each on the model, and leave the model ready for those that hold.

    Args:
        plan: the plan.
        model: the model with its adapter and weights, on its device.
        runtime: the task on tensors.
        examples: a few rows of the run.
        note: told of every way that is not taken after all.

    Raises:
        RecipeError: rows have to be packed, or their tokens shared out, and the model does not keep them apart.
    """
    paths, device = find_fast_paths(plan, model), next(model.parameters()).device
    with autocast(device.type, plan.mixed_precision):
        rows = _proven_layout(paths, model, runtime, examples, note)
    if plan.hardware.cp_size > 1:
        _take_split(plan, model, runtime, examples, rows)
    if rows != paths.rows:
        paths = replace(paths, rows=rows, by_row=False, drops_mask=_sees_no_padding(plan))
    if paths.head is None and not paths.fused and not paths.drops_mask:
        return paths
    cut = (
        [_cut(example, _LENGTHS[place % 3]) for place, example in enumerate(examples)] if plan.task.learns_tokens else examples
    )
    batch = {name: tensor.to(device) for name, tensor in runtime.collate(cut).items()}
    with untouched(model), autocast(device.type, plan.mixed_precision), stirred(paths.fused):
        plain = runtime.forward(model, batch)
        same = functools.partial(_is_same, plain, _tolerance(plan.mixed_precision, plan.dtype))
        for kind, module in paths.fused:
            fuse(kind, module)
        head, drops_mask = paths.head, paths.drops_mask
        if not same(_from_states(head, model, runtime, batch) if head else runtime.forward(model, batch)):
            head = _sound_parts(paths, model, runtime, batch, same, note)
        if drops_mask and not same(runtime.forward(model, without_mask(batch)), where=batch["attention_mask"].bool()):
            note("rows keep their padding mask: without it logits are others")
            drops_mask = False
    return replace(paths, head=head, drops_mask=drops_mask)


def _sound_parts(
    paths: FastPaths,
    model: nn.Module,
    runtime: Runtime,
    batch: Batch,
    same: Callable[..., bool],
    note: Callable[[str], None],
) -> Head | None:
    """Something of it differs: try one after the other, leave fused what is right; the head where it is."""
    for _, module in paths.fused:
        separate(module)
    head = paths.head
    if head is not None and not same(_from_states(head, model, runtime, batch)):
        note("the loss is taken from whole logits: hidden states give others")
        head = None
    for kind in dict(paths.fused):
        modules = [module for name, module in paths.fused if name == kind]
        for module in modules:
            fuse(kind, module)
        if not same(runtime.forward(model, batch)):
            note(f"the {kind} keep their own forward: the shorter one gives other logits")
            for module in modules:
                separate(module)
    return head


@contextlib.contextmanager
def taken(plan: Plan, model: nn.Module) -> Iterator[FastPaths]:
    """A model that computes by all ways that its modules allow, unproven, for as long as the context lasts."""
    paths, base = find_fast_paths(plan, model), base_of_adapted(model)
    if paths.by_row:
        base.set_attn_implementation(SEGMENTS)  # type: ignore[operator]
    for kind, module in paths.fused:
        fuse(kind, module)
    try:
        yield paths
    finally:
        paths.leave(model)


def why_not_split(plan: Plan, model: nn.Module) -> Iterator[tuple[str, str]]:
    """What stands against processes that share out the tokens of rows, if they do, for a (base) model, weights or not."""
    if plan.hardware.cp_size == 1:
        return
    rows, by_row, layout = row_layout(plan, model)
    if rows == "padded" or not by_row:
        what = f"processes share out the tokens (cp_size) of rows end to end, by sdpa attention; here not: {layout.reason}"
        yield "data.packing" if plan.task.packs else "task", what


def _take_split(plan: Plan, model: nn.Module, runtime: Runtime, examples: Sequence[Example], rows: RowLayout) -> None:
    """Let attention gather keys and values from the processes that share tokens, and prove that it does."""
    if rows == "padded":
        what = "the model does not keep rows apart that lie end to end"
        raise RecipeError([Problem("", "parallelism_config_cp_size", what)])
    base, device = base_of_adapted(model), next(model.parameters()).device
    base.set_attn_implementation(CONTEXT)  # type: ignore[operator]
    joined = join([_cut(example, _LENGTHS[place % 3]) for place, example in enumerate(examples)])
    batch = {name: tensor.to(device) for name, tensor in runtime.collate([joined]).items()}
    tolerance = _tolerance(plan.mixed_precision, plan.dtype)
    with autocast(device.type, plan.mixed_precision):
        prove_split(model, batch, runtime.forward, plan.hardware.cp_size, tolerance)


def _proven_layout(
    paths: FastPaths, model: nn.Module, runtime: Runtime, examples: Sequence[Example], note: Callable[[str], None]
) -> RowLayout:
    if paths.rows == "padded":
        return "padded"
    base: Any = base_of_adapted(model)
    own = base.config._attn_implementation
    if paths.by_row:
        base.set_attn_implementation(SEGMENTS)
    try:
        prove_packing(model, [example.inputs["input_ids"] for example in examples], runtime.forward)
    except RecipeError as error:
        base.set_attn_implementation(own)
        if paths.rows == "packed":
            raise
        note(f"rows are padded, not laid end to end: {error}")
        return "padded"
    return paths.rows


def proven_head(model: nn.Module, runtime: Runtime, examples: Sequence[Example], precision: str, dtype: str) -> Head | None:
    """The output layer, where the first row's logits come out the same from hidden states; for tasks that learn tokens.

    Args:
        model: the model, in evaluation mode; the caller sets autocast.
        runtime: the task on tensors.
        examples: rows to evaluate.
        precision: autocast, in accelerate's words.
        dtype: of the weights.
    """
    device = next(model.parameters()).device
    head = find_head(model, device.type) if examples else None
    if head is None:
        return None
    batch = {name: tensor.to(device) for name, tensor in runtime.collate([_cut(examples[0], _LENGTHS[0])]).items()}
    plain = runtime.forward(model, batch)
    return head if _is_same(plain, _tolerance(precision, dtype), _from_states(head, model, runtime, batch)) else None


def _tolerance(precision: str, dtype: str) -> float:
    return TOLERANCE.get(_COMPUTED[precision] or dtype, TOLERANCE["bfloat16"])


def without_mask(batch: Batch) -> Batch:
    """A batch whose right padding no causal model sees, masked or not."""
    return {name: tensor for name, tensor in batch.items() if name != "attention_mask"}


def _cut(example: Example, length: int) -> Example:
    """The first tokens of a row."""
    inputs = {name: values[:length] for name, values in example.inputs.items()}
    weights = example.weights[:length] if example.weights else None
    return replace(example, inputs=inputs, labels=example.labels[:length], weights=weights)


def _from_states(head: Head, model: nn.Module, runtime: Runtime, batch: Batch) -> torch.Tensor | None:
    try:
        return head.logits(head.states(model, runtime.inputs(model, batch)))
    except _REFUSALS as error:
        raise_if_exhausted(error)
        return None


def _is_same(plain: torch.Tensor, tolerance: float, outputs: torch.Tensor | None, *, where: torch.Tensor | None = None) -> bool:
    """Whether outputs are the plain ones, up to rounding; `where` (B, T) chooses positions."""
    if outputs is None or outputs.shape != plain.shape:
        return False
    left, right = (plain, outputs) if where is None else (plain[where], outputs[where])
    return bool((left - right).abs().max() <= tolerance * left.abs().max())
