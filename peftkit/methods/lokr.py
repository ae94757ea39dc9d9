"""LoKr (LyCORIS, Yeh et al. 2023, arXiv:2309.14859): W + alpha / r * C (x) (B A), a Kronecker product; C small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import (
    AlphaPattern,
    ExcludeModules,
    LayersPattern,
    LayersToTransform,
    ModulesToSave,
    RankPattern,
    TargetModules,
)
from peftkit.methods.targeting import check_divides_both, check_targets
from peftkit.section import PositiveFloat, PositiveInt, Section, Share


class LoKrSection(Section):
    """`adapter:` with `method: lokr`. Field names, meanings and defaults are those of `peft.LoKrConfig`."""

    method: Literal["lokr"] = Field("lokr", description="LoKr: the Kronecker product of a small and a low-rank matrix.")
    r: PositiveInt = Field(8, description="Rank of the second factor; from half of its larger side on, it is trained whole.")
    alpha: PositiveFloat = Field(8, description="Scale: the update is multiplied by alpha / r.")
    rank_dropout: Share = Field(0.0, description="Share of the update's rows that are left out in a training step.")
    module_dropout: Share = Field(0.0, description="Probability that a module's whole update is left out in a training step.")
    decompose_both: bool = Field(False, description="Make the first factor low-rank too, where r is below half of its side.")
    decompose_factor: Literal[-1] | PositiveInt = Field(
        -1, description="Side of the first factor, where it divides the layer's sides; -1: about their square root."
    )
    rank_dropout_scale: bool = Field(False, description="Scale up the rows that rank_dropout leaves.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    init_weights: bool | Literal["lycoris"] = Field(
        True, description="Start as the base model with the first factor zero, or `lycoris` the second; false: random update."
    )
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    rank_pattern: RankPattern = Field({})
    alpha_pattern: AlphaPattern = Field({})
    modules_to_save: ModulesToSave = None


def _check(section: LoKrSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.rank_dropout_scale and not section.rank_dropout:
        yield "rank_dropout_scale", "has no effect without `rank_dropout`"


def _fits(section: LoKrSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.decompose_factor > 0:  # PEFT would take another one
        yield from check_divides_both("decompose_factor", section.decompose_factor, inputs, outputs)


LOKR = Method(
    name="lokr",
    summary="The Kronecker product of a small and a low-rank matrix (LyCORIS, Yeh et al. 2023)",
    section=LoKrSection,
    kind="weights",
    peft_config="LoKrConfig",
    quantizations=("8bit",),
    why_not_quantized="PEFT takes the packed 4-bit weights' shape for that of the layer",
    targets="query_value",
    linear_only=True,
    other_layers=("torchao",),
    not_compilable="torch.compile breaks off in its layers",
    size_fields=("r", "alpha"),
    learning_rate=3e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 46.6% at 3e-3, with r 32 and factor 4",
    left_out={"use_effective_conv2d": "for convolutions, which no model here has"},
    check=_check,
    fits=_fits,
    to_lora=True,
    skips_parameters=lambda section: section.module_dropout > 0,
)
