"""Loss and scores from hidden states: logits at targets alone, a chunk at a time, so that the matrix of all logits never is.

The hidden states are taken where they enter the model's own output layer. Each chunk's logits give their loss and, at once,
their gradient by the hidden states (and by the output layer, where that is trained); then they are gone.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peftkit.engine.adapter import base_of_adapted
from peftkit.tasks.example import IGNORE_INDEX

# A chunk's hidden states on the CPU. Each chunk reads the whole output layer twice: with fewer rows that shows (32 rows of
# 128,000 logits took 1.36 times as long as 256, 128 rows 1.08 times).
_CPU_ROWS = 256
_GPU_BYTES = 512 * 2**20  # of a chunk's logits in float32: its products should be worth a launch


@dataclass(frozen=True)
class Head:
    """Where a language model turns hidden states into logits.

    Attributes:
        module: its output layer, adapted or not.
        num_logits: size of the vocabulary.
        device: type of the device that computes.
        softcap: logits are cap * tanh(logits / cap) in the end (Gemma).
        scale: what they are multiplied by before (Cohere; Granite divides).
        bias: what is added to the layer's output before that (BART), (1, V).
        rows: hidden states whose logits are computed together; None: as many as suit the device.
    """

    module: nn.Module
    num_logits: int
    device: str = "cpu"
    softcap: float | None = None
    scale: float | None = None
    bias: torch.Tensor | None = None
    rows: int | None = None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) of hidden states (N, D)."""
        logits: torch.Tensor = self.module(states)
        logits = logits if self.bias is None else logits + self.bias.to(logits.device)
        logits = logits if self.scale is None else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer and at most a soft cap."""
        return type(self.module) is nn.Linear and self.scale is None and self.bias is None

    def states(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Hidden states (B, T, D) of a model's inputs: what its output layer would see, which is not run."""
        seen: list[torch.Tensor] = []
        with _replaced(self.module, seen):
            model(**inputs)
        if len(seen) != 1:
            raise ValueError(f"the output layer was used {len(seen)} times")
        return seen[0]

    @property
    def chunk_size(self) -> int:
        """Hidden states whose logits are computed together."""
        if self.rows is not None:
            return self.rows
        return _CPU_ROWS if self.device == "cpu" else max(16, _GPU_BYTES // (4 * self.num_logits))


@contextlib.contextmanager
def _replaced(module: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    """The module keeps what comes in and returns logits of no position."""
    own = module.__dict__.get("forward")

    def keep(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(states)
        return states[:, :0, :1]

    module.forward = keep
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def find_head(model: Any, device: str = "cpu") -> Head | None:
    """The output layer of a language model, adapted or not, and what the model does to its logits; None where it has none.

    The latter is told from config and buffers, as the models of transformers 5.23 use them: it has to be tried.
    """
    base: Any = base_of_adapted(model)
    module = base.get_output_embeddings()
    if module is None:
        return None
    config = base.config.get_text_config(decoder=True)
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    return Head(
        module,
        config.vocab_size,
        device,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale if isinstance(scale, float | int) else 1 / divisor if divisor else None,
        bias=getattr(base, "final_logits_bias", None),
    )


def chunked_loss(
    states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, head: Head, label_smoothing: float
) -> torch.Tensor:
    """Sum of cross-entropy, the same as `token_loss_sum` of whole logits.

    Args:
        states: (N, D), one hidden state for each target.
        targets: (N,) token ids.
        weights: (N,) of the targets; None: 1.
        head: the output layer.
        label_smoothing: mass spread over the vocabulary (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    is_ligers = head.device == "cuda" and weights is None and head.is_linear and importlib.util.find_spec("liger_kernel")
    if is_ligers and states.is_cuda and len(states):
        return liger_loss(states, targets, head, label_smoothing)
    if is_ligers and states.is_meta:  # where memory is planned, its chunks count
        head = replace(head, rows=_rows_of_liger(states.shape[0], states.shape[1], head.num_logits))
    trained = [parameter for parameter in head.module.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(states, targets, weights, head, label_smoothing, *trained)


def _rows_of_liger(num_states: int, width: int, num_logits: int) -> int:
    """States in a chunk of Liger's (0.8.5, ops/fused_linear_cross_entropy.py): its logits are about as large as all states."""
    parts = -(-num_logits // width)
    return 1 << max(0, -(-num_states // parts) - 1).bit_length()


def liger_loss(states: torch.Tensor, targets: torch.Tensor, head: Head, label_smoothing: float) -> torch.Tensor:
    """The same by Liger's kernels (Hsu et al. 2024, arXiv:2410.10989, section 3.2), which need Triton."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    weight, bias = head.module.weight, head.module.bias
    loss: Any = LigerFusedLinearCrossEntropyFunction.apply(
        states, weight, targets, bias, None, IGNORE_INDEX, 0.0, label_smoothing, "sum", head.softcap
    )
    return loss[0] if isinstance(loss, tuple) else loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        head: Head,
        smoothing: float,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        """The loss; gradients are computed here, chunk by chunk, and scaled in the backward pass."""
        size = head.chunk_size
        total = torch.zeros((), device=states.device)
        of_states, of_trained = torch.empty_like(states), [torch.zeros_like(parameter) for parameter in trained]
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                chunk = states[part].detach().requires_grad_(True)
                logits = head.logits(chunk)
            loss, gradient = loss_and_gradient(
                logits.detach().float(), targets[part], None if weights is None else weights[part], smoothing
            )
            total += loss
            of_chunk, *others = torch.autograd.grad(logits, [chunk, *trained], gradient.to(logits.dtype), allow_unused=True)
            of_states[part] = of_chunk
            for kept, new in zip(of_trained, others, strict=True):
                kept.add_(new if new is not None else 0.0)
        ctx.save_for_backward(of_states, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What was computed, times the gradient of the loss."""
        of_states, *of_trained = ctx.saved_tensors
        scale = gradients[0]
        return of_states * scale, None, None, None, None, *(kept * scale for kept in of_trained)


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of logits (N, V) in float32, and its gradient by them."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    places = targets[:, None]
    losses = log_probabilities.gather(1, places)[:, 0].mul(smoothing - 1.0)
    if smoothing:
        losses -= smoothing * log_probabilities.mean(dim=-1)
    gradient = log_probabilities.exp_()
    if smoothing:
        gradient -= smoothing / logits.shape[-1]
    gradient.scatter_add_(1, places, torch.full_like(places, smoothing - 1.0, dtype=gradient.dtype))
    if weights is not None:
        losses, gradient = losses * weights, gradient.mul_(weights[:, None])
    return losses.sum(), gradient
