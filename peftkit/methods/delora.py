"""DeLoRA (Bini et al. 2025, arXiv:2503.18225): W + lambda / r * |W| * sum_i b_i a_i / (|b_i| |a_i|); a, b, lambda trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import (
    ExcludeModules,
    LayersPattern,
    LayersToTransform,
    ModulesToSave,
    RankPattern,
    TargetModules,
)
from peftkit.methods.targeting import check_targets
from peftkit.section import PositiveFloat, PositiveInt, Section, Share


class DeloraSection(Section):
    """`adapter:` with `method: delora`. Field names, meanings and defaults are those of `peft.DeloraConfig`."""

    method: Literal["delora"] = Field("delora", description="DeLoRA: low-rank updates of bounded norm.")
    r: PositiveInt = Field(8, description="Rank of the update.")
    delora_lambda: PositiveFloat = Field(15, description="Bound of the update's norm at the start; it is trained too.")
    module_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    bias: Literal["none", "all", "delora_only"] = Field("none", description="Biases of the base model to train as well.")
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    rank_pattern: RankPattern = Field({})
    lambda_pattern: dict[str, PositiveFloat] = Field(
        {}, description="delora_lambda by module name or regular expression, where it differs."
    )
    modules_to_save: ModulesToSave = None


DELORA = Method(
    name="delora",
    summary="Low-rank updates whose direction and strength are trained apart, with a bound (Bini et al. 2025)",
    section=DeloraSection,
    kind="weights",
    peft_config="DeloraConfig",
    quantizations=(),
    why_not_quantized="it takes the norms of the weights' columns",
    targets="query_value",
    linear_only=True,
    size_fields=("r",),
    learning_rate=1e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 46.8% at 1e-3",
    check=check_targets,
    to_lora=True,
)
