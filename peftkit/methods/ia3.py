"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): l * (W x), or W (l * x) in the feed-forward part; the vectors l are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import Section


class IA3Section(Section):
    """`adapter:` with `method: ia3`. Field names, meanings and defaults are those of `peft.IA3Config`."""

    method: Literal["ia3"] = Field("ia3", description="(IA)^3: keys, values and feed-forward activations are rescaled.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    feedforward_modules: list[str] | str | None = Field(
        None,
        description="Those of the target modules whose input is rescaled instead of their output: names or a regular "
        "expression. Default: like target_modules; an empty list: none.",
    )
    modules_to_save: ModulesToSave = None
    init_ia3_weights: bool = Field(True, description="Start as the base model; false starts with random factors.")


def _check(section: IA3Section) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    targets, feedforward = section.target_modules, section.feedforward_modules
    if feedforward == "all-linear":
        yield "feedforward_modules", "must be names or a regular expression; `all-linear` is neither here and matches nothing"
    if isinstance(targets, list) and isinstance(feedforward, list) and (others := sorted(set(feedforward) - set(targets))):
        yield "feedforward_modules", f"must be among `target_modules`; these are not: {', '.join(others)}"


IA3 = Method(
    name="ia3",
    summary="Trained vectors rescale keys, values and feed-forward activations (Liu et al. 2022)",
    section=IA3Section,
    kind="weights",
    peft_config="IA3Config",
    targets="key_value_feedforward",
    other_layers=("torchao",),
    learning_rate=5e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 31.1% at 1e-4, 39.8% at 1e-3, "
    "45.5% at 5e-3 with all of the attention",
    task_learning_rates={"SEQ_CLS": (3e-2, "ours: all-MiniLM-L6-v2 on sentence polarity, benchmarks/README.md")},
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    no_decay=("ia3_",),
)
