"""FourierFT (Gao et al. 2024, arXiv:2405.03003): W + scaling * Re(IDFT(F)), F sparse: n_frequency trained coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class FourierFTSection(Section):
    """`adapter:` with `method: fourierft`. Field names, meanings and defaults are those of `peft.FourierFTConfig`."""

    method: Literal["fourierft"] = Field("fourierft", description="FourierFT: sparse updates in the frequency domain.")
    n_frequency: PositiveInt = Field(1000, description="Trained coefficients per module, at most input x output features.")
    scaling: PositiveFloat = Field(150.0, description="Scale of the update; the paper has 100 to 300.")
    random_loc_seed: NonNegativeInt = Field(777, description="Seed of the coefficients' places.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    bias: Literal["none", "all", "fourier_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    n_frequency_pattern: dict[str, PositiveInt] = Field(
        {}, description="n_frequency by module name or regular expression, where it differs."
    )
    init_weights: bool = Field(
        False, description="Start as the base model; false starts with standard normal coefficients, as the paper does."
    )


def _fits(section: FourierFTSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.n_frequency > inputs * outputs:
        yield "n_frequency", f"is {section.n_frequency}, more than the weight has entries; at most {inputs * outputs}"


FOURIERFT = Method(
    name="fourierft",
    summary="Sparse updates in the frequency domain (Gao et al. 2024)",
    section=FourierFTSection,
    kind="weights",
    peft_config="FourierFTConfig",
    targets="query_value",
    other_layers=("torchao",),
    size_fields=("n_frequency",),
    learning_rate=5e-2,
    learning_rate_source="the authors' scripts (Chaos96/fourierft): 5e-2 for Llama-2-7B (scaling 300), 4e-2 to 0.12 for GLUE; "
    "PEFT's method comparison tried 1e-4 only (0.0%)",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=check_targets,
    fits=_fits,
    to_lora=True,
)
