"""WaveFT (Bilican et al. 2025, arXiv:2505.12532): W + scaling * IDWT(S), S sparse: n_frequency trained coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

# PEFT's config takes longer ones too, which its layers then do not know.
WaveletFamily = Annotated[str, Field(pattern=r"^(db([1-9]|10)|sym([2-9]|10)|coif[1-5])$")]


class WaveFTSection(Section):
    """`adapter:` with `method: waveft`. Field names, meanings and defaults are those of `peft.WaveFTConfig`."""

    method: Literal["waveft"] = Field("waveft", description="WaveFT: sparse updates in the wavelet domain.")
    n_frequency: PositiveInt = Field(2592, description="Trained coefficients per module, at most input x output features.")
    scaling: PositiveFloat = Field(25.0, description="Scale of the update.")
    wavelet_family: WaveletFamily = Field(
        "db1", description="Wavelet: db1 (Haar) to db10, sym2 to sym10, coif1 to coif5; longer ones are slower."
    )
    use_idwt: bool = Field(
        True, description="Transform the coefficients back; false puts them into the weight as they are (faster)."
    )
    random_loc_seed: NonNegativeInt = Field(777, description="Seed of the coefficients' places.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    bias: Literal["none", "all", "waveft_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    n_frequency_pattern: dict[str, PositiveInt] = Field(
        {}, description="n_frequency by module name or regular expression, where it differs."
    )
    proportional_parameters: bool = Field(
        False, description="Share n_frequency x modules among the modules by the size of their weights."
    )
    init_weights: bool = Field(True, description="Start as the base model; false starts with small random coefficients.")


def _check(section: WaveFTSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.n_frequency_pattern and section.proportional_parameters:
        yield "n_frequency_pattern", "has no effect with `proportional_parameters`"
    if section.wavelet_family != "db1" and not section.use_idwt:
        yield "wavelet_family", "has no effect with `use_idwt: false`: no wavelet is used then"


def _fits(section: WaveFTSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.n_frequency > inputs * outputs and not section.proportional_parameters:  # which depends on all layers together
        yield "n_frequency", f"is {section.n_frequency}, more than the weight has entries; at most {inputs * outputs}"


WAVEFT = Method(
    name="waveft",
    summary="Sparse updates in the wavelet domain (Bilican et al. 2025)",
    section=WaveFTSection,
    kind="weights",
    peft_config="WaveFTConfig",
    targets="query_value",
    other_layers=("torchao",),
    not_compilable="torch.compile breaks off in its layers",
    size_fields=("n_frequency",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 40.3% at 1e-4, with n_frequency 5000",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    fits=_fits,
    to_lora=True,
)
