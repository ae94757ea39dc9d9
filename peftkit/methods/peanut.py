"""PEANuT (Zhong et al. 2024, arXiv:2410.01870): W + scaling * f(W^T)^T, with f a small trained network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

# The keys of transformers' ACT2FN, less `prelu` and `xielu`: these have parameters, which PEFT would neither train nor save.
Activation = Literal[
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
]


class PeanutSection(Section):
    """`adapter:` with `method: peanut`. Field names, meanings and defaults are those of `peft.PeanutConfig`."""

    method: Literal["peanut"] = Field("peanut", description="PEANuT: updates that a small network computes from the weights.")
    r: PositiveInt = Field(32, description="Width of the network.")
    depth: NonNegativeInt = Field(0, description="Hidden layers on each of its two sides; 0: only the way in and out.")
    act_fn: Activation = Field("relu", description="Its activation, by transformers' name.")
    scaling: PositiveFloat = Field(1.0, description="Scale of the update.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    modules_to_save: ModulesToSave = None
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")


PEANUT = Method(
    name="peanut",
    summary="Updates that a small network computes from the weights (Zhong et al. 2024)",
    section=PeanutSection,
    kind="weights",
    peft_config="PeanutConfig",
    quantizations=(),
    why_not_quantized="its network reads the weights, and PEFT hands it the quantised codes",
    targets="query_value",
    linear_only=True,
    size_fields=("r",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 44.9% at 1e-4, with scaling 2",
    check=check_targets,
)
