"""OSF (Nayak et al. 2025, arXiv:2504.07097): W = U S V^T; the largest singular directions stay, the others are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import Number, PositiveInt, Section

# All directions kept (1.0) would leave nothing to train.
KeptRank = PositiveInt | Annotated[Number, Field(gt=0.0, lt=1.0)]


class OSFSection(Section):
    """`adapter:` with `method: osf`. Field names, meanings and defaults are those of `peft.OSFConfig`."""

    method: Literal["osf"] = Field("osf", description="OSF: training of the lower singular directions of every weight.")
    effective_rank: KeptRank | None = Field(
        None,
        description="Singular directions that stay as they are, not those trained: a number of them, or a share (0 to 1). "
        "Default: half.",
    )
    target_modules: TargetModules = None
    rank_pattern: dict[str, KeptRank] | None = Field(
        None, description="effective_rank by module name or regular expression, where it differs."
    )
    init_weights: bool = Field(
        True, description="Start as the base model; false replaces the trained directions by random ones, far from it."
    )
    modules_to_save: ModulesToSave = None


def _check(section: OSFSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.rank_pattern == {}:
        yield "rank_pattern", "is empty and has no effect; leave it out"


def _fits(section: OSFSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    smaller, rank = min(inputs, outputs), section.effective_rank
    rank = 0.5 if rank is None else rank
    kept = int(smaller * rank) if isinstance(rank, float) else rank
    if kept >= smaller:
        yield "effective_rank", f"is {rank}, which keeps all {smaller} directions and trains none; at most {smaller - 1}"
    if kept == 0:
        yield "effective_rank", f"is {rank}, which keeps none of {smaller} directions, and PEFT needs one to keep"


OSF = Method(
    name="osf",
    summary="Trains the lower singular directions and keeps the upper ones, against forgetting (Nayak et al. 2025)",
    section=OSFSection,
    kind="weights",
    peft_config="OSFConfig",
    quantizations=(),
    why_not_quantized="it takes the singular value decomposition of the weights and trains its factors",
    targets="all_linear",
    linear_only=True,
    learning_rate=5e-5,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 42.7% at 5e-5",
    left_out={"target_svd_config": "PEFT ignores it"},
    check=_check,
    fits=_fits,
)
