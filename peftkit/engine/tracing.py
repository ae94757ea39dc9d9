"""Graphs as ONNX and OpenVINO models, by transformers' own exporters (5.23): they mend what torch cannot translate alone."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.exporters.utils import get_leaf_tensors

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.graphs import Graph
from peftkit.engine.guard import raise_if_exhausted
from peftkit.engine.model import first_line
from peftkit.errors import RecipeError

if TYPE_CHECKING:
    import onnx_ir
    import openvino

OPSET = 18  # that torch's translations are written for; newer ones say the same in larger pieces that fewer clients know


def onnx_model(graph: Graph) -> onnx_ir.Model:
    """A graph in ONNX.

    Raises:
        RecipeError: it cannot be traced.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with _tracing(graph, "onnx"):
        config = OnnxConfig(dynamic_shapes=graph.dynamic_shapes, opset_version=OPSET)
        model, _ = OnnxExporter().export_program(graph.module, dict(graph.inputs), config)
    ClearMetadataAndDocStringPass()(model)  # the lines of Python that each node comes from: half of a small file
    _name_axes(model, graph)
    return model


def import_openvino() -> Any:
    """OpenVINO without the package by which it and nncf report every use to Google Analytics, unless the user forbade it."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # both do without
    import openvino

    return openvino


def openvino_model(graph: Graph) -> openvino.Model:
    """A graph in OpenVINO's representation.

    Raises:
        RecipeError: it cannot be traced.
    """
    import_openvino()
    from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

    with _tracing(graph, "openvino"):
        config = OpenVINOConfig(dynamic_shapes=graph.dynamic_shapes, stateful=False)
        model, _ = OpenVINOExporter().export_program(graph.module, dict(graph.inputs), config)
    # Sizes that no other input would tell a client: heads, and the width of each.
    model.reshape(
        {name: [-1 if axis in free else size for axis, size in enumerate(shape)] for name, shape, free in _axes(graph)}
    )
    return model


@contextlib.contextmanager
def _tracing(graph: Graph, target: str) -> Iterator[None]:
    """Without what the libraries print and log on the way; what fails becomes an error for users."""
    level, silence = logging.root.manager.disable, io.StringIO()
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    except Exception as error:  # whatever a model's code and two compilers can raise
        raise_if_exhausted(error)
        cause = error
        while isinstance(cause.__cause__, Exception):  # torch wraps it in a page of advice
            cause = cause.__cause__
        name = type(base_of_adapted(graph.module.model)).__name__  # type: ignore[arg-type]
        raise RecipeError(
            f"--target {target}: {name} cannot be traced ({graph.name}): {type(cause).__name__}: {first_line(cause)}"
        ) from error
    finally:
        logging.disable(level)


def _axes(graph: Graph) -> Iterator[tuple[str, torch.Size, Mapping[int, str]]]:
    """Of every input its name, the shape of its example, and the names of its free axes."""
    free = _flat(graph.axes)
    for name, tensor in get_leaf_tensors(graph.inputs).items():
        yield name, tensor.shape, free[name]


def _flat(axes: Any, prefix: str = "") -> dict[str, Mapping[int, str]]:
    """The axes of nested inputs by the names that the graph gives these."""
    if isinstance(axes, Mapping) and all(isinstance(key, int) for key in axes):
        return {prefix: axes}
    parts = axes.items() if isinstance(axes, Mapping) else enumerate(axes)
    return {name: free for key, part in parts for name, free in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()}


def _name_axes(model: onnx_ir.Model, graph: Graph) -> None:
    """Names for people in place of torch's symbols, in the shapes of inputs and outputs."""
    import onnx_ir

    names: dict[str, str] = {}
    inputs = {value.name: value for value in model.graph.inputs}
    for name, _, free in _axes(graph):
        value = inputs[name]
        assert value.shape is not None
        for axis, meaning in free.items():
            if isinstance(value.shape[axis], int):
                raise RecipeError(
                    f"--target onnx: {graph.name}: `{name}` would have a fixed {meaning}: its code cannot be traced"
                )
            names.setdefault(str(value.shape[axis]), meaning)
        value.shape = onnx_ir.Shape([free.get(axis, size) for axis, size in enumerate(value.shape)])
    for value in model.graph.outputs:
        sizes = [size if isinstance(size, int) else _renamed(str(size), names) for size in value.shape or ()]
        value.shape = onnx_ir.Shape(sizes)


def _renamed(expression: str, names: Mapping[str, str]) -> str:
    """`past_sequence_length + sequence_length` of `s22 + s70`."""
    return re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), expression)
