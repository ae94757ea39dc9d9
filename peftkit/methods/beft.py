"""BEFT (Huang et al. 2025, arXiv:2509.15974): W x + b + b', with a trained bias b' on the value projections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import Section


class BeftSection(Section):
    """`adapter:` with `method: beft`. Field names, meanings and defaults are those of `peft.BeftConfig`."""

    method: Literal["beft"] = Field("beft", description="BEFT: a trained bias on the value projections.")
    target_modules: TargetModules = None
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with standard normal values.")


BEFT = Method(
    name="beft",
    summary="A trained bias on the value projections, for few data (Huang et al. 2025)",
    section=BeftSection,
    kind="weights",
    peft_config="BeftConfig",
    targets="value",
    linear_only=True,
    other_layers=("torchao",),
    learning_rate=1e-3,
    learning_rate_source="the authors' script for OPT-1.3B (whubaichuan/BEFT): 1e-3 for most tasks; "
    "PEFT's method comparison tried 1e-4 only (32.1%)",
    check=check_targets,
)
