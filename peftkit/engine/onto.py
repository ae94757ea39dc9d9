"""The weights that an adapter of a quantised base is merged into: those that it saw, the original ones, or quantised ones."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.certify import TOLERANCE, largest_difference, reference_logits, scale_of
from peftkit.engine.facts import AdapterFacts
from peftkit.engine.in_files import cast
from peftkit.engine.loaded import CPU, LoadedAdapter, load_adapter
from peftkit.engine.merge import Wanted, copy_companions, merge_adapter, own_probes, require, stored_layers
from peftkit.engine.model import Base, load_base_model, load_config, meta_model, set_pad_token
from peftkit.engine.quantized import bitsandbytes_layers, compute_in_float32, linear_names
from peftkit.errors import RecipeError
from peftkit.recipe.quantization import Quantization
from peftkit.run import new_folder

CHOICES = ("dequantized", "original", "quantized")


def why_not_onto(folder: Path, facts: AdapterFacts, original: str | None) -> dict[str, str]:
    """Every choice with the reason why it is not to be had, empty where it is.

    Args:
        folder: the adapter folder.
        facts: how it was trained.
        original: the unquantised base, where it is named.

    Raises:
        RecipeError: the base is not quantised.
    """
    quantization = stored_layers(folder, facts)
    if quantization is None:
        raise RecipeError("--onto: has no effect: the adapter was not trained on a quantised base")
    reasons = dict.fromkeys(CHOICES, "")
    if quantization.is_stored and original is None:
        reasons["original"] = (
            f"`{facts.base}` has quantised weights only; name the model they were made of with --original-base"
        )
    if quantization.method != "bitsandbytes":
        reasons["quantized"] = f"transformers stores weights of bitsandbytes, and these are quantised by {quantization.method}"
    return reasons


def merge_onto(loaded: LoadedAdapter, choice: str, original: str | None, wanted: Wanted) -> dict[str, Any]:
    """Merge an adapter of a quantised base into the chosen weights.

    Args:
        loaded: the adapter on its quantised base, on the CPU; its base is computed in float32 from here on.
        choice: one of `CHOICES`.
        original: the unquantised base; None: the one that was quantised while it was loaded.
        wanted: what to write.

    Returns:
        What `merge_adapter` does, and `onto` and `distance`: the largest difference of logits from base and adapter as trained.

    Raises:
        CertificateError: the result is not what the adapter makes of these weights.
    """
    if choice == "dequantized":
        found = merge_adapter(loaded, wanted)
        return found | {"onto": choice, "distance": found["max_abs_diff_saved"]}
    if choice == "quantized":
        return {"onto": choice, **_requantized(loaded, wanted)}
    examples = own_probes(loaded)
    trained = reference_logits(compute_in_float32(loaded.model, wanted.keep), loaded.runtime, examples)
    plain = load_adapter(loaded.folder, original or loaded.facts.base, CPU, quantized=False)
    found = merge_adapter(plain, wanted)
    alone = load_alone(wanted.output, loaded, wanted.dtype)
    logits = reference_logits(cast(alone, torch.float32, wanted.keep), loaded.runtime, examples)
    return found | {"onto": choice, "distance": largest_difference(trained, logits)}


def load_alone(folder: Path, loaded: LoadedAdapter, dtype: str) -> PreTrainedModel:
    """A merged model, quantised or not, as transformers loads it, on the CPU."""
    base = Base(str(folder), loaded.task, dtype, trust_remote_code=loaded.facts.trust_remote_code, device=CPU)
    raw = getattr(load_config(base), "quantization_config", None)
    if raw is not None:
        quantization = stored_layers(loaded.folder, loaded.facts)
        assert quantization is not None
        base = dataclasses.replace(base, quantization=dataclasses.replace(quantization, is_stored=True, skip_modules=()))
    model, _ = load_base_model(base)
    set_pad_token(model, loaded.runtime.tokenizer)
    return model


def _requantized(loaded: LoadedAdapter, wanted: Wanted) -> dict[str, Any]:
    """Merge into the full weights, quantise the same layers again, write them as bitsandbytes stores them."""
    dtype, examples = wanted.dtype, own_probes(loaded)
    trained = reference_logits(compute_in_float32(loaded.model, wanted.keep), loaded.runtime, examples)
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=wanted.output.parent) as place:
        plain = Path(place) / "plain"
        found = merge_adapter(loaded, dataclasses.replace(wanted, output=plain, dtype="float32"))
        quantized = _quantize(plain, loaded, dtype)
        with new_folder(wanted.output) as folder:
            quantized.save_pretrained(folder, max_shard_size=wanted.max_shard_size)
            copy_companions(folder, loaded)
            computed = reference_logits(compute_in_float32(quantized, wanted.keep), loaded.runtime, examples)
            alone = compute_in_float32(load_alone(folder, loaded, dtype), wanted.keep)
            logits = reference_logits(alone, loaded.runtime, examples)
            allowed = TOLERANCE["float32"] * scale_of(computed)
            saved = largest_difference(computed, logits)
            require(saved, allowed, "quantised and saved", "the quantised model's")
    distance = largest_difference(trained, logits)
    written = {"output": str(wanted.output), "dtype": dtype, "max_abs_diff_saved": saved, "tolerance": allowed}
    return found | written | {"distance": distance}


def _quantize(plain: Path, loaded: LoadedAdapter, dtype: str) -> PreTrainedModel:
    """The merged model with those of its layers quantised that are so in the base."""
    quantization = stored_layers(loaded.folder, loaded.facts)
    assert quantization is not None
    source = Base(str(plain), loaded.task, dtype, trust_remote_code=loaded.facts.trust_remote_code, device=CPU)
    linear = linear_names(meta_model(dataclasses.replace(source, dtype="float32"), load_config(source)))
    quantized = _quantized_names(loaded.model)
    kept = [name for name in linear if name not in quantized]
    model, _ = load_base_model(dataclasses.replace(source, quantization=_anew(quantization, kept, dtype)))
    set_pad_token(model, loaded.runtime.tokenizer)
    return model


def _anew(quantization: Quantization, kept: Sequence[str], dtype: str) -> Quantization:
    """The same quantisation for weights that are not stored quantised."""
    compute_dtype = dtype if quantization.compute_dtype == "auto" else quantization.compute_dtype
    return dataclasses.replace(quantization, is_stored=False, skip_modules=tuple(kept), compute_dtype=compute_dtype)


def _quantized_names(model: nn.Module) -> set[str]:
    """Names of bitsandbytes' layers, as the model without an adapter has them."""
    layers = {id(layer) for layer in bitsandbytes_layers(model)}
    named = base_of_adapted(model).named_modules()
    return {name.removesuffix(".base_layer") for name, module in named if id(module) in layers}
