"""SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): W + S, S sparse: r (d_in + d_out) trained entries at fixed random places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveInt, Section


class ShiraSection(Section):
    """`adapter:` with `method: shira`. Field names, meanings and defaults are those of `peft.ShiraConfig`."""

    method: Literal["shira"] = Field("shira", description="SHiRA: sparse updates of high rank.")
    r: PositiveInt = Field(
        32,
        description="As many entries are trained as LoRA of this rank has: r x (inputs + outputs), at most inputs x outputs.",
    )
    mask_type: Literal["random"] = Field("random", description="How the places of the trained entries are chosen.")
    random_seed: NonNegativeInt | None = Field(None, description="Seed of the places; default: torch's, the same in every run.")
    target_modules: TargetModules = None
    init_weights: bool = Field(
        True, description="Start as the base model; false adds standard normal values, far from the base model."
    )
    modules_to_save: ModulesToSave = None


def _shapes(section: ShiraSection, inputs: int, outputs: int, bias: bool) -> list[tuple[int, ...]]:
    return [(section.r * (inputs + outputs),)]


def _fits(section: ShiraSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    most = inputs * outputs // (inputs + outputs)
    if section.r > most:
        yield "r", f"is {section.r}, for which the weight has too few entries; at most {most}"


SHIRA = Method(
    name="shira",
    summary="Sparse updates of high rank at random places (Bhardwaj et al. 2024)",
    section=ShiraSection,
    kind="weights",
    peft_config="ShiraConfig",
    targets="query_value",
    linear_only=True,
    not_compilable="torch.compile breaks off in its layers",
    size_fields=("r",),
    learning_rate=3e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 51.0% at 3e-4",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=check_targets,
    fits=_fits,
    weight_copies=2,
    trained_shapes=_shapes,
)
