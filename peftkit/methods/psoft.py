"""PSOFT (Wu et al. 2025, arXiv:2505.11235): W + alpha / r * B (R - I) A; B, A upper singular directions, R orthogonal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, Number, PositiveFloat, PositiveInt, Section, Share


class PsoftSection(Section):
    """`adapter:` with `method: psoft`. Field names, meanings and defaults are those of `peft.PsoftConfig`."""

    method: Literal["psoft"] = Field("psoft", description="PSOFT: a rotation within the upper singular directions.")
    r: PositiveInt = Field(
        32, description="Singular directions that are rotated: r (r - 1) / 2 parameters; at most the smaller side of a weight."
    )
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    psoft_alpha: PositiveFloat = Field(32, description="Scale of the update, over r; equal to r as a rule.")
    psoft_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    ab_svd_init: Literal["psoft_init", "pissa_init"] = Field(
        "psoft_init", description="Where the singular values go: all into B (exactly orthogonal), or half into each."
    )
    psoft_svd: Literal["full", "lowrank"] = Field(
        "full", description="Exact singular value decomposition, or torch's randomised one (faster)."
    )
    psoft_svd_lowrank_niter: PositiveInt = Field(10, description="Power iterations of the randomised decomposition.")
    random_seed: NonNegativeInt = Field(0, description="Seed of the randomised decomposition.")
    psoft_orth: bool = Field(True, description="Keep R orthogonal (Cayley); false trains all of its r x r entries freely.")
    psoft_mag_b: bool = Field(True, description="Train a scale per direction on the output side of R.")
    psoft_mag_a: bool = Field(True, description="Train a scale per direction on the input side of R.")
    use_cayley_neumann: bool = Field(False, description="Approximate the Cayley transform by a series (faster, less exact).")
    num_cayley_neumann_terms: Annotated[PositiveInt, Field(ge=2)] = Field(5, description="Terms of that series.")
    cayley_neumann_eps: Annotated[Number, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="Bound of the generator's norm in that series, 0 to 1; 0.9 is usual. Default: none."
    )
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random rotation.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: PsoftSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    needs: tuple[tuple[str, bool, str], ...] = (
        ("psoft_svd_lowrank_niter", section.psoft_svd == "lowrank", "psoft_svd: lowrank"),
        ("random_seed", section.psoft_svd == "lowrank", "psoft_svd: lowrank"),
        ("use_cayley_neumann", section.psoft_orth, "psoft_orth: true"),
        ("num_cayley_neumann_terms", section.use_cayley_neumann, "use_cayley_neumann: true"),
        ("cayley_neumann_eps", section.use_cayley_neumann, "use_cayley_neumann: true"),
    )
    for name, met, need in needs:
        if not met and getattr(section, name) != PsoftSection.model_fields[name].default:
            yield name, f"has no effect without `{need}`"
    if section.r == 1 and section.psoft_orth:
        yield "r", "is 1: a single direction cannot be rotated; take 2 or more, or `psoft_orth: false`"


def _fits(section: PsoftSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.r > min(inputs, outputs):
        yield "r", f"is {section.r}, more than the weight has singular directions; at most {min(inputs, outputs)}"


PSOFT = Method(
    name="psoft",
    summary="Orthogonal rotation within the upper singular directions (Wu et al. 2025)",
    section=PsoftSection,
    kind="weights",
    peft_config="PsoftConfig",
    quantizations=(),
    why_not_quantized="it takes the singular value decomposition of the weights",
    targets="query_value",
    linear_only=True,
    size_fields=("r", "psoft_alpha"),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 44.9% at 1e-4",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    fits=_fits,
    to_lora=True,
)
