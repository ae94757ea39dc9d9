"""`openvino`: graphs for OpenVINO's runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.exports.base import Exporter, Finding
from peftkit.exports.graph_options import UNMERGED, GraphOptions, lint_graph
from peftkit.exports.subject import Subject


class OpenvinoOptions(GraphOptions):
    """Options of the target `openvino`."""

    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="Weights in 8 bits, or those of all but embeddings and the last layer in 4; activations stay."
    )


def _lint(subject: Subject, options: OpenvinoOptions) -> Iterator[Finding]:
    yield from lint_graph(subject, options)
    if options.quantization != "none" and importlib.util.find_spec("nncf") is None:
        yield Finding(True, f"quantization={options.quantization} needs nncf", "`pip install nncf` adds it")


OPENVINO = Exporter(
    name="openvino",
    summary="graphs for OpenVINO, with cached keys and values where text is generated",
    section=OpenvinoOptions,
    module="peftkit.engine.openvino_export",
    lint=_lint,
    unmerged=UNMERGED,
    requires={"openvino": "openvino"},
)
