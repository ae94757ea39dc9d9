"""Lily (Zhong et al. 2024, arXiv:2407.09946): W x + scaling * sum_e p_e(x) B_e A x, with A and B_e shared by layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import PositiveFloat, PositiveInt, Section


class LilySection(Section):
    """`adapter:` with `method: lily`. Field names, meanings and defaults are those of `peft.LilyConfig`."""

    method: Literal["lily"] = Field("lily", description="Lily: low-rank updates whose factors are shared by layers.")
    r: PositiveInt = Field(32, description="Rank of the update; 2 to 4 times LoRA's is usual, as factors are shared.")
    stride_A: PositiveInt = Field(1, description="Neighbouring layers that share one A; 1: none do.")  # noqa: N815
    num_B: Annotated[PositiveInt, Field(ge=2)] = Field(  # noqa: N815
        2, description="Factors B, shared by all layers, that the router mixes."
    )
    scaling: PositiveFloat = Field(1.0, description="Scale of the update, not divided by r.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    modules_to_save: ModulesToSave = None
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")


LILY = Method(
    name="lily",
    summary="Low-rank updates with factors shared across layers and a router (Zhong et al. 2024)",
    section=LilySection,
    kind="weights",
    peft_config="LilyConfig",
    not_mergeable="its router mixes the factors by the input",
    not_one_graph="its router looks at all tokens of a pass, so that a cache or padding would change the answer",
    targets="query_value",
    linear_only=True,
    other_layers=("torchao",),
    size_fields=("r",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 52.6% at 1e-4, with r 140, scaling 8",
    check=check_targets,
    rows_interact=True,
)
