"""GraLoRA (Jung et al. 2025, arXiv:2505.20355): W cut into k x k blocks, each with its own low-rank update of rank r / k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_divides_both, check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class GraloraSection(Section):
    """`adapter:` with `method: gralora`. Field names, meanings and defaults are those of `peft.GraloraConfig`."""

    method: Literal["gralora"] = Field("gralora", description="GraLoRA: low-rank updates block by block.")
    r: PositiveInt = Field(32, description="Rank: as many parameters as LoRA of this rank; a multiple of gralora_k.")
    hybrid_r: NonNegativeInt = Field(0, description="Rank of a plain LoRA update beside the blocks; 0: none.")
    target_modules: TargetModules = None
    alpha: PositiveFloat = Field(64, description="Scale: the update is multiplied by alpha / (r + hybrid_r).")
    gralora_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    gralora_k: PositiveInt = Field(
        2, description="Blocks per side of the weight; divides the input and the output features. 4 is usual from r 64 on."
    )
    bias: Literal["none", "all", "gralora_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: GraloraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.r % section.gralora_k:
        yield "gralora_k", f"must divide `r`, which is {section.r}; it is {section.gralora_k}"


def _fits(section: GraloraSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    return check_divides_both("gralora_k", section.gralora_k, inputs, outputs)


GRALORA = Method(
    name="gralora",
    summary="Low-rank updates block by block, with k times the rank of LoRA of equal size (Jung et al. 2025)",
    section=GraloraSection,
    kind="weights",
    peft_config="GraloraConfig",
    targets="query_value",
    other_layers=("torchao",),
    size_fields=("r", "alpha"),
    learning_rate=2e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 49.5% at 2e-4",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    fits=_fits,
    to_lora=True,
)
