"""Full fine-tuning: every parameter of the base model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.section import Section


class FullSection(Section):
    """`adapter:` with `method: full`."""

    method: Literal["full"] = Field("full", description="Full fine-tuning: every parameter is trained.")


FULL = Method(
    name="full",
    summary="Full fine-tuning: every parameter; the run's adapter folder is a stand-alone model",
    section=FullSection,
    kind="subset",
    trains=lambda name: True,
    stands_alone=True,
    several_adapters=False,
    quantizations=(),
    why_not_quantized="quantised weights cannot be trained",
    learning_rate=5e-5,
    learning_rate_source="BERT, Devlin et al. 2018 (arXiv:1810.04805), appendix A.3: 5e-5, 3e-5 or 2e-5",
)
