"""The layers of a model compiled by torch.compile, one by one: what is compiled for the first serves all that are like it."""

from __future__ import annotations

import contextlib
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from peftkit.engine.adapted import backbone_of, encoder_and_decoder, layer_holder
from peftkit.engine.savings import recomputable

MAX_KINDS = 32


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that a model is a stack of, those of both stacks where it has two."""
    if layers := recomputable(model):
        return layers
    stacks = [stack for stack in encoder_and_decoder(model) if stack is not None] or [backbone_of(model)]
    lists = [part for stack in stacks for part in layer_holder(stack).children() if isinstance(part, nn.ModuleList)]
    return [layer for part in lists for layer in part]


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile the layers, for sequences of any length; names of modules and parameters stay as they are.

    Args:
        model: the base model inside the adapted one.
        backend: of torch.compile; tests take faster ones.
    """
    # Layers differ (with a window or without, with cross-attention), and so do their inputs (a gradient or none, a mask or
    # none, a batch of one): each kind is compiled for itself, once; torch stops at 8 (2.13).
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_KINDS)
    for layer in repeated_layers(model):
        layer.compile(dynamic=True, backend=backend)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The same model computing as it is written, for as long as the context lasts."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def compile_problem(model: PreTrainedModel, device: str) -> str:
    """Why this model cannot be compiled on this machine; empty where it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not repeated_layers(model):
        return f"{type(model).__name__} is no stack of layers that could be compiled one by one; use false"
    remedy = "install one (such as g++), or use false"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return f"needs a C++ compiler, this machine has none; {remedy}"
    if device == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return f"needs a C compiler, this machine has none; {remedy}"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"needs Python's headers, but there is no {header}; install them (such as python3-dev), or use false"
    return ""
