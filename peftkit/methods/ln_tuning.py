"""LN tuning (Zhao et al. 2023, arXiv:2312.11420): gamma * (x - mean) / std + beta, with gamma and beta of the norms trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftkit.methods.base import OTHER_LAYERS, Method
from peftkit.methods.fields import ExcludeModules, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import Section


class LNTuningSection(Section):
    """`adapter:` with `method: ln_tuning`. Field names, meanings and defaults are those of `peft.LNTuningConfig`."""

    method: Literal["ln_tuning"] = Field("ln_tuning", description="LN tuning: only the normalisation layers are trained.")
    target_modules: TargetModules = Field(
        None, description="Normalisation layers: names or a regular expression. Default: PEFT's table, else all of them."
    )
    exclude_modules: ExcludeModules = None
    modules_to_save: ModulesToSave = None


LN_TUNING = Method(
    name="ln_tuning",
    summary="Only the normalisation layers are trained (Zhao et al. 2023)",
    section=LNTuningSection,
    kind="weights",
    peft_config="LNTuningConfig",
    targets="norms",
    other_layers=OTHER_LAYERS,
    learning_rate=5e-3,
    learning_rate_source="as for ia3, whose vectors rescale activations too; ours, 60 steps of a 5M-parameter Llama: loss 5.44 "
    "to 5.26 at 1e-3, to 4.64 at 1e-2; PEFT's method comparison tried 1e-4 only (0.0%)",
    task_learning_rates={
        "SEQ_CLS": (1e-2, "ours: all-MiniLM-L6-v2 on sentence polarity, 60 steps: 44% at 1e-3, 78% at 1e-2"),
    },
    check=check_targets,
)
