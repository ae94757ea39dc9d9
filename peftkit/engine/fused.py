"""Layers in fewer passes over memory, with the same numbers: LoRA on a linear layer, gated feed-forward blocks, RMS norms.

Each replaces the forward of single modules, never of a class, and only where the module's own source is word for word the
formula that is replaced; all else stays as it is.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

_GATED = (
    "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
    "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\nreturn down_proj",
)
_NORM = """\
input_dtype = x.dtype
x = x.to(torch.float32)
variance = x.pow(2).mean(-1, keepdim=True)
x = x * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * x.to(input_dtype)"""


class _Lora(torch.autograd.Function):
    """x W' + b + scale (x A') B', the update added into the product in place, and its gradient likewise."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: LoraLinear, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """x (..., in) -> (..., out), in the dtype of autocast or of x."""
        dtype = _compute_dtype(x)
        base, rows = layer.get_base_layer(), x.reshape(-1, x.shape[-1]).to(dtype)
        bias = base.bias if base.bias is None else base.bias.to(dtype)
        output = nn.functional.linear(rows, base.weight.to(dtype), bias)
        inner = rows @ a.to(dtype).t()  # (N, r)
        output.addmm_(inner, b.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, base.weight, a, b, inner)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        # No `view`: models that write into what a layer gives (DeBERTa) may not do so into a view that was made in here.
        return torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B."""
        rows, weight, a, b, inner = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        dtype = gradient.dtype
        through_b = gradient @ b.to(dtype)  # (N, r)
        of_b = (gradient.t() @ inner.to(dtype)).mul_(ctx.scale)
        of_a = None if rows is None else (through_b.t() @ rows.to(dtype)).mul_(ctx.scale).to(a.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.to(dtype)).addmm_(through_b, a.to(dtype), alpha=ctx.scale)
            of_x = of_x.view(ctx.shape).to(ctx.dtype)
        return of_x, None, of_a, of_b.to(b.dtype), None


class _Gate(torch.autograd.Function):
    """act(gate) * up, keeping gate and up alone: the activation is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """All of shape (..., intermediate)."""
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            again = gate.detach().requires_grad_(True)
            activated = ctx.act(again)
        (of_gate,) = torch.autograd.grad(activated, again, gradients[0] * up)
        return of_gate, gradients[0] * activated.detach(), None


class _Norm(torch.autograd.Function):
    """weight * x / rms(x) of a frozen weight, keeping x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """x (..., D); the mean of squares is taken in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of x: (g - n mean(g n)) / rms with g = weight * gradient and n = x / rms."""
        x, weight, inverse = ctx.saved_tensors
        scaled, normed = (gradients[0] * weight).float(), x.float() * inverse
        mean = (scaled * normed).mean(-1, keepdim=True)
        return scaled.addcmul_(normed, mean, value=-1.0).mul_(inverse).to(x.dtype), None, None


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(_device(x)) if torch.is_autocast_enabled(_device(x)) else x.dtype


def _device(x: torch.Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # where a run is traced on shapes, autocast is the CPU's


def _lora_forward(self: LoraLinear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = self.active_adapters[0]
    others = bool(args or kwargs or self.disable_adapters or self.merged or self.active_adapters != ["default"])
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    same_dtype = torch.is_autocast_enabled(_device(x)) or x.dtype == a.dtype == self.get_base_layer().weight.dtype
    if others or not same_dtype:
        output: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return output
    return _Lora.apply(x, self, a, b, self.scaling[name])


def _gated_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x), self.act_fn))
    return output


def _norm_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(x, self.weight, self.variance_epsilon)


FORWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "LoRA layers": _lora_forward,
    "gated feed-forward blocks": _gated_forward,
    "RMS norms": _norm_forward,
}


def fusable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The kind (a key of `FORWARDS`) and module of every layer that has a shorter form."""
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain_lora(module):
            yield "LoRA layers", module
        elif _says(type(module), _GATED) and isinstance(module.act_fn, nn.Module) and not list(module.act_fn.parameters()):
            yield "gated feed-forward blocks", module
        elif _says(type(module), (_NORM,)) and not module.weight.requires_grad:
            yield "RMS norms", module


def fuse(kind: str, module: nn.Module) -> None:
    """Give a module its shorter forward."""
    module.forward = types.MethodType(FORWARDS[kind], module)


def separate(module: nn.Module) -> None:
    """Give it its own forward back."""
    module.__dict__.pop("forward", None)


@contextlib.contextmanager
def stirred(fused: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """LoRA layers whose B is still zero have small random numbers there meanwhile: with zeros a wrong update would not show."""
    layers = [module for kind, module in fused if kind == "LoRA layers"]
    weights = [module.lora_B["default"].weight for module in layers]  # type: ignore[index, union-attr]
    zeros = [weight for weight in weights if not weight.any()]
    with torch.no_grad():
        for weight in zeros:
            nn.init.normal_(weight, std=0.02)
        try:
            yield
        finally:
            for weight in zeros:
                weight.zero_()


def _is_plain_lora(layer: LoraLinear) -> bool:
    """Whether one adapter adds scale B A x to a frozen linear layer, and nothing else."""
    base, names = layer.get_base_layer(), list(layer.lora_A)
    if type(base) is not nn.Linear or names != ["default"] or layer.fan_in_fan_out or layer.lora_variant:
        return False
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return False
    plain = type(layer.lora_A["default"]) is nn.Linear and type(layer.lora_B["default"]) is nn.Linear
    return plain and layer.lora_B["default"].bias is None and isinstance(layer.lora_dropout["default"], nn.Identity)


def _says(kind: type[nn.Module], bodies: tuple[str, ...]) -> bool:
    """Whether the source of a class's forward(self, x) is one of these, whatever its argument is called."""
    return _body_of(kind.forward) in bodies


@functools.cache
def _body_of(forward: Any) -> str:
    """The source of a function of (self, x), its argument called x; empty where there is none, or it has other arguments."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ""
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2 or function.args.vararg or function.args.kwarg:
        return ""
    own = function.args.args[1].arg
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == own:
            node.id = "x"
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return ast.unparse(ast.Module(body, []))
