"""The files of the target `openvino`, and OpenVINO's runtime on the CPU as the client that reads them."""

from __future__ import annotations

from pathlib import Path

from peftkit.engine.graph_clients import open_openvino
from peftkit.engine.graph_folder import check_client, client_of, graphs_for, model_of, running, write_companions
from peftkit.engine.tracing import openvino_model
from peftkit.exports.base import Check, Material
from peftkit.exports.openvino import OpenvinoOptions

PREFIX = "openvino_"  # of file names, as optimum-intel has them
# Largest difference of a number over the largest one, at least 1.
_TOLERANCE = {"float32": 1e-4, "float16": 4e-3}


def write(material: Material, options: OpenvinoOptions, folder: Path) -> None:
    """Trace and save."""
    import openvino

    model = model_of(material, options.form, options.task_id)
    for graph in graphs_for(model, material):
        path = folder / f"{PREFIX}{graph.name}.xml"
        openvino.save_model(openvino_model(graph), path, compress_to_fp16=options.dtype == "float16")
    write_companions(material, model, folder)


def check(material: Material, options: OpenvinoOptions, folder: Path) -> Check:
    """Run the files on the CPU, in float32, beside the adapter on its base in torch."""
    model = model_of(material, "adapter", options.task_id)
    with running("openvino"):
        sessions = {path.stem.removeprefix(PREFIX): open_openvino(path) for path in folder.glob("*.xml")}
        return check_client(model, material, client_of(sessions, model, material), _TOLERANCE[options.dtype])
