"""X-LoRA (Buehler and Buehler 2024, arXiv:2402.07148): W + sum_n g_n(h) B_n A_n, LoRA experts n; only the gate g is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import check_adapters
from peftkit.section import Number, PositiveFloat, PositiveInt, Section, Share


class XLoraSection(Section):
    """`adapter:` with `method: xlora`. Field names, meanings and defaults are those of `peft.XLoraConfig`."""

    method: Literal["xlora"] = Field("xlora", description="X-LoRA: a trained gate mixes LoRA adapters, token by token.")
    adapters: list[str] = Field([], description="The experts, at least 2: run directories or folders of LoRA adapters.")
    enable_softmax: bool = Field(True, description="The experts' weights add up to 1 (softmax over all of them).")
    enable_softmax_topk: bool = Field(
        False, description="Softmax over the top_k_lora experts instead; needs `enable_softmax: false`."
    )
    layerwise_scalings: bool = Field(False, description="Weights of their own for every adapted layer; else the same for all.")
    xlora_depth: PositiveInt = Field(1, description="Linear layers of the gate.")
    xlora_size: PositiveInt = Field(2048, description="Width of the gate's inner layers, from depth 2 on.")
    xlora_dropout_p: Share = Field(0.2, description="Dropout after them, as a probability, from depth 2 on.")
    use_trainable_adapters: bool = Field(False, description="Train the experts too.")
    softmax_temperature: PositiveFloat = Field(1.0, description="Temperature of enable_softmax; lower favours one expert.")
    top_k_lora: PositiveInt | None = Field(None, description="Experts that count for a token; default: all.")
    scaling_pass_value: Number = Field(
        0.0, description="Weight of every expert in the pass that the gate reads; 0: base model."
    )
    global_scaling_weight: PositiveFloat = Field(1.0, description="Factor of every expert's update.")


def _check(section: XLoraSection) -> Iterator[tuple[str, str]]:
    yield from check_adapters(section.adapters, "LoRA adapters to choose from")
    if section.top_k_lora is not None and section.top_k_lora > len(section.adapters):
        yield "top_k_lora", f"must be at most the number of `adapters` ({len(section.adapters)}), it is {section.top_k_lora}"
    if section.enable_softmax_topk and section.top_k_lora is None:
        yield "enable_softmax_topk", "needs `top_k_lora`"
    if section.enable_softmax_topk and section.enable_softmax:
        yield "enable_softmax_topk", "takes a second softmax of the first one's weights; set `enable_softmax: false`"
    if not section.enable_softmax and section.softmax_temperature != XLoraSection.model_fields["softmax_temperature"].default:
        yield "softmax_temperature", "has no effect without `enable_softmax`"
    for name in ("xlora_size", "xlora_dropout_p") if section.xlora_depth == 1 else ():
        if getattr(section, name) != XLoraSection.model_fields[name].default:
            yield name, "has no effect with `xlora_depth: 1`"


XLORA = Method(
    name="xlora",
    summary="A trained gate over LoRA adapters that are trained already (Buehler and Buehler 2024)",
    section=XLoraSection,
    kind="weights",
    peft_config="XLoraConfig",
    model_kinds=("decoder", "encoder"),
    why_not="its gate reads one stack of hidden states, and an encoder-decoder has two",
    quantizations=(),
    why_not_quantized="PEFT's gate finds none of the experts' layers on quantised ones",
    not_recomputable="what its gate has weighed is gone when layers are recomputed",
    not_compilable="the weights of its experts come into the layers anew with every pass",
    not_cached="its gate reads the whole sequence at every token",
    not_mergeable="its gate mixes the experts by the input",
    several_adapters=False,
    learning_rate=1e-4,
    learning_rate_source="the authors' notebook for Zephyr-7B (EricLBuehler/xlora, examples): 1e-4",
    left_out={"hidden_size": "set from the model"},
    other_defaults={"adapters": "PEFT has none and takes folders by number; a list of folders or runs, numbered for PEFT"},
    check=_check,
    runtime_module="peftkit.methods.xlora_torch",
    reads_adapters={"adapters": "LORA"},
    starter={"adapters": "[runs/first, runs/second]"},
)
