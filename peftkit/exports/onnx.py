"""`onnx`: graphs for ONNX Runtime, transformers.js and whatever else reads ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from peftkit.exports.base import Exporter, Finding
from peftkit.exports.graph_options import UNMERGED, GraphOptions, lint_graph
from peftkit.exports.subject import Subject


class OnnxOptions(GraphOptions):
    """Options of the target `onnx`."""

    quantization: Literal["none", "int8"] = Field("none", description="int8: weights in 8 bits, activations as they come.")
    data: str | None = Field(None, description="File of rows to measure the task's metrics on, before and after quantisation.")


def _lint(subject: Subject, options: OnnxOptions) -> Iterator[Finding]:
    yield from lint_graph(subject, options)
    if options.quantization == "int8" and options.dtype == "float16":
        yield Finding(True, "int8 is made from float32 weights: dtype=float16 would have no effect", "leave one of the two out")
    if options.data is not None and options.quantization == "none":
        yield Finding(True, "data has no effect without quantization: the numbers are those of `evaluate`", "leave it out")
    if options.data is not None and not Path(options.data).is_file():
        yield Finding(True, f"data: there is no file `{options.data}`", "name one with rows as for `evaluate --data`")


ONNX = Exporter(
    name="onnx",
    summary="graphs for ONNX Runtime, with cached keys and values where text is generated",
    section=OnnxOptions,
    module="peftkit.engine.onnx_export",
    lint=_lint,
    unmerged=UNMERGED,
    requires={"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
)
