"""AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247): h + sum_n softmax_n(Q h . K z_n) V z_n over bottleneck outputs z_n.

The bottleneck adapters are trained already and stay as they are; Q, K, V (d x d in every adapted layer) and the head are
trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, check_adapters
from peftkit.section import NonNegativeFloat, PositiveFloat, Section


class AdapterFusionSection(Section):
    """`adapter:` with `method: adapter_fusion`."""

    method: Literal["adapter_fusion"] = Field(
        "adapter_fusion", description="AdapterFusion: attention over bottleneck adapters that are trained already."
    )
    adapters: list[str] = Field(
        [],
        description="The adapters, at least 2: run directories or folders of bottleneck adapters of one style, of any tasks.",
    )
    temperature: PositiveFloat = Field(1.0, description="Temperature of the softmax; lower favours one adapter.")
    regularization: NonNegativeFloat = Field(
        0.01, description="Weight of ||V - I||^2 in the loss, summed over the layers: V starts as I and stays near it."
    )
    modules_to_save: ModulesToSave = None


def _check(section: AdapterFusionSection) -> Iterator[tuple[str, str]]:
    yield from check_adapters(section.adapters, "bottleneck adapters to attend to")


ADAPTER_FUSION = Method(
    name="adapter_fusion",
    summary="Attention over bottleneck adapters that are trained already (Pfeiffer et al. 2021)",
    section=AdapterFusionSection,
    kind="modules",
    not_mergeable="it weighs its adapters by the input",
    several_adapters=False,
    other_layers=("torchao",),
    no_decay=("adapter_fusion.value",),
    learning_rate=5e-5,
    learning_rate_source="Pfeiffer et al. 2021 (arXiv:2005.00247): 5e-5 for the fusion layers",
    check=_check,
    runtime_module="peftkit.methods.adapter_fusion_torch",
    reads_adapters={"adapters": "BOTTLENECK"},
    starter={"adapters": "[runs/one_task, runs/other_task]"},
)
