"""How the device that is planned for computes, as far as memory shows it: attention, autocast, the allocator's blocks.

Nothing here computes: tensors have shapes only (see `engine.trace`). So the plan for a GPU is made where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from peftkit.methods.base import Layers

_aten = torch.ops.aten

# Functions that autocast runs in 16 bits, and those that it runs in float32 (torch 2.13, docs/source/amp.md).
_IN_16_BITS = frozenset(
    [
        "linear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "addbmm",
        "baddbmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "einsum",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "bilinear",
    ]
)
_IN_FLOAT32 = frozenset(
    [
        "layer_norm",
        "group_norm",
        "pow",
        "__pow__",
        "__rpow__",
        "rsqrt",
        "reciprocal",
        "exp",
        "expm1",
        "log",
        "log10",
        "log2",
        "log1p",
        "norm",
        "nll_loss",
        "cross_entropy",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "kl_div",
        "cosine_similarity",
        "cosine_embedding_loss",
        "triplet_margin_loss",
        "softplus",
        "cdist",
        "dist",
        "binary_cross_entropy_with_logits",
        "acos",
        "asin",
        "cosh",
        "sinh",
        "tan",
        "renorm",
    ]
)
_SUMMED_IN_FLOAT32 = frozenset("softmax log_softmax softmin sum prod cumsum cumprod".split())  # noqa: SIM905


@dataclass(frozen=True)
class Kernels:
    """What differs between devices.

    Attributes:
        device: torch device type.
        masks: whether attention takes a mask; flash attention goes without.
        quantised: ids of weights that lie quantised, and are multiplied by way of a copy that is not.
        layers: what kind of layers hold them.
    """

    device: Literal["cpu", "cuda", "mps"] = "cpu"
    masks: bool = True
    quantised: frozenset[int] = frozenset()
    layers: Layers = "4bit"

    @property
    def block_bytes(self) -> int:
        """What sizes are rounded up to: CUDA's caching allocator, and posix_memalign on the CPU."""
        return 512 if self.device == "cuda" else 64

    def block(self, tensor: torch.Tensor) -> int:
        """Bytes that a tensor takes."""
        return -(-tensor.untyped_storage().nbytes() // self.block_bytes) * self.block_bytes


class Autocast:
    """Autocast on tensors without numbers, which torch's own leaves alone: whenever torch's is on for the CPU.

    Args:
        device: whose lists of functions to follow.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.copies: dict[int, torch.Tensor] = {}  # 16-bit copies of trained weights live as long as the forward pass

    def cast(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a function in the dtypes that it gets them in."""
        if not torch.is_autocast_enabled("cpu"):
            return args, kwargs
        if name in _IN_16_BITS:
            return self._all(args, kwargs, torch.get_autocast_dtype("cpu"))
        if self.device == "cpu":  # the CPU's list for float32 has next to nothing that language models use
            return args, kwargs
        if name in _SUMMED_IN_FLOAT32 and args and _is_float(args[0]):
            return args, {"dtype": torch.float32} | kwargs
        return self._all(args, kwargs, torch.float32) if name in _IN_FLOAT32 else (args, kwargs)

    def _all(self, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cast = {name: self._one(value, dtype) for name, value in kwargs.items()}
        return tuple(self._one(value, dtype) for value in args), cast

    def _one(self, value: Any, dtype: torch.dtype) -> Any:
        if not _is_float(value) or value.dtype == dtype:
            return value
        if value.is_leaf and value.requires_grad and value.dtype == torch.float32:
            if id(value) not in self.copies:
                self.copies[id(value)] = value.to(dtype)
            return self.copies[id(value)]
        return value.to(dtype)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def attention(  # noqa: PLR0913, PLR0917 - torch's own parameters
    kernels: Kernels,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention`, by the kernel that torch picks on the device; arguments as there."""
    fused = query.dim() == 4 and query.shape[-1] == value.shape[-1]
    if kernels.device == "cuda" and enable_gqa and query.dtype == torch.float32:
        fused = False  # the kernel for 32 bits wants as many heads of keys as of queries
    if kernels.device == "cpu":
        fused = fused and dropout_p == 0.0 and not (attn_mask is not None and attn_mask.requires_grad)
    if not fused or kernels.device == "mps":
        options = {"scale": scale, "enable_gqa": enable_gqa}
        result: torch.Tensor = _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )[0]
        return result
    mask = attn_mask if kernels.masks else None
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.empty(mask.shape, dtype=query.dtype, device=query.device if mask.is_meta else "meta")
    fused_result: torch.Tensor = _Fused.apply(query, key, value, mask, kernels.device)
    return fused_result


class _Fused(torch.autograd.Function):
    """A kernel that never has the whole matrix of scores: it saves its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """Attention of (query, key, value, mask, device)."""
        query, key, value, mask, device = inputs
        result = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # log-sum-exp (B, H, T)
        ctx.save_for_backward(query, key, value, mask, result, sums)
        ctx.device = device
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, _, _, _ = ctx.saved_tensors
        # CUDA's kernels add up the queries' gradient in float32, and those of keys and values for each query head.
        wide = ctx.device == "cuda"
        scratch = query.new_empty(query.shape, dtype=torch.float32) if wide and query.dtype != torch.float32 else None
        heads = [query.new_empty(*query.shape[:2], *part.shape[2:]) for part in (key, value) if part.shape[1] != query.shape[1]]
        result = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
        del scratch, heads
        return result


def quantised_linear(kernels: Kernels, input: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """`linear` with a weight that is quantised; arguments as there."""
    result: torch.Tensor = _WAYS.get(kernels.layers, _Dequantised).apply(input, weight)
    return result


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Room for the product of an input (..., inputs) and a weight (outputs, inputs)."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _Dequantised(torch.autograd.Function):
    """4 bits: a copy of the weight in 16 bits or more, made for the moment, here and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """The product of (input, weight)."""
        x, weight = inputs
        copy = torch.empty_like(weight, dtype=x.dtype)
        ctx.weight, ctx.shape, ctx.dtype = weight, x.shape, x.dtype
        result = _product(x, weight)
        del copy
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the input."""
        copy = torch.empty_like(ctx.weight, dtype=ctx.dtype)
        result = gradients[0].new_empty(ctx.shape, dtype=ctx.dtype)
        del copy
        return result, None


class _Integers(_Dequantised):
    """8 bits of bitsandbytes: integers are multiplied, and the input is kept (0.50, MatMul8bitLt)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """The product of (input, weight)."""
        x, weight = inputs
        copy = x.new_empty(x.shape, dtype=torch.int8)
        sums = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.int32)
        ctx.save_for_backward(x)
        ctx.weight, ctx.shape, ctx.dtype = weight, x.shape, x.dtype
        result = _product(x, weight)
        del copy, sums
        return result


class _KeptCopy(torch.autograd.Function):
    """torchao: the copy of the weight is kept for the backward pass (0.18, Int8Tensor), the scales come after the product."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """The product of (input, weight)."""
        x, weight = inputs
        copy = torch.empty_like(weight, dtype=x.dtype)
        ctx.save_for_backward(copy)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        unscaled = _product(x, weight)
        result = _product(x, weight)
        del unscaled
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the input."""
        _ = ctx.saved_tensors
        scaled = torch.empty_like(gradients[0])
        result = gradients[0].new_empty(ctx.shape, dtype=ctx.dtype)
        del scaled
        return result, None


class _Hqq(torch.autograd.Function):
    """HQQ: the input is kept, and a copy is made in three steps, each of the weight's size (0.2.8, Quantizer.dequantize)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        """The product of (input, weight)."""
        x, weight = inputs
        copy = _in_three_steps(weight, x.dtype)
        ctx.save_for_backward(x)
        ctx.weight = weight
        result = _product(x, weight)
        del copy
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the input."""
        (x,) = ctx.saved_tensors
        copy = _in_three_steps(ctx.weight, x.dtype)
        result = torch.empty_like(x)
        del copy
        return result, None


def _in_three_steps(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Unpacked, without the zero, times the scale."""
    steps = [torch.empty_like(weight, dtype=dtype) for _ in range(3)]
    return steps[-1]


_WAYS: dict[str, Any] = {"8bit": _Integers, "torchao": _KeptCopy, "hqq": _Hqq}
