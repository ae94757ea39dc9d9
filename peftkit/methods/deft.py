"""DEFT (Kumar et al. 2025, arXiv:2509.22793): (I - P relu(P)^T) W + alpha / r * P R, with P and R trained; PaRa without R."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import PositiveFloat, PositiveInt, Section, Share


class DeftSection(Section):
    """`adapter:` with `method: deft`. Field names, meanings and defaults are those of `peft.DeftConfig`."""

    method: Literal["deft"] = Field("deft", description="DEFT: takes a subspace out of a weight and puts another one in.")
    r: PositiveInt = Field(8, description="Rank of the subspace.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    decomposition_method: Literal["relu", "qr"] = Field(
        "relu", description="How P projects: relu (P relu(P)^T, no true projection) or qr (orthogonal)."
    )
    init_scale: PositiveFloat = Field(1.0, description="Scale of R's random start with `init_weights: false`.")
    alpha: PositiveFloat | None = Field(None, description="Scale of what is put in: alpha / r; default: 1.")
    para: bool = Field(False, description="Only take the subspace out (PaRa); training then starts away from the base model.")
    deft_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random R.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    bias: Literal["none", "all", "deft_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None


def _check(section: DeftSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    for name in ("alpha", "init_scale", "init_weights") if section.para else ():
        if getattr(section, name) != DeftSection.model_fields[name].default:
            yield name, "has no effect with `para`: there is no R"
    if section.init_scale != 1.0 and section.init_weights and not section.para:
        yield "init_scale", "has no effect without `init_weights: false`"


def _fits(section: DeftSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.r > outputs:
        yield "r", f"is {section.r}, more than the outputs, and PEFT would lower it without a word; at most {outputs}"


DEFT = Method(
    name="deft",
    summary="Takes a subspace out of a weight and puts a trained one in (Kumar et al. 2025); PaRa by its field",
    section=DeftSection,
    kind="weights",
    peft_config="DeftConfig",
    quantizations=(),
    why_not_quantized="R starts from the weights, and PEFT hands it the quantised codes",
    targets="query_value",
    size_fields=("r",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 48.2% at 1e-4, 43.4% with `para`",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    fits=_fits,
)
