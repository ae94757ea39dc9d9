"""`onnx`: graphs for ONNX Runtime, transformers.js and whatever else reads ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.exports.base import Exporter, Finding
from peftkit.exports.graph_options import GraphOptions, lint_graph
from peftkit.exports.subject import Subject


class OnnxOptions(GraphOptions):
    """Options of the target `onnx`."""

    quantization: Literal["none", "int8"] = Field("none", description="int8: weights in 8 bits, activations as they come.")


def _lint(subject: Subject, options: OnnxOptions) -> Iterator[Finding]:
    yield from lint_graph(subject, options)
    if options.quantization == "int8" and options.dtype == "float16":
        yield Finding(True, "int8 is made from float32 weights: dtype=float16 would have no effect", "leave one of the two out")


ONNX = Exporter(
    name="onnx",
    summary="graphs for ONNX Runtime, with cached keys and values where text is generated",
    section=OnnxOptions,
    module="peftkit.engine.onnx_export",
    lint=_lint,
    requires={"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
)
