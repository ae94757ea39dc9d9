"""`openvino`: graphs for OpenVINO's runtime."""

from __future__ import annotations

from peftkit.exports.base import Exporter
from peftkit.exports.graph_options import UNMERGED, GraphOptions, lint_graph


class OpenvinoOptions(GraphOptions):
    """Options of the target `openvino`."""


OPENVINO = Exporter(
    name="openvino",
    summary="graphs for OpenVINO, with cached keys and values where text is generated",
    section=OpenvinoOptions,
    module="peftkit.engine.openvino_export",
    lint=lint_graph,
    unmerged=UNMERGED,
    requires={"openvino": "openvino"},
)
