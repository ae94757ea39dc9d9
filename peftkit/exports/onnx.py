"""`onnx`: graphs for ONNX Runtime, transformers.js and whatever else reads ONNX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.exports.base import Exporter
from peftkit.exports.graph_options import UNMERGED, GraphOptions, lint_graph


class OnnxOptions(GraphOptions):
    """Options of the target `onnx`."""

    quantization: Literal["none", "int8"] = Field("none", description="int8: weights in 8 bits, activations as they come.")


ONNX = Exporter(
    name="onnx",
    summary="graphs for ONNX Runtime, with cached keys and values where text is generated",
    section=OnnxOptions,
    module="peftkit.engine.onnx_export",
    lint=lint_graph,
    unmerged=UNMERGED,
    requires={"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
)
