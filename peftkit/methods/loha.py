"""LoHa (FedPara, arXiv:2108.06098; LyCORIS, arXiv:2309.14859): W + alpha / r * (B_1 A_1) o (B_2 A_2), o by entry."""

from __future__ import annotations

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
from peftkit.methods.targeting import check_targets
from peftkit.section import PositiveFloat, PositiveInt, Section, Share


class LoHaSection(Section):
    """`adapter:` with `method: loha`. Field names, meanings and defaults are those of `peft.LoHaConfig`."""

    method: Literal["loha"] = Field("loha", description="LoHa: the product, entry by entry, of two low-rank matrices.")
    r: PositiveInt = Field(8, description="Rank of each of the two matrices; their product has up to r squared.")
    alpha: PositiveFloat = Field(8, description="Scale: the update is multiplied by alpha / r.")
    rank_dropout: Share = Field(0.0, description="Share of the update's rows that are left out in a training step.")
    module_dropout: Share = Field(0.0, description="Probability that a module's whole update is left out in a training step.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    rank_pattern: RankPattern = Field({})
    alpha_pattern: AlphaPattern = Field({})
    modules_to_save: ModulesToSave = None


LOHA = Method(
    name="loha",
    summary="The Hadamard product of two low-rank updates (Hyeon-Woo et al. 2021; LyCORIS)",
    section=LoHaSection,
    kind="weights",
    peft_config="LoHaConfig",
    quantizations=("8bit",),
    why_not_quantized="PEFT takes the packed 4-bit weights' shape for that of the layer",
    targets="query_value",
    linear_only=True,
    other_layers=("torchao",),
    not_compilable="torch.compile breaks off in its layers",
    size_fields=("r", "alpha"),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 39.3% at 1e-4, with r 32",
    left_out={"use_effective_conv2d": "for convolutions, which no model here has"},
    check=check_targets,
    to_lora=True,
    skips_parameters=lambda section: section.module_dropout > 0,
)
