"""The files of the target `safetensors`, and plain transformers as the client that reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers

from peftkit.exports.base import Check, Material
from peftkit.exports.logits_torch import compare_logits
from peftkit.exports.safetensors import SafetensorsOptions
from peftkit.recipe.quantization import Quantization

_QUANTIZATIONS = {
    "none": None,
    "int8": Quantization("bitsandbytes", 8),
    "nf4": Quantization("bitsandbytes", 4, compute_dtype="bfloat16"),
}
# Largest difference of a logit over the largest logit. That of quantised weights says no more than that the file is whole:
# rounding to 4 bits moves logits of small models by a tenth.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3, "int8": 0.1, "nf4": 0.5}


def write(material: Material, options: SafetensorsOptions, folder: Path) -> None:
    """Copy the merged model, or load it quantised and save that."""
    quantization = _QUANTIZATIONS[options.quantization]
    merged = material.merged(options.dtype)
    left_out = ("model*.safetensors*",) if quantization else ()
    shutil.copytree(merged, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
    if quantization is not None:
        material.open(merged, quantization).save_pretrained(folder)


def check(material: Material, options: SafetensorsOptions, folder: Path) -> Check:
    """Load the folder by plain transformers and compare logits."""
    return compare_folder(material, folder, options.quantization)


def compare_folder(material: Material, folder: Path, quantization: str = "none") -> Check:
    """A folder of plain transformers against the merged model in float32."""
    model = material.open(folder)
    kind = str(model.dtype).removeprefix("torch.") if quantization == "none" else quantization
    model = model.float() if quantization == "none" else model
    with torch.inference_mode():
        found = [material.runtime.forward(model, batch).float() for batch in material.batches()]
    return compare_logits(f"transformers {transformers.__version__}", material.logits("merged"), found, _TOLERANCE[kind])
