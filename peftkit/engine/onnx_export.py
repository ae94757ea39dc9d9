"""The files of the target `onnx`, and ONNX Runtime as the client that reads them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.engine.graph_clients import open_onnx
from peftkit.engine.graph_folder import (
    check_export,
    client_of,
    graphs_for,
    model_of,
    require_sound,
    running,
    write_companions,
)
from peftkit.engine.graphs import in_float16
from peftkit.engine.joined_decoders import joined
from peftkit.engine.tracing import onnx_model
from peftkit.exports.base import Check, Material
from peftkit.exports.onnx import OnnxOptions

if TYPE_CHECKING:
    import onnx_ir

    from peftkit.engine.graphs import Graph

_LARGEST_BYTES = 2_000_000_000  # protobuf's limit is 2 GiB for the whole file: larger weights lie beside it
# Largest difference of a number over the largest one, at least 1. Sums of float16 numbers err by some units in the third place.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


def write(material: Material, options: OnnxOptions, folder: Path) -> None:
    """Trace, save, and quantise what has proven to be sound.

    Raises:
        CertificateError: it gives something else than the adapter, even before it is quantised.
    """
    model = model_of(material, options.form, options.task_id)
    graphs = graphs_for(model, material)
    for name, traced in _models([in_float16(graph) for graph in graphs] if options.dtype == "float16" else graphs):
        _save(traced, folder / f"{name}.onnx")
    write_companions(material, model, folder)
    if options.quantization == "none":
        return
    require_sound("onnx", check, material, options, folder)
    for path in sorted(folder.glob("*.onnx")):
        _quantise(path)


def _models(graphs: list[Graph]) -> Iterator[tuple[str, onnx_ir.Model]]:
    """The models to save, by name: both passes of a decoder that reads an encoder become one."""
    made = {graph.name: onnx_model(graph) for graph in graphs}
    if "decoder_model" in made:
        yield "decoder_model_merged", joined(made.pop("decoder_model"), made.pop("decoder_with_past_model"))
    yield from made.items()


def _save(model: onnx_ir.Model, path: Path) -> None:
    import onnx_ir

    num_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    onnx_ir.save(model, path, external_data=f"{path.name}_data" if num_bytes > _LARGEST_BYTES else None)


def _quantise(path: Path) -> None:
    """Weights of matrix products in 8 bits, one scale for each column; activations are quantised as they come."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # at each call it advises to preprocess the model
    with tempfile.TemporaryDirectory(prefix="peftkit-onnx-") as place:
        result = Path(place) / path.name
        quantize_dynamic(path, result, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)
        quantised = onnx_ir.load(result)
        onnx_ir.external_data.load_to_model(quantised)
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    _save(quantised, path)
    logging.root.setLevel(level)


def check(material: Material, options: OnnxOptions, folder: Path) -> Check:
    """Run the files in ONNX Runtime on the CPU, beside the adapter on its base in torch."""
    model = model_of(material, "adapter", options.task_id)
    with running("onnx"):
        client = client_of({path.stem: open_onnx(path) for path in folder.glob("*.onnx")}, model, material)
        return check_export(model, material, client, options, _TOLERANCE[options.dtype])
