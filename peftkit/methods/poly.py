"""Poly (Ponti et al. 2022, arXiv:2202.13914; MHR, arXiv:2211.03831): W + sum_s z_ts B_s A_s / r; task t picks skills s by z."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_divides_both, check_targets
from peftkit.section import PositiveInt, Section


class PolySection(Section):
    """`adapter:` with `method: poly`. Field names, meanings and defaults are those of `peft.PolyConfig`."""

    method: Literal["poly"] = Field("poly", description="Poly: each task mixes low-rank skills that all tasks train.")
    r: PositiveInt = Field(8, description="Rank of a skill.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with random updates.")
    poly_type: Literal["poly"] = Field("poly", description="Kind of router; PEFT has one.")
    n_tasks: PositiveInt = Field(1, description="Number of tasks; rows name theirs in `task_id`.")
    n_skills: PositiveInt = Field(4, description="Low-rank updates per module that the tasks mix.")
    n_splits: PositiveInt = Field(
        1, description="Parts of the features that are mixed each in its own way (MHR); divides input and output features."
    )


def _check(section: PolySection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.n_skills == 1 and section.n_tasks > 1:
        yield "n_skills", "must be at least 2 with several tasks: with one skill all tasks are the same"


def _fits(section: PolySection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    return check_divides_both("n_splits", section.n_splits, inputs, outputs)


POLY = Method(
    name="poly",
    summary="Low-rank skills that several tasks share, mixed by a trained router (Ponti et al. 2022)",
    section=PolySection,
    kind="weights",
    peft_config="PolyConfig",
    not_mergeable="its weights differ from task to task",
    not_one_graph="its router looks at the numbers of the tasks while it runs (peft 0.21)",
    targets="query_value",
    linear_only=True,
    num_tasks_field="n_tasks",
    other_layers=("torchao",),
    not_compilable="torch.compile breaks off in its layers",
    size_fields=("r",),
    learning_rate=1e-3,
    learning_rate_source="the authors' settings for T0 tasks (microsoft/mttl, configs/t0/poly_lora_sota.json): 1e-3",
    check=_check,
    fits=_fits,
    starter={"n_tasks": "2"},
)
