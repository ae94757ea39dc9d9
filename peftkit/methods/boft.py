"""BOFT (Liu et al. 2023, arXiv:2311.06243): diag(s) W R, with R block-diagonal and orthogonal; R and s are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets, divisors_text
from peftkit.section import NonNegativeInt, Section, Share


class BoftSection(Section):
    """`adapter:` with `method: boft`. Field names, meanings and defaults are those of `peft.BOFTConfig`."""

    method: Literal["boft"] = Field("boft", description="BOFT: weights are rotated block by block, and their rows scaled.")
    boft_block_size: NonNegativeInt = Field(
        4, description="Side of a block; divides the input features. 0 where boft_block_num is given."
    )
    boft_block_num: NonNegativeInt = Field(
        0, description="Number of blocks instead; divides the input features, with `boft_block_size: 0`."
    )
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    boft_dropout: Share = Field(0.0, description="Share of the blocks that do not rotate in a training step.")
    bias: Literal["none", "all", "boft_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with random rotations.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: BoftSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.boft_block_size and section.boft_block_num:
        yield "boft_block_num", "gives the blocks a second time; set `boft_block_size: 0` with it"
    if not section.boft_block_size and not section.boft_block_num:
        yield "boft_block_size", "is 0 and `boft_block_num` is too: one of them must say how large the blocks are"
    if section.boft_block_size == 1:
        yield "boft_block_size", "must be at least 2: a block of one number cannot rotate"


def _shapes(section: BoftSection, inputs: int, outputs: int, bias: bool) -> list[tuple[int, ...]]:
    size = section.boft_block_size or inputs // section.boft_block_num
    return [(1, inputs // size, size, size), (outputs, 1)]


def _fits(section: BoftSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    size, number = section.boft_block_size, section.boft_block_num
    if size and inputs % size:
        yield "boft_block_size", f"is {size}, which does not divide the inputs; {divisors_text(inputs, size, least=2)} would"
    if number and (inputs % number or inputs == number):
        would = divisors_text(inputs, number, most=inputs // 2)
        yield "boft_block_num", f"is {number}, which makes no blocks of 2 or more of the inputs; {would} would"


BOFT = Method(
    name="boft",
    summary="Block-diagonal orthogonal rotations and row scales of linear layers (Liu et al. 2023)",
    section=BoftSection,
    kind="weights",
    peft_config="BOFTConfig",
    targets="query_value",
    linear_only=True,
    other_layers=("hqq",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 34.3% at 1e-4",
    left_out={
        "boft_n_butterfly_factor": "PEFT sets it to 1, without a word, where its CUDA extension does not compile: "
        "adapters would have other shapes on other machines",
        "fan_in_fan_out": "PEFT finds it out by itself",
    },
    check=_check,
    fits=_fits,
    weight_copies=3,
    trained_shapes=_shapes,
    no_decay=("boft_s",),
)
