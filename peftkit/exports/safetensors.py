"""`safetensors`: the merged model as a plain transformers folder, quantised by bitsandbytes where that is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.exports.base import Dtype, Exporter, Finding
from peftkit.exports.subject import Subject
from peftkit.section import Section


class SafetensorsOptions(Section):
    """Options of the target `safetensors`."""

    dtype: Dtype = Field("auto", description="Dtype of the written weights, of those that are not quantised; auto: the base's.")
    quantization: Literal["none", "int8", "nf4"] = Field("none", description="Linear layers as bitsandbytes stores them.")


def _lint(subject: Subject, options: SafetensorsOptions) -> Iterator[Finding]:
    if options.quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        yield Finding(True, f"quantization {options.quantization} needs bitsandbytes", "`pip install bitsandbytes` adds it")


SAFETENSORS = Exporter(
    name="safetensors",
    summary="one stand-alone model for plain transformers, in any dtype or in 8 or 4 bits",
    section=SafetensorsOptions,
    module="peftkit.exports.safetensors_torch",
    lint=_lint,
)
