"""The files of the target `safetensors`, and plain transformers as the client that reads them."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from peftkit.exports.base import Check, Material
from peftkit.exports.logits_torch import compare_logits
from peftkit.exports.safetensors import SafetensorsOptions
from peftkit.recipe.quantization import Quantization

_CLIENT = f"transformers {transformers.__version__}"
_QUANTIZATIONS = {
    "none": None,
    "int8": Quantization("bitsandbytes", 8),
    "nf4": Quantization("bitsandbytes", 4, compute_dtype="bfloat16"),
}
# Largest difference of a logit over the largest logit: rounding of the weights.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


def write(material: Material, options: SafetensorsOptions, folder: Path) -> None:
    """Copy the merged model, or load it quantised and save that."""
    quantization = _QUANTIZATIONS[options.quantization]
    merged = material.merged(options.dtype)
    left_out = ("model*.safetensors*",) if quantization else ()
    shutil.copytree(merged, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
    if quantization is not None:
        material.open(merged, quantization).save_pretrained(folder)


def check(material: Material, options: SafetensorsOptions, folder: Path) -> Check:
    """Load the folder by plain transformers and compare logits; of quantised layers with those that were saved."""
    quantization = _QUANTIZATIONS[options.quantization]
    if quantization is None:
        return compare_folder(material, folder)
    found = _logits(material, material.open(folder))
    saved = _logits(material, material.open(material.merged(options.dtype), quantization))
    check = compare_logits(_CLIENT, saved, found, _TOLERANCE["float32"])
    moved = compare_logits(_CLIENT, material.logits("merged"), found, math.inf).numbers["max_abs_diff"]
    detail = f"{check.detail} from what was saved; rounding to {options.quantization} has moved them by at most {moved:.3g}"
    return dataclasses.replace(check, detail=detail, numbers={**check.numbers, "max_abs_diff_of_rounding": moved})


def compare_folder(material: Material, folder: Path) -> Check:
    """A folder of plain transformers against the merged model in float32."""
    model = material.open(folder)
    tolerance = _TOLERANCE[str(model.dtype).removeprefix("torch.")]
    return compare_logits(_CLIENT, material.logits("merged"), _logits(material, model.float()), tolerance)


def _logits(material: Material, model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [material.runtime.forward(model, batch).float() for batch in material.batches()]
