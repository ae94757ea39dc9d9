"""OFT (Qiu et al. 2023, arXiv:2306.07280): W R, with R = (I + Q)(I - Q)^-1 orthogonal and Q block-diagonal, skew-symmetric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets, divisors_text
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class OftSection(Section):
    """`adapter:` with `method: oft`. Field names, meanings and defaults are those of `peft.OFTConfig`."""

    method: Literal["oft"] = Field("oft", description="OFT: weights are rotated block by block.")
    r: NonNegativeInt = Field(0, description="Number of blocks; divides the input features, with `oft_block_size: 0`.")
    oft_block_size: NonNegativeInt = Field(
        32, description="Side of a block instead; divides the input features. 0 where r is given."
    )
    module_dropout: Share = Field(0.0, description="Share of the blocks that do not rotate in a training step.")
    target_modules: TargetModules = None
    bias: Literal["none", "all", "oft_only"] = Field("none", description="Biases of the base model to train as well.")
    exclude_modules: ExcludeModules = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with random rotations.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    modules_to_save: ModulesToSave = None
    coft: bool = Field(False, description="Keep the rotations within eps of none (constrained OFT).")
    eps: PositiveFloat = Field(6e-5, description="How far they may go, with `coft`.")
    block_share: bool = Field(False, description="One block for all places on the diagonal: fewer parameters.")
    use_cayley_neumann: bool = Field(True, description="Approximate the inverse by a series: faster, not exactly orthogonal.")
    num_cayley_neumann_terms: Annotated[PositiveInt, Field(ge=2)] = Field(5, description="Terms of that series.")


def _check(section: OftSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.r and section.oft_block_size:
        yield "r", "gives the blocks a second time; set `oft_block_size: 0` with it"
    if not section.r and not section.oft_block_size:
        yield "oft_block_size", "is 0 and `r` is too: one of them must say how large the blocks are"
    if section.oft_block_size == 1:
        yield "oft_block_size", "must be at least 2: a block of one number cannot rotate"
    if not section.coft and section.eps != OftSection.model_fields["eps"].default:
        yield "eps", "has no effect without `coft`"
    terms = OftSection.model_fields["num_cayley_neumann_terms"].default
    if not section.use_cayley_neumann and section.num_cayley_neumann_terms != terms:
        yield "num_cayley_neumann_terms", "has no effect without `use_cayley_neumann`"
    if section.block_share and section.module_dropout:
        yield "module_dropout", "has no effect with `block_share`: PEFT leaves a shared block in place"


def _fits(section: OftSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    """PEFT takes the next size that divides, with a warning that nobody sees."""
    size, number = section.oft_block_size, section.r
    if size and inputs % size:
        yield "oft_block_size", f"is {size}, which does not divide the inputs; {divisors_text(inputs, size, least=2)} would"
    if number and (inputs % number or inputs == number):
        would = divisors_text(inputs, number, most=inputs // 2)
        yield "r", f"is {number}, which makes no blocks of 2 or more of the inputs; {would} would"


OFT = Method(
    name="oft",
    summary="Block-diagonal orthogonal rotations of linear layers (Qiu et al. 2023)",
    section=OftSection,
    kind="weights",
    peft_config="OFTConfig",
    targets="query_value",
    linear_only=True,
    other_layers=("hqq",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 49.1% at 1e-4, with blocks of 32",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    fits=_fits,
)
