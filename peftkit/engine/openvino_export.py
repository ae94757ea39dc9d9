"""The files of the target `openvino`, and OpenVINO's runtime on the CPU as the client that reads them."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
from pathlib import Path

from peftkit.engine.graph_clients import open_openvino
from peftkit.engine.graph_folder import (
    check_export,
    client_of,
    graphs_for,
    model_of,
    require_sound,
    running,
    write_companions,
)
from peftkit.engine.tracing import import_openvino, openvino_model
from peftkit.exports.base import Check, Material
from peftkit.exports.openvino import OpenvinoOptions

PREFIX = "openvino_"  # of file names, as optimum-intel has them
# Largest difference of a number over the largest one, at least 1.
_TOLERANCE = {"float32": 1e-4, "float16": 4e-3}


def write(material: Material, options: OpenvinoOptions, folder: Path) -> None:
    """Trace, save, and quantise what has proven to be sound.

    Raises:
        CertificateError: it gives something else than the adapter, even before it is quantised.
    """
    openvino = import_openvino()
    model = model_of(material, options.form, options.task_id)
    for graph in graphs_for(model, material):
        path = folder / f"{PREFIX}{graph.name}.xml"
        openvino.save_model(openvino_model(graph), path, compress_to_fp16=options.dtype == "float16")
    write_companions(material, model, folder)
    if options.quantization == "none":
        return
    require_sound("openvino", check, material, options, folder)
    for path in sorted(folder.glob("*.xml")):
        _quantise(path, options.quantization)


def _quantise(path: Path, kind: str) -> None:
    """NNCF's compression of weights: asymmetric, one scale for each row of a matrix (int8) or for groups of it (int4)."""
    openvino = import_openvino()
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    modes = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_ASYM}
    # A matrix whose rows are no multiple of 128 numbers is divided into smaller groups.
    smaller = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    advanced = smaller if kind == "int4" else None
    with tempfile.TemporaryDirectory(prefix="peftkit-openvino-") as place, contextlib.redirect_stdout(io.StringIO()):
        model = openvino.Core().read_model(path)
        quantised = nncf.compress_weights(model, mode=modes[kind], advanced_parameters=advanced)
        openvino.save_model(quantised, Path(place) / path.name, compress_to_fp16=False)
        del model, quantised  # they read the weights from the old file
        for part in Path(place).iterdir():
            shutil.copyfile(part, path.parent / part.name)


def check(material: Material, options: OpenvinoOptions, folder: Path) -> Check:
    """Run the files on the CPU, in float32, beside the adapter on its base in torch."""
    model = model_of(material, "adapter", options.task_id)
    with running("openvino"):
        sessions = {path.stem.removeprefix(PREFIX): open_openvino(path) for path in folder.glob("*.xml")}
        return check_export(model, material, client_of(sessions, model, material), options, _TOLERANCE[options.dtype])
