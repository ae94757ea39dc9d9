"""Quantised bases: what a recipe asks for, what a checkpoint has already, and which methods train on it. Free of torch."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.methods import METHODS
from peftkit.methods.base import Layers, Method
from peftkit.recipe.findings import Finding, written
from peftkit.recipe.schema import QuantizationSection, Recipe
from peftkit.section import Section

Library = Literal["bitsandbytes", "torchao", "hqq", "gptq", "awq"]

_PACKAGES: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "hqq": ("hqq",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
}
_STORED = ("bitsandbytes", "gptq", "awq")
_BITS: dict[str, tuple[int, ...]] = {"bitsandbytes": (4, 8), "torchao": (8,), "hqq": (1, 2, 3, 4, 8)}
_USED: dict[tuple[str, int], tuple[str, ...]] = {
    ("bitsandbytes", 4): ("quant_type", "double_quant", "compute_dtype", "quant_storage"),
    ("bitsandbytes", 8): ("llm_int8_threshold",),
    **{("hqq", bits): ("group_size", "compute_dtype") for bits in _BITS["hqq"]},
}
_CHOICES = ("quant_type", "double_quant", "compute_dtype", "quant_storage", "llm_int8_threshold", "group_size")


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base model are quantised.

    Attributes:
        method: the library that holds the layers.
        bits: bits of a weight.
        quant_type: data type of 4-bit weights.
        double_quant: whether the scales of 4-bit weights are quantised too.
        compute_dtype: what 4-bit and HQQ weights are multiplied in; `auto` is decided by the plan.
        quant_storage: dtype that packed 4-bit weights lie in.
        llm_int8_threshold: inputs beyond this stay in 16 bits, for 8-bit weights; 0: none do.
        group_size: weights that share a scale, for HQQ.
        is_stored: whether the checkpoint holds quantised weights; they are quantised while loading where it does not.
        skip_modules: full names of linear layers that stay as they are.
    """

    method: str
    bits: int
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "auto"
    quant_storage: str = "uint8"
    llm_int8_threshold: float = 6.0
    group_size: int = 64
    is_stored: bool = False
    skip_modules: tuple[str, ...] = ()

    @property
    def layers(self) -> Layers:
        """What kind of layers they are, in the words of the methods' facts."""
        if self.method == "bitsandbytes":
            return "4bit" if self.bits == 4 else "8bit"
        return self.method  # type: ignore[return-value]

    @property
    def computes_in(self) -> str | None:
        """The dtype that products are computed in; None where it is that of the inputs."""
        return self.compute_dtype if "compute_dtype" in _USED.get((self.method, self.bits), ()) else None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quantization:
        """What `dataclasses.asdict` made of one."""
        return cls(**{**data, "skip_modules": tuple(data["skip_modules"])})

    def __str__(self) -> str:
        """In a word or two: `bitsandbytes, 4 bits (nf4, double)`."""
        detail = f" ({self.quant_type}{', double' if self.double_quant else ''})" if self.layers == "4bit" else ""
        return f"{self.method}, {self.bits} bits{detail}"


def stated_quantization(recipe: Recipe) -> Quantization | None:
    """What a recipe asks for; None where it asks for none."""
    section = recipe.model.quantization
    return Quantization(**section.model_dump()) if section is not None else None


def stored_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What a config.json says of its weights; None where they are plain. A library that is not known here keeps its name."""
    raw = config.get("quantization_config")
    if not isinstance(raw, Mapping):
        return None
    method = str(raw.get("quant_method", "bitsandbytes" if "load_in_4bit" in raw else "unknown"))
    if method == "bitsandbytes" and raw.get("load_in_4bit"):
        return Quantization(
            method,
            4,
            quant_type=str(raw.get("bnb_4bit_quant_type", "fp4")),
            double_quant=bool(raw.get("bnb_4bit_use_double_quant", False)),
            quant_storage=str(raw.get("bnb_4bit_quant_storage", "uint8")),
            is_stored=True,
        )
    if method == "bitsandbytes":
        return Quantization(method, 8, llm_int8_threshold=float(raw.get("llm_int8_threshold", 6.0)), is_stored=True)
    return Quantization(method, int(raw.get("bits", 0) or 0), is_stored=True)


def quantization_of(recipe: Recipe, config: Mapping[str, Any]) -> Quantization | None:
    """The quantisation of a recipe on a model with this config.json: the checkpoint's own, or what the recipe asks for."""
    stated, stored = stated_quantization(recipe), stored_quantization(config)
    if stored is None or recipe.model.init == "random":
        return stated
    return dataclasses.replace(stored, compute_dtype=stated.compute_dtype) if stated is not None else stored


def check_quantization(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What cannot be quantised as the recipe says, and what cannot be trained on what the checkpoint has.

    Args:
        recipe: the recipe.
        config: the model's config.json; empty where it is not at hand.
    """
    section, stored = recipe.model.quantization, stored_quantization(config)
    stored = stored if recipe.model.init != "random" else None
    if section is not None and (stored is None or stored.method == "bitsandbytes"):
        yield from _stated(section)
    if stored is not None:
        yield from _stored(stored, section)
    found = quantization_of(recipe, config)
    if found is not None and found.method in _PACKAGES:
        for field, what in why_not_quantized(METHODS[recipe.adapter.method], recipe.adapter, found.layers):
            yield f"adapter.{field}", what, 2


def _stated(section: QuantizationSection) -> Iterator[Finding]:
    method, bits = section.method, section.bits
    if bits not in _BITS[method]:
        able = " or ".join(map(str, _BITS[method]))
        yield "model.quantization.bits", f"is {bits}; PEFT trains on layers of {method} with {able} bits", 2
        return
    for name in written(section, *_CHOICES):
        if name not in _USED.get((method, bits), ()):
            yield f"model.quantization.{name}", f"has no effect with `method: {method}` and `bits: {bits}`", 2
    yield from _missing_packages(method, "model.quantization.method", 2)


def _missing_packages(method: str, key: str, code: int) -> Iterator[Finding]:
    missing = [name for name in _PACKAGES[method] if importlib.util.find_spec(name) is None]
    if missing:
        yield key, f"{method} needs {' and '.join(missing)}; `pip install {' '.join(missing)}` adds what is missing", code


def _stored(stored: Quantization, section: QuantizationSection | None) -> Iterator[Finding]:
    if stored.method not in _STORED:
        what = (
            f"its weights are quantised by `{stored.method}`, as its config.json says; those of bitsandbytes, gptq and awq load"
        )
        yield "model.name_or_path", what, 7
        return
    yield from _missing_packages(stored.method, "model.name_or_path", 7)
    if section is None:
        return
    stated = [name for name in ("method", "bits", *_CHOICES) if name in section.model_fields_set]
    if stored.method != "bitsandbytes":
        for name in stated:
            if name != "bits":
                what = f"has no effect on weights that are quantised already: {stored}; leave `quantization` out"
                yield f"model.quantization.{name}", what, 2
        stated = [name for name in stated if name == "bits"]
    for name in stated:
        if name != "compute_dtype" and getattr(section, name) != getattr(stored, name):
            what = f"is {getattr(section, name)}, but the weights are quantised already: {stored}; leave `quantization` out"
            yield f"model.quantization.{name}", what, 2


def why_not_quantized(method: Method, section: Section, layers: Layers) -> Iterator[tuple[str, str]]:
    """(field, sentence) for what a method, or these settings of it, cannot do on quantised layers."""
    if layers not in method.trains_on:
        others = ", ".join(name for name, other in METHODS.items() if layers in other.trains_on)
        reason = (
            method.why_not_quantized or "PEFT has no such layers of its own for it, and reads the weights as if they were plain"
        )
        yield "method", f"`{method.name}` does not work on {layers} layers: {reason}. These do: {others}"
        return
    yield from method.not_quantized_with(section, layers)


def why_not_plain(quantization: Quantization | None) -> str:
    """Why the layers of a base cannot be turned into plain ones, which a merge needs; empty where they can, or are."""
    if quantization is None or quantization.method not in ("gptq", "awq"):
        return ""
    return f"{quantization.method} layers cannot be turned into plain ones here; use the library that made them"


def trains_biases(method: Method, section: Any) -> bool:
    """Whether biases of the base's linear layers are trained."""
    if method.kind == "subset":
        return method.trains("layer.bias") and not method.stands_alone
    return bool(getattr(section, "bias", "none") != "none")
