"""The certificate: what was saved, loaded into a fresh base, gives the logits of what was trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftkit.adapters import TENSORS
from peftkit.engine.adapter import read_tensors
from peftkit.engine.facts import AdapterFacts
from peftkit.engine.hardware import autocast, process_device
from peftkit.engine.model import load_base_model, read_tokenizer, set_pad_token
from peftkit.engine.parity import check_renderings
from peftkit.engine.sharding import fits
from peftkit.engine.store import load_into
from peftkit.errors import CertificateError, LoadError
from peftkit.methods import METHODS
from peftkit.methods.base import Method
from peftkit.tasks import TASKS
from peftkit.tasks.example import Batch, Example, Runtime

NUM_ROWS = 8
_LOGITS_KEPT = 2**22  # of a row: two models' logits are held beside each other
# Largest difference of a logit over the largest logit. Reloading is exact in practice; these bounds allow for another order
# of summation, and for one rounding step of the adapter's product in 16 bits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


@torch.no_grad()  # FSDP2 keeps what it gathers: nothing of inference mode may remain in it
def reference_logits(
    model: nn.Module,
    runtime: Runtime,
    examples: Sequence[Example],
    precision: str = "no",
    *,
    forward: Callable[[Batch], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Logits of each example alone (no padding), on the CPU in float32; of a long row at positions spread over it.

    Args:
        model: the model.
        runtime: the task on tensors.
        examples: the rows.
        precision: autocast, in accelerate's words.
        forward: batch -> logits; None: the runtime's on the model.
    """
    device = next(model.parameters()).device
    model.eval()
    logits = []
    for example in examples:
        batch = {name: tensor.to(device) for name, tensor in runtime.collate([example]).items()}
        with autocast(device.type, precision):
            whole = forward(batch) if forward else runtime.forward(model, batch)
        logits.append(whole[:, kept_positions(*whole.shape[1:])].float().cpu() if whole.dim() == 3 else whole.float().cpu())
    return logits


def kept_positions(length: int, num_logits: int) -> list[int]:
    """Positions of a row whose logits are compared: all, or where those are too many some at equal distances, the last too."""
    number = min(length, max(2, _LOGITS_KEPT // num_logits))
    return [round(place * (length - 1) / max(1, number - 1)) for place in range(number)]


def largest_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference of two lists of logits; infinity where a number is not finite or a shape differs."""
    if any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        return float("inf")
    differences = [float((a - b).abs().max()) for a, b in zip(left, right, strict=True)]
    return max(differences) if not any(map(math.isnan, differences)) else float("inf")


def scale_of(logits: Sequence[torch.Tensor]) -> float:
    """Largest absolute logit, at least 1."""
    return max(1.0, *(float(part.abs().max()) for part in logits))


def tolerance_for(facts: AdapterFacts) -> float:
    """The bound for an adapter: that of the coarsest number that its model computes with."""
    coarsest = [TOLERANCE[facts.dtype]]
    if facts.quantization is not None:
        # 8-bit layers compute in float16, and rounding to 8 bits can make more of a difference that is there already
        coarsest.append(TOLERANCE[facts.quantization.computes_in or "float16"])
    return max(coarsest)


def certify(
    folder: Path, reference: Sequence[torch.Tensor], facts: AdapterFacts, runtime: Runtime, examples: Sequence[Example]
) -> dict[str, Any]:
    """Reload an adapter folder into a fresh base and compare.

    Args:
        folder: the adapter folder.
        reference: logits of the trained model in memory.
        facts: says which base.
        runtime: the task on tensors.
        examples: the rows that the logits are of.

    Returns:
        `max_abs_diff`, `tolerance`, `num_rows`, `passed`.

    Raises:
        CertificateError: with the cause.
    """
    try:
        _check_tensors(folder, METHODS[facts.method])
        check_renderings(folder, TASKS[facts.task].runtime(read_tokenizer(str(folder)), runtime.settings))
        # Another seed for the new head: one that was not saved cannot come out right by chance.
        base, missing = load_base_model(facts.base_model(folder), runtime.settings, head_seed=facts.seed + 1)
        set_pad_token(base, runtime.tokenizer)
        model: Any = load_into(base, folder, facts.method, missing)
    except LoadError as error:
        raise CertificateError(f"certificate failed: what was saved does not load: {error}") from error
    device = process_device()
    model.to(device if fits(model, device) else "cpu")
    difference = largest_difference(reference, reference_logits(model, runtime, examples, facts.mixed_precision))
    tolerance = tolerance_for(facts) * scale_of(reference)
    result = {"max_abs_diff": difference, "tolerance": tolerance, "num_rows": len(examples), "passed": difference <= tolerance}
    if not result["passed"]:
        cause = "the saved model is another one" if METHODS[facts.method].stands_alone else "a trained part was not saved"
        raise CertificateError(
            f"certificate failed: reloaded logits differ by up to {difference:.3g} (allowed {tolerance:.3g}); {cause}, "
            f"or the base `{facts.base}` has changed"
        )
    return result


def _check_tensors(folder: Path, method: Method) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_tensors(path).items():
            if tensor.numel() == 0 and not method.may_be_empty:
                raise CertificateError(f"certificate failed: {path.name} holds an empty tensor: {name}")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CertificateError(f"certificate failed: {path.name} holds NaN or infinity in {name}")
    if not list(folder.glob("*.safetensors")):
        raise CertificateError(f"certificate failed: {folder} has no weights ({TENSORS})")
