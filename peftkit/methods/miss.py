"""MiSS (Kang and Yin 2024, arXiv:2409.15371): W x + D^T sum_j x_j, with one r x d_out matrix D for all shards x_j of x."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_divides_both, check_targets, divisors_text
from peftkit.section import PositiveInt, Section, Share


class MissSection(Section):
    """`adapter:` with `method: miss`. Field names, meanings and defaults are those of `peft.MissConfig`."""

    method: Literal["miss"] = Field("miss", description="MiSS: one small matrix shared by all shards of a weight.")
    r: PositiveInt = Field(64, description="Rank: width of a shard of the input features, at most their number.")
    miss_dropout: Share = Field(0.0, description="Dropout before the update, as a probability; not with `bat`.")
    mini_r: PositiveInt = Field(
        1, description="Width of the matrix with `init_weights: mini`, repeated over the output features; divides their number."
    )
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    init_weights: bool | Literal["bat", "mini"] = Field(
        True,
        description="Variant: true (zeros, starts as the base model), bat (update depends on the weight; r divides both "
        "sides), mini (fewer parameters, see mini_r); false starts at random.",
    )
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    bias: Literal["none", "all", "MiSS_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None


def _check(section: MissSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.mini_r != 1 and section.init_weights != "mini":
        yield "mini_r", "has no effect without `init_weights: mini`"
    if section.miss_dropout and section.init_weights == "bat":
        yield "miss_dropout", "has no effect with `init_weights: bat`: the update goes into the weight, not beside it"


def _fits(section: MissSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.init_weights == "bat":
        yield from check_divides_both("r", section.r, inputs, outputs)
    elif section.r > inputs:
        yield "r", f"is {section.r}, more than the inputs; at most {inputs}"
    if section.init_weights == "mini" and outputs % section.mini_r:
        would = divisors_text(outputs, section.mini_r)
        yield "mini_r", f"is {section.mini_r}, which does not divide the outputs; {would} would"


MISS = Method(
    name="miss",
    summary="One small matrix shared by all shards of a weight (Kang and Yin 2024); Bat and mini by init_weights",
    section=MissSection,
    kind="weights",
    peft_config="MissConfig",
    targets="query_value",
    linear_only=True,
    other_layers=("hqq",),
    size_fields=("r",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 48.7% at 1e-4, 50.4% with `bat`",
    check=_check,
    fits=_fits,
    to_lora=True,
)
