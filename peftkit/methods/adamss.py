"""AdaMSS (NeurIPS 2025, openreview.net/forum?id=8ZdWmpYxT0): W + B_k A_k V^T in the rows of cluster k, V from the SVD of W."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, Number, PositiveFloat, PositiveInt, Section, Share


class AdamssSection(Section):
    """`adapter:` with `method: adamss`. Field names, meanings and defaults are those of `peft.AdamssConfig`."""

    method: Literal["adamss"] = Field("adamss", description="AdaMSS: low-rank updates in subspaces of each weight.")
    r: PositiveInt = Field(100, description="Singular vectors of a weight that are kept, at most its smaller side.")
    num_subspaces: PositiveInt = Field(5, description="Clusters that the rows of a weight are split into.")
    subspace_rank: PositiveInt = Field(1, description="Rank of a cluster's update; 1 to 4 is usual.")
    target_modules: TargetModules = None
    init_weights: Literal["orthogonal"] | None = Field(
        "orthogonal", description="Start as the base model; null starts with a small random update."
    )
    modules_to_save: ModulesToSave = None
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    use_asa: bool = Field(False, description="Freeze the least important subspaces while training (adaptive allocation).")
    asa_target_subspaces: Annotated[PositiveInt, Field(ge=2)] = Field(
        50, description="Subspaces of all layers together that stay in training, about (PEFT drops one more)."
    )
    init_warmup: NonNegativeInt = Field(50, description="Optimizer step at which freezing starts.")
    final_warmup: PositiveInt = Field(1000, description="Optimizer step at which it ends; above init_warmup.")
    mask_interval: PositiveInt = Field(100, description="Optimizer steps from one choice of subspaces to the next.")
    asa_importance_beta: Share = Field(0.85, description="Decay of the moving average of a subspace's importance.")
    asa_uncertainty_beta: Share = Field(0.85, description="Decay of the moving average of that importance's spread.")
    asa_schedule_exponent: PositiveFloat = Field(3.0, description="How fast subspaces are frozen: 1 evenly, above 1 early.")
    use_dynamic_rank: bool = Field(
        False, description="Lower a subspace's rank to its number of large singular values; subspace_rank is the most."
    )
    svd_threshold: Annotated[Number, Field(ge=0.0, lt=1.0)] = Field(
        0.1, description="Large means above this share of the largest one (use_dynamic_rank)."
    )
    random_seed: NonNegativeInt = Field(
        0, description="Seed of the decomposition, which is repeated when the adapter is loaded."
    )


_ASA = (
    "asa_target_subspaces",
    "init_warmup",
    "final_warmup",
    "mask_interval",
    "asa_importance_beta",
    "asa_uncertainty_beta",
    "asa_schedule_exponent",
)


def _check(section: AdamssSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.use_asa and section.init_warmup >= section.final_warmup:
        yield "init_warmup", f"must be below `final_warmup` ({section.final_warmup}), it is {section.init_warmup}"
    if section.use_asa and section.mask_interval > section.final_warmup:
        yield "mask_interval", f"is above `final_warmup` ({section.final_warmup}): no subspace would ever be frozen"
    for name in () if section.use_asa else _ASA:
        if getattr(section, name) != AdamssSection.model_fields[name].default:
            yield name, "has no effect without `use_asa`"
    if section.use_dynamic_rank and section.subspace_rank == 1:
        yield "use_dynamic_rank", "has no effect with `subspace_rank: 1`: no rank can be lowered"
    if not section.use_dynamic_rank and section.svd_threshold != AdamssSection.model_fields["svd_threshold"].default:
        yield "svd_threshold", "has no effect without `use_dynamic_rank`"


def _shapes(section: AdamssSection, inputs: int, outputs: int, bias: bool) -> list[tuple[int, ...]]:
    """For as many subspaces as were asked for, none smaller than its rank; clustering may find fewer."""
    rank = min(section.r, inputs + bias, outputs)
    return [(section.num_subspaces * section.subspace_rank, rank), (outputs, section.subspace_rank)]


def _fits(section: AdamssSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    """Each of these PEFT would lower without a word, but a subspace_rank above r, on which it fails."""
    smaller = min(inputs, outputs)
    if section.r > smaller:
        yield "r", f"is {section.r}, more than the smaller side, {smaller}, has singular vectors"
    if section.num_subspaces > outputs:
        yield "num_subspaces", f"is {section.num_subspaces}, but there are only {outputs} rows to split"
    most = min(section.r, smaller, max(1, outputs // section.num_subspaces))
    if section.subspace_rank > most and not section.use_dynamic_rank:
        yield "subspace_rank", f"is {section.subspace_rank}, too much for {section.num_subspaces} subspaces; at most {most}"


ADAMSS = Method(
    name="adamss",
    summary="Low-rank updates in subspaces, found by clustering each weight's singular vectors (AdaMSS, NeurIPS 2025)",
    section=AdamssSection,
    kind="weights",
    peft_config="AdamssConfig",
    quantizations=(),
    why_not_quantized="it takes the singular value decomposition of the weights",
    targets="query_value",
    linear_only=True,
    needs_whole_weights=True,
    not_compilable="each of its layers is another, and would be compiled for itself",
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 34.5% at 1e-4, with rank 32",
    check=_check,
    fits=_fits,
    runtime_module="peftkit.methods.adamss_torch",
    trained_shapes=_shapes,
    skips_parameters=lambda section: section.use_asa,
    reads_gradients=lambda section: section.use_asa,
)
