"""LoRA (Hu et al. 2021, arXiv:2106.09685): W + scaling * B A, with r x d_in and d_out x r trained matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.section import NonNegativeInt, Number, PositiveFloat, PositiveInt, Section, Share

InitName = Literal["gaussian", "olora", "pissa", "orthogonal", "mica"]
PissaIterations = Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]*$")]


class Velora(Section):
    """Compressed activations (VeLoRA, Miles et al. 2024, arXiv:2405.17991)."""

    num_groups: PositiveInt = Field(64, description="Groups that the input features are split into.")
    scale: Number = Field(1.0, description="Scale of the reconstructed activation.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = Field(
        "batch_average", description="How the projection vector is set."
    )


class LoraSection(Section):
    """`adapter:` with `method: lora`. Field names, meanings and defaults are those of `peft.LoraConfig`."""

    method: Literal["lora"] = Field("lora", description="LoRA: low-rank updates of linear layers.")
    r: PositiveInt = Field(8, description="Rank of the update.")
    lora_alpha: PositiveFloat = Field(8, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: Share = Field(0.0, description="Dropout before lora_A, as a probability.")
    target_modules: list[str] | str | None = Field(
        None,
        description="Modules to adapt: a list of names (suffixes), a regular expression over full names, or `all-linear`. "
        "Default: PEFT's table for the architecture, else the query and value projections found by inspection.",
    )
    exclude_modules: list[str] | str | None = Field(None, description="Modules to leave alone: names or a regular expression.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases of the base model to train as well.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (DoRA, arXiv:2402.09353).")
    modules_to_save: list[str] | None = Field(
        None, description="Modules to train and save whole. The head of the task is always among them."
    )
    init_lora_weights: bool | InitName | PissaIterations = Field(
        True,
        description="How A and B start: true (Kaiming A, zero B), false (random), gaussian, orthogonal, mica, olora, pissa or "
        "pissa_niter_N (N power iterations of a fast SVD). pissa and olora are saved as plain LoRA of twice the rank.",
    )
    layers_to_transform: list[NonNegativeInt] | NonNegativeInt | None = Field(
        None, description="Indices of the layers to adapt; the others stay."
    )
    layers_pattern: list[str] | str | None = Field(
        None, description="Name of the layer list, where it is not the usual `layers` or `h`; goes with layers_to_transform."
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        {}, description="Rank by module name or regular expression, where it is not r."
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        {}, description="lora_alpha by module name or regular expression, where it differs."
    )
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = Field(
        None, description="Token ids whose embeddings are trained too (a list), or by name of the embedding layer."
    )
    target_parameters: list[str] | None = Field(
        None, description="Parameters to adapt that are no module, such as `mlp.experts.gate_up_proj` of fused experts."
    )
    lora_bias: bool = Field(False, description="Give lora_B a bias; such an adapter merges only into layers that have one.")
    layer_replication: list[tuple[NonNegativeInt, PositiveInt]] | None = Field(
        None, description="Stack layers anew from [start, end) ranges of the original ones; cannot be merged."
    )
    velora_config: Velora | None = Field(None, description="Compress the activations kept for the backward pass (VeLoRA).")
    ensure_weight_tying: bool = Field(
        False, description="Keep tied embeddings tied when one of them is adapted or saved whole."
    )


def _check(section: LoraSection) -> Iterator[tuple[str, str]]:
    if section.layers_pattern is not None and section.layers_to_transform is None:
        yield "layers_pattern", "has no effect without `layers_to_transform`"
    if section.layers_to_transform is not None and isinstance(section.target_modules, str):
        yield "layers_to_transform", "works only with a list of `target_modules`, not with a regular expression or `all-linear`"
    if section.init_lora_weights == "orthogonal" and section.r % 2:
        yield "init_lora_weights", f"orthogonal initialisation needs an even rank, `r` is {section.r}"
    yield from _check_target_parameters(section)
    yield from _check_lora_bias(section)
    if section.velora_config is not None and (section.use_dora or section.lora_dropout):
        yield "velora_config", "cannot be combined with `use_dora` or `lora_dropout`"
    if section.target_modules == [] and not section.target_parameters:
        yield "target_modules", "is an empty list: nothing would be adapted; `method: head` trains the head alone"
    if section.ensure_weight_tying and not (
        section.modules_to_save or section.trainable_token_indices or section.target_modules
    ):
        yield "ensure_weight_tying", "has no effect unless an embedding is in `modules_to_save` or `target_modules`"


def _check_lora_bias(section: LoraSection) -> Iterator[tuple[str, str]]:
    if section.use_dora and section.lora_bias:
        yield "lora_bias", "cannot be combined with `use_dora`"
    if section.lora_bias and not isinstance(section.init_lora_weights, bool):
        yield "lora_bias", "works only with `init_lora_weights` true or false"


def _check_target_parameters(section: LoraSection) -> Iterator[tuple[str, str]]:
    if section.target_parameters is None:
        return
    if section.use_dora:
        yield "target_parameters", "cannot be combined with `use_dora` (PEFT's ParamWrapper has no DoRA)"
    if section.lora_dropout:
        yield "target_parameters", "needs `lora_dropout: 0` (PEFT's ParamWrapper has no dropout)"
    if section.lora_bias:
        yield "target_parameters", "cannot be combined with `lora_bias`"


def _not_mergeable_with(section: LoraSection) -> str:
    if section.layer_replication is not None:
        return "`layer_replication` shares base layers, so that merging into one of them changes the others"
    return ""


def _changes_base(section: LoraSection) -> bool:
    return str(section.init_lora_weights).startswith(("pissa", "olora"))


_DATA_DRIVEN = "its initialisation needs a pass over data before training"
LORA = Method(
    name="lora",
    summary="Low-rank updates of linear layers (Hu et al. 2021); rsLoRA, DoRA, PiSSA, OLoRA, MiCA, VeLoRA by its fields",
    section=LoraSection,
    kind="peft",
    peft_config="LoraConfig",
    learning_rate=2e-4,
    learning_rate_source="QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), table 9",
    task_learning_rates={"SEQ_CLS": (1e-3, "ours: all-MiniLM-L6-v2 on sentence polarity, benchmarks/README.md")},
    left_out={
        "eva_config": _DATA_DRIVEN,
        "corda_config": _DATA_DRIVEN,
        "lora_ga_config": _DATA_DRIVEN,
        "loftq_config": "it quantises the base itself; needs CUDA",
        "use_qalora": "works on GPTQ bases only and is ignored in silence on any other",
        "qalora_group_size": "goes with use_qalora",
        "kasa_config": "it truncates the base weights for good and adds a loss term of its own",
        "monteclora_config": "it adds a loss term of its own",
        "alora_invocation_tokens": "an activation by tokens of the prompt, which data and inference must know of",
        "arrow_config": "it routes between trained adapters at inference",
        "use_bdlora": "it shapes the update for tensor-parallel serving of one engine",
        "fan_in_fan_out": "PEFT finds it out by itself",
        "megatron_config": "Megatron-LM models cannot be loaded here",
        "megatron_core": "Megatron-LM models cannot be loaded here",
        "runtime_config": "not part of the adapter",
    },
    check=_check,
    not_mergeable_with=_not_mergeable_with,
    changes_base=_changes_base,
)
