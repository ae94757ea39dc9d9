"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): h + scaling * U f(D h), D: d -> m, U: m -> d, in every layer.

Placed as in Houlsby et al., as in Pfeiffer et al. 2020 (arXiv:2005.00247), or beside as in He et al. 2022 (arXiv:2110.04366).
Fields have the names that the `adapters` library gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import PositiveFloat, PositiveInt, Section, Share


class BottleneckSection(Section):
    """`adapter:` with `method: bottleneck`."""

    method: Literal["bottleneck"] = Field("bottleneck", description="Bottleneck adapters: small networks within every layer.")
    style: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer",
        description="Where they are: after attention and feed-forward (houlsby), after feed-forward (pfeiffer), or beside "
        "feed-forward (parallel).",
    )
    reduction_factor: PositiveFloat = Field(16, description="Hidden size of the model over that of the adapter.")
    bottleneck_dim: PositiveInt | None = Field(None, description="Hidden size of the adapter, instead of reduction_factor.")
    non_linearity: Literal["relu", "gelu", "swish", "silu", "tanh"] = Field("relu", description="Its activation.")
    scaling: PositiveFloat = Field(1.0, description="Scale of its output; He et al. use 4 with `style: parallel`.")
    dropout: Share = Field(0.0, description="Dropout of its output, as a probability.")
    init_weights: Literal["mam_adapter", "bert", "houlsby"] = Field(
        "mam_adapter",
        description="How it starts: Kaiming D and zero U (exactly the base model), normal values of deviation 0.02, or "
        "truncated normal ones of 0.01 (both near the base model).",
    )
    target_modules: TargetModules = Field(
        None,
        description="Last linear layers of attention and feed-forward blocks, by name or regular expression. "
        "Default: found by inspection.",
    )
    layers_to_transform: LayersToTransform = None
    modules_to_save: ModulesToSave = None


def _check(section: BottleneckSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.target_modules == "all-linear":
        yield "target_modules", "`all-linear` names every linear layer; adapters belong behind the last one of a block"
    if section.bottleneck_dim is not None and section.reduction_factor != 16:
        yield "reduction_factor", "has no effect with `bottleneck_dim`"


BOTTLENECK = Method(
    name="bottleneck",
    summary="Small networks within every layer (Houlsby et al. 2019, Pfeiffer et al. 2020, He et al. 2022)",
    section=BottleneckSection,
    kind="modules",
    not_mergeable="it is not linear, so no weights amount to it",
    other_layers=("torchao",),
    size_fields=("bottleneck_dim",),
    learning_rate=1e-3,
    learning_rate_source="ours, one seed: 80 steps of a 5.4M-parameter Llama on answers in capitals, held-out loss "
    "from 4.22 to 3.75 at 3e-4, 3.30 at 1e-3, 2.95 at 3e-3, 2.72 at 1e-2; below the best, since larger bases "
    "were not tried",
    check=_check,
    runtime_module="peftkit.methods.bottleneck_torch",
)
