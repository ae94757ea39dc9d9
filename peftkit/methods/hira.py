"""HiRA (Huang et al. 2025, ICLR, openreview.net/forum?id=TwJrTz9cRS): W + W o (B A), o by entry: updates of high rank."""

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
from peftkit.section import PositiveInt, Section, Share


class HiraSection(Section):
    """`adapter:` with `method: hira`. Field names, meanings and defaults are those of `peft.HiraConfig`."""

    method: Literal["hira"] = Field("hira", description="HiRA: weights are scaled, entry by entry, by a low-rank matrix.")
    r: PositiveInt = Field(32, description="Rank of B A; the update itself has a higher one.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    hira_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    modules_to_save: ModulesToSave = None
    init_weights: bool | Literal["gaussian"] = Field(
        True, description="Start as the base model, with A Kaiming-uniform or `gaussian`; false starts with a random update."
    )
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    rank_pattern: RankPattern = Field({})


HIRA = Method(
    name="hira",
    summary="Weights scaled entry by entry by a low-rank matrix (Huang et al. 2025)",
    section=HiraSection,
    kind="weights",
    peft_config="HiraConfig",
    targets="query_value",
    size_fields=("r",),
    learning_rate=4.5e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 51.3% at 4.5e-3",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=check_targets,
)
