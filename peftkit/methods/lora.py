"""LoRA (Hu et al. 2021, arXiv:2106.09685): W + scaling * B A, with r x d_in and d_out x r trained matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import EVERY_TASK, OTHER_LAYERS, WITHOUT_HEAD, Layers, Method
from peftkit.methods.fields import (
    AlphaPattern,
    ExcludeModules,
    LayersPattern,
    LayersToTransform,
    ModulesToSave,
    RankPattern,
    TargetModules,
)
from peftkit.section import NonNegativeFloat, NonNegativeInt, Number, PositiveFloat, PositiveInt, Section, Share

InitName = Literal["gaussian", "olora", "pissa", "orthogonal", "mica", "eva", "corda", "lora_ga", "loftq"]
BY_DATA = ("eva", "corda", "lora_ga")
_INIT_ROWS = 256
PissaIterations = Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]*$")]


class Velora(Section):
    """Compressed activations (VeLoRA, Miles et al. 2024, arXiv:2405.17991)."""

    num_groups: PositiveInt = Field(64, description="Groups that the input features are split into.")
    scale: Number = Field(1.0, description="Scale of the reconstructed activation.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = Field(
        "batch_average", description="How the projection vector is set."
    )


class Eva(Section):
    """EVA (Paischer et al. 2024, arXiv:2410.07170): lora_A starts as the principal components of each layer's inputs."""

    rho: Annotated[Number, Field(ge=1)] = Field(2.0, description="Ranks may grow to rho * r where they explain more; 1: no.")
    tau: Annotated[Number, Field(gt=0, le=1)] = Field(0.99, description="Cosine similarity at which a component has converged.")
    whiten: bool = Field(False, description="Divide the components by their singular values.")
    adjust_scaling_factors: bool = Field(True, description="Keep alpha / r where ranks are redistributed.")


class Corda(Section):
    """CorDA (Yang et al. 2024, arXiv:2406.05223): weights are decomposed with the covariance of their inputs."""

    corda_method: Literal["ipm", "kpm"] = Field("ipm", description="ipm learns better, kpm keeps more of what the base knows.")
    use_float16_for_covariance: bool = Field(False, description="Half the memory of the covariances, less exact.")


class LoraGa(Section):
    """LoRA-GA (Wang et al. 2024, arXiv:2407.05000): A and B start from singular vectors of the first gradient."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = Field("ArB2r", description="Which vectors go to A and to B.")
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = Field("stable", description="How large they start.")
    stable_gamma: PositiveInt = Field(16, description="Divisor of the `stable` scale.")


class LoftQ(Section):
    """LoftQ (Li et al. 2023, arXiv:2310.08659): A and B start as the error of quantising the base."""

    loftq_bits: Literal[2, 4, 8] = Field(4, description="Bits of the quantised weights.")
    loftq_iter: PositiveInt = Field(1, description="Rounds of quantising and decomposing.")


class Kasa(Section):
    """KaSA (Wang et al. 2024, arXiv:2412.06071): drops the base's smallest singular values and trains some of its own."""

    beta: NonNegativeFloat = Field(1e-4, description="Weight of the trained singular values' squares in the loss.")
    gamma: NonNegativeFloat = Field(1e-3, description="Weight of the distance from orthogonality in the loss.")


class MonteClora(Section):
    """MonteCLoRA (Sengupta et al. 2024, arXiv:2411.04358): samples around lora_A while training."""

    num_samples: PositiveInt = Field(8, description="Samples per forward pass.")
    use_entropy: bool = Field(False, description="Keep the weights of the samples from collapsing to one.")
    dirichlet_prior: PositiveFloat = Field(0.1, description="Prior of those weights.")
    sample_scaler: PositiveFloat = Field(1e-4, description="Size of the perturbations.")
    kl_loss_weight: NonNegativeFloat = Field(1e-5, description="Weight of the divergence from the prior in the loss.")
    buffer_size: PositiveInt = Field(150, description="Samples drawn in advance.")


class BdLora(Section):
    """BD-LoRA: block-diagonal factors, so that an engine can serve them split over GPUs without talking more."""

    target_modules_bd_a: list[str] | None = Field(None, description="Modules whose lora_A is block-diagonal (row-parallel).")
    target_modules_bd_b: list[str] | None = Field(None, description="Modules whose lora_B is block-diagonal (column-parallel).")
    nblocks: PositiveInt = Field(1, description="Blocks: the number of GPUs that will serve it.")
    match_strict: bool = Field(True, description="Every adapted module must be in one of the two lists.")


class Arrow(Section):
    """Arrow (Ostapenko et al. 2024, arXiv:2405.11157): every token goes to the trained adapters that fit its hidden state."""

    adapters: list[str] = Field(min_length=2, description="Run directories or folders of the LoRA adapters to choose from.")
    general_adapters: list[str] = Field([], description="LoRA adapters of general knowledge, taken out of each (use_gks).")
    top_k: PositiveInt = Field(3, description="Adapters that a token goes to.")
    router_temperature: PositiveFloat = Field(1.0, description="Temperature of the softmax over them.")
    use_gks: bool = Field(False, description="Subtract the mean of general_adapters from every adapter (GenKnowSub).")
    rng_seed: NonNegativeInt | None = Field(None, description="Seed of the power iterations; default: the run's.")


class LoraSection(Section):
    """`adapter:` with `method: lora`. Field names, meanings and defaults are those of `peft.LoraConfig`."""

    method: Literal["lora"] = Field("lora", description="LoRA: low-rank updates of linear layers.")
    r: PositiveInt = Field(8, description="Rank of the update.")
    lora_alpha: PositiveFloat = Field(8, description="Scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: Share = Field(0.0, description="Dropout before lora_A, as a probability.")
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases of the base model to train as well.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (DoRA, arXiv:2402.09353).")
    modules_to_save: ModulesToSave = None
    init_lora_weights: bool | InitName | PissaIterations = Field(
        True,
        description="How A and B start: true (Kaiming A, zero B), false (random), gaussian, orthogonal, mica, olora, pissa or "
        "pissa_niter_N (N power iterations of a fast SVD); after a look at training rows: eva, corda, lora_ga; loftq (CUDA). "
        "pissa, olora, corda and lora_ga are saved as plain LoRA of twice the rank.",
    )
    init_num_rows: PositiveInt = Field(_INIT_ROWS, description="Training rows that eva, corda and lora_ga look at.")
    eva_config: Eva | None = Field(None, description="Settings of `init_lora_weights: eva`.")
    corda_config: Corda | None = Field(None, description="Settings of `init_lora_weights: corda`.")
    lora_ga_config: LoraGa | None = Field(None, description="Settings of `init_lora_weights: lora_ga`.")
    loftq_config: LoftQ | None = Field(None, description="Settings of `init_lora_weights: loftq`.")
    kasa_config: Kasa | None = Field(None, description="Train singular values too (KaSA).")
    monteclora_config: MonteClora | None = Field(None, description="Sample around lora_A while training (MonteCLoRA).")
    use_bdlora: BdLora | None = Field(None, description="Block-diagonal factors for serving on several GPUs (BD-LoRA).")
    arrow_config: Arrow | None = Field(
        None, description="Choose between LoRA adapters that are trained already, token by token; nothing is trained."
    )
    alora_invocation_tokens: list[NonNegativeInt] | None = Field(
        None, description="Activated LoRA (arXiv:2504.12397): token ids after which, and only there, the adapter acts."
    )
    alora_invocation_text: str | None = Field(
        None, min_length=1, description="The same as text, read by the model's tokenizer."
    )
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    rank_pattern: RankPattern = Field({})
    alpha_pattern: AlphaPattern = Field({})
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
    yield from _check_inits(section)
    yield from _check_target_parameters(section)
    yield from _check_arrow(section)
    yield from _check_lora_bias(section)
    if section.velora_config is not None and (section.use_dora or section.lora_dropout):
        yield "velora_config", "cannot be combined with `use_dora` or `lora_dropout`"
    if section.target_modules == [] and not section.target_parameters:
        yield "target_modules", "is an empty list: nothing would be adapted; `method: head` trains the head alone"
    if section.ensure_weight_tying and not (
        section.modules_to_save or section.trainable_token_indices or section.target_modules
    ):
        yield "ensure_weight_tying", "has no effect unless an embedding is in `modules_to_save` or `target_modules`"


def _check_inits(section: LoraSection) -> Iterator[tuple[str, str]]:
    for name in (*BY_DATA, "loftq"):
        if getattr(section, f"{name}_config") is not None and section.init_lora_weights != name:
            yield f"{name}_config", f"has no effect without `init_lora_weights: {name}`"
    if section.init_lora_weights not in BY_DATA and section.init_num_rows != _INIT_ROWS:
        yield "init_num_rows", "has no effect: only eva, corda and lora_ga look at rows"
    if section.init_lora_weights == "loftq" and section.loftq_config is None:
        yield "loftq_config", "is missing: `init_lora_weights: loftq` needs it, as `{loftq_bits: 4}`"
    if section.alora_invocation_tokens is not None and section.alora_invocation_text is not None:
        yield "alora_invocation_text", "is the same as `alora_invocation_tokens`; keep one of the two"
    if section.use_dora and (section.kasa_config or section.monteclora_config or section.use_bdlora):
        yield "use_dora", "cannot be combined with `kasa_config`, `monteclora_config` or `use_bdlora`"


def _check_arrow(section: LoraSection) -> Iterator[tuple[str, str]]:
    arrow = section.arrow_config
    if arrow is None:
        return
    for name, info in type(section).model_fields.items():
        if name not in ("method", "arrow_config") and getattr(section, name) != info.get_default(call_default_factory=True):
            yield name, "has no effect with `arrow_config`: the adapters that it names are as they are"
    if arrow.top_k > len(arrow.adapters):
        yield "arrow_config.top_k", f"must be at most the number of `adapters` ({len(arrow.adapters)}), it is {arrow.top_k}"
    if arrow.use_gks != bool(arrow.general_adapters):
        yield "arrow_config", "`use_gks` and `general_adapters` go together"


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
    if section.alora_invocation_tokens is not None or getattr(section, "alora_invocation_text", None) is not None:
        return "an activated LoRA acts only after its invocation tokens"
    if section.arrow_config is not None:
        return "every token goes to adapters of its own"
    return ""


def _not_packable_with(section: LoraSection) -> str:
    if section.alora_invocation_tokens is not None or section.alora_invocation_text is not None:
        return "an activated LoRA acts after the last invocation tokens of a sequence, whichever row they are in"
    return ""


def _changes_base(section: LoraSection) -> bool:
    return str(section.init_lora_weights).startswith(("pissa", "olora", "corda", "lora_ga"))


def _fits(section: LoraSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    """Ranks that are found wrong only after the rows are read; those of pissa and the like the blueprint compares."""
    smaller = min(inputs, outputs)
    most = {"lora_ga": smaller // 2, "corda": smaller}.get(str(section.init_lora_weights), section.r)
    if section.r > most:
        yield "r", f"is {section.r}, for which `{section.init_lora_weights}` finds too few singular vectors; at most {most}"


_VARIANTS = ("kasa_config", "monteclora_config", "use_bdlora", "velora_config")
_READ_WEIGHTS = ("pissa", "olora", "orthogonal", "mica", "corda", "lora_ga")


def _not_quantized_with(section: LoraSection, layers: Layers) -> Iterator[tuple[str, str]]:
    """Seen with PEFT 0.21.2: on quantised layers it passes over most variants in silence and trains a plain LoRA."""
    init = str(section.init_lora_weights)
    if init.startswith(_READ_WEIGHTS):
        yield "init_lora_weights", f"`{init}` starts from the base's weights, which are quantised; use true, gaussian or eva"
    if init == "loftq":
        yield "init_lora_weights", "`loftq` quantises the base itself; leave `model.quantization` out"
    for name in _VARIANTS:
        if getattr(section, name) is not None:
            yield name, f"has no effect on {layers} layers: PEFT would train a plain LoRA"
    if section.bias != "none" and layers in ("hqq", "gptq", "awq"):
        yield "bias", f"cannot train the biases of {layers} layers, which are no parameters there"
    if section.lora_bias and layers in OTHER_LAYERS:
        yield "lora_bias", f"is not there on {layers} layers (PEFT 0.21)"
    if (section.alora_invocation_tokens or section.alora_invocation_text) and layers in ("hqq", "gptq", "awq"):
        name = "alora_invocation_tokens" if section.alora_invocation_tokens else "alora_invocation_text"
        yield name, f"has no effect on {layers} layers: PEFT would train a plain LoRA"
    if section.use_dora and layers == "8bit":
        yield "use_dora", "loses the scales of 8-bit weights after one step (PEFT 0.21); use 4 bits"
    if section.use_dora and layers in ("gptq", "awq"):
        yield "use_dora", f"is not there on {layers} layers (PEFT 0.21); use false"


_DIVISIBLE = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)


LORA = Method(
    name="lora",
    summary="Low-rank updates of linear layers (Hu et al. 2021); rsLoRA, DoRA, PiSSA, OLoRA, MiCA, VeLoRA by its fields",
    section=LoraSection,
    kind="weights",
    peft_config="LoraConfig",
    mixed_batches=True,
    divisible=_DIVISIBLE,
    lora_plus=True,
    targets="query_value",
    other_layers=OTHER_LAYERS,
    size_fields=("r", "lora_alpha"),
    learning_rate=2e-4,
    learning_rate_source="QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), table 9",
    task_learning_rates={"SEQ_CLS": (1e-3, "ours: all-MiniLM-L6-v2 on sentence polarity, benchmarks/README.md")},
    left_out={
        "use_qalora": "works on GPTQ bases only and is ignored in silence on any other",
        "qalora_group_size": "goes with use_qalora",
        "fan_in_fan_out": "PEFT finds it out by itself",
        "megatron_config": "Megatron-LM models cannot be loaded here",
        "megatron_core": "Megatron-LM models cannot be loaded here",
        "runtime_config": "not part of the adapter",
    },
    own_fields={
        "init_num_rows": "how much eva, corda and lora_ga read",
        "alora_invocation_text": "alora_invocation_tokens, before the tokenizer",
    },
    other_defaults={"loftq_config": "PEFT's empty mapping and none are the same"},
    check=_check,
    fits=_fits,
    runtime_module="peftkit.methods.lora_torch",
    not_mergeable_with=_not_mergeable_with,
    not_packable_with=_not_packable_with,
    not_quantized_with=_not_quantized_with,
    needs_cuda=lambda section: "init_lora_weights" if section.init_lora_weights == "loftq" else "",
    trains_nothing=lambda section: section.arrow_config is not None,
    tasks_with=lambda section: WITHOUT_HEAD if section.arrow_config is not None else EVERY_TASK,
    reads_adapters={"arrow_config.adapters": "LORA", "arrow_config.general_adapters": "LORA"},
    changes_base=_changes_base,
    starter={"r": "8", "lora_alpha": "16", "target_modules": "all-linear"},
)
