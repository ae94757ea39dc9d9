"""The files of the target `onnx`, and ONNX Runtime as the client that reads them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peftkit.engine.graph_clients import open_onnx
from peftkit.engine.graph_folder import check_files, graphs_for, model_of, write_companions
from peftkit.engine.graphs import Graph, in_float16
from peftkit.engine.joined_decoders import joined
from peftkit.engine.tracing import onnx_model
from peftkit.errors import CertificateError
from peftkit.exports.base import Check, Material
from peftkit.exports.onnx import OnnxOptions

if TYPE_CHECKING:
    import onnx_ir

_LARGEST_BYTES = 2_000_000_000  # protobuf's limit is 2 GiB for the whole file: larger weights lie beside it
# Largest difference of a number over the largest one, at least 1. Sums of float16 numbers err by some units in the third place.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


def write(material: Material, options: OnnxOptions, folder: Path) -> None:
    """Trace, save, prove, quantise."""
    model = model_of(material, options.form, options.task_id)
    graphs = graphs_for(model, material)
    if options.dtype == "float16":
        graphs = [in_float16(graph) for graph in graphs]
    for name, traced in _models(graphs):
        _save(traced, folder / f"{name}.onnx")
    write_companions(material, model, folder)
    if options.quantization != "none":
        _require_sound(material, options, folder)
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


def _require_sound(material: Material, options: OnnxOptions, folder: Path) -> None:
    """Prove files before they are quantised: what differs afterwards is quantisation alone.

    Raises:
        CertificateError: they give something else than the adapter.
    """
    found = _check(material, options, folder, _TOLERANCE[options.dtype])
    if not found.passed:
        raise CertificateError(f"onnx: {found.client}: before quantisation, {found.detail}; nothing was written")


def _quantise(path: Path) -> None:
    """Weights of matrix products in 8 bits, one scale for each column; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises to preprocess the model at each call
    with tempfile.TemporaryDirectory(prefix="peftkit-onnx-") as place:
        source = Path(place) / path.name
        for part in path.parent.glob(f"{path.name}*"):
            part.rename(source.with_name(part.name))
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8)
    root.setLevel(level)


def check(material: Material, options: OnnxOptions, folder: Path) -> Check:
    """Run the files in ONNX Runtime on the CPU, beside the adapter on its base in torch."""
    relative = _TOLERANCE[options.dtype] if options.quantization == "none" else None
    return _check(material, options, folder, relative)


def _check(material: Material, options: OnnxOptions, folder: Path, relative: float | None) -> Check:
    sessions = {path.stem: open_onnx(path) for path in folder.glob("*.onnx")}
    return check_files(material, options.task_id, sessions, relative)
