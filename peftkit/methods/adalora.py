"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): W + scaling * B E A, diagonal E; the least important ranks are pruned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Share

Decay = Annotated[Share, Field(gt=0.0)]


class AdaLoraSection(Section):
    """`adapter:` with `method: adalora`. Field names, meanings and defaults are those of `peft.AdaLoraConfig`."""

    method: Literal["adalora"] = Field("adalora", description="AdaLoRA: low-rank updates whose ranks are pruned in training.")
    target_r: PositiveInt = Field(8, description="Rank per module that is left at the end, on average; below init_r.")
    init_r: PositiveInt = Field(12, description="Rank of every module at the start.")
    tinit: NonNegativeInt = Field(0, description="Optimizer steps at the start in which no rank is pruned.")
    tfinal: NonNegativeInt = Field(0, description="Optimizer steps at the end in which the ranks stay as they are.")
    deltaT: PositiveInt = Field(1, description="Optimizer steps from one pruning to the next.")  # noqa: N815
    beta1: Decay = Field(0.85, description="Decay of the moving average of a weight's importance, between 0 and 1.")
    beta2: Decay = Field(0.85, description="Decay of the moving average of that importance's spread, between 0 and 1.")
    orth_reg_weight: NonNegativeFloat = Field(0.5, description="Weight of the distance from orthogonality in the loss.")
    lora_alpha: PositiveFloat = Field(8, description="Scale: the update is multiplied by lora_alpha / init_r.")
    lora_dropout: Share = Field(0.0, description="Dropout before lora_A, as a probability.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_lora_weights: bool = Field(
        True, description="Start as the base model (E = 0); false starts with a large random update."
    )
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = Field(
        None, description="Token ids whose embeddings are trained too (a list), or by name of the embedding layer."
    )
    layer_replication: list[tuple[NonNegativeInt, PositiveInt]] | None = Field(
        None, description="Stack layers anew from [start, end) ranges of the original ones; cannot be merged."
    )
    ensure_weight_tying: bool = Field(
        False, description="Keep tied embeddings tied when one of them is trained or saved whole."
    )


def _check(section: AdaLoraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.target_r >= section.init_r:
        # With equal ranks PEFT fails after the first steps, in search of the 0th smallest importance.
        yield (
            "target_r",
            f"must be below `init_r` ({section.init_r}), it is {section.target_r}: there would be nothing to prune",
        )
    if section.ensure_weight_tying and not (section.modules_to_save or section.trainable_token_indices):
        yield "ensure_weight_tying", "has no effect without `modules_to_save` or `trainable_token_indices`"


def _not_mergeable_with(section: AdaLoraSection) -> str:
    if section.layer_replication is not None:
        return "`layer_replication` shares base layers, so that merging into one of them changes the others"
    return ""


_IGNORED = "AdaLoRA takes it over from LoRA's config and ignores it"
_REFUSED = "a variant of LoRA that AdaLoRA has not"
ADALORA = Method(
    name="adalora",
    summary="Low-rank updates in SVD form whose ranks are pruned by importance (Zhang et al. 2023)",
    section=AdaLoraSection,
    kind="weights",
    peft_config="AdaLoraConfig",
    several_adapters=False,
    targets="query_value",
    other_layers=("torchao",),
    size_fields=("init_r", "target_r", "lora_alpha"),
    learning_rate=5e-4,
    learning_rate_source="the authors' script for summaries with BART (QingruZhang/AdaLoRA): 5e-4; "
    "PEFT's method comparison tried 1e-4 only (37.3%)",
    task_learning_rates={"SEQ_CLS": (1e-3, "the authors' script for MRPC with DeBERTaV3 (QingruZhang/AdaLoRA)")},
    left_out={
        "total_step": "computed from the plan's steps",
        "rank_pattern": "the ranks that are left, which training finds",
        "r": f"{_IGNORED}; see init_r and target_r",
        "alpha_pattern": _IGNORED,
        "use_rslora": _IGNORED,
        "lora_bias": _IGNORED,
        "runtime_config": _IGNORED,
        "use_dora": "PEFT refuses it for AdaLoRA",
        "loftq_config": "PEFT refuses it for AdaLoRA",
        "target_parameters": "PEFT cannot put AdaLoRA on parameters that are no module",
        "velora_config": _REFUSED,
        "use_qalora": _REFUSED,
        "qalora_group_size": _REFUSED,
        "alora_invocation_tokens": _REFUSED,
        "monteclora_config": _REFUSED,
        "kasa_config": _REFUSED,
        "use_bdlora": _REFUSED,
        "arrow_config": _REFUSED,
        "eva_config": _REFUSED,
        "corda_config": _REFUSED,
        "lora_ga_config": _REFUSED,
        "fan_in_fan_out": "PEFT finds it out by itself",
        "megatron_config": "Megatron-LM models cannot be loaded here",
        "megatron_core": "Megatron-LM models cannot be loaded here",
    },
    check=_check,
    not_mergeable_with=_not_mergeable_with,
    runtime_module="peftkit.methods.adalora_torch",
    may_be_empty=True,
    reads_gradients=lambda section: True,
)
