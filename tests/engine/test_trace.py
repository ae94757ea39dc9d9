"""What a pass is said to hold, beside what real tensors hold, and beside what others have measured on GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedModel,
)

from peftkit.engine import trace
from peftkit.engine.kernels import Kernels
from peftkit.engine.quantized import make_safe
from peftkit.engine.stored import quantised_bytes, quantised_weights
from peftkit.engine.trace import Held, Ledger, trace_inference, trace_training
from peftkit.recipe.quantization import Quantization
from tests.contracts.tiny_models import DECODERS, tiny_config

TYPES = ("bert", "bloom", "deberta-v2", "gemma2", "gpt2", "llama", "mixtral", "modernbert", "opt", "t5", "xlnet")
ROWS, TOKENS = 3, 40


def tiny_adapted(model_type: str, device: str, checkpointed: bool = False) -> nn.Module:
    """A tiny model with LoRA on every linear layer, in training mode."""
    config = tiny_config(model_type)
    auto: Any = AutoModelForCausalLM if model_type in DECODERS else AutoModelForTokenClassification
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else auto
    with torch.device(device):
        base = auto.from_config(config)
    targets = "all-linear" if model_type != "xlnet" else ["layer_1", "layer_2"]
    lora = peft.LoraConfig(r=4, target_modules=targets)
    model = peft.get_peft_model(base, lora, low_cpu_mem_usage=device == "meta")
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    return model.train()


def loss_of(model: Any, bf16: bool = False) -> Callable[[], torch.Tensor]:
    """A loss over half of the places of a padded batch, chosen by a mask."""
    ids = torch.randint(5, 300, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    attention[1, 30:] = 0
    wanted = ids % 2 == 0

    def run() -> torch.Tensor:
        labels = {"labels": ids} if model.config.is_encoder_decoder else {}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=attention, **labels).logits
        return logits[wanted].float().logsumexp(-1).sum()

    return run


def really_held(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Held:
    """The same moment, by booking the storages of real tensors."""
    ledger = Ledger(64)
    with ledger:
        ledger.leave_out([*model.parameters(), *model.buffers()])
        loss().backward()
        gradients = ledger.numbers_of(p.grad for p in model.parameters() if p.grad is not None)
    return max(ledger.fullest(gradients), key=lambda held: held.total)


def same(traced: Held, held: Held) -> bool:
    """Equal up to a percent: under autocast a few small tensors live longer or shorter."""
    return traced.activations + traced.gradients == pytest.approx(held.total, rel=0.01)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_pass_on_shapes_holds_what_a_real_one_holds(model_type: str) -> None:
    real, shapes = tiny_adapted(model_type, "cpu"), tiny_adapted(model_type, "meta")
    assert same(trace_training(shapes, loss_of(shapes), Kernels()), really_held(real, loss_of(real)))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "t5"])
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_layers_hold_what_they_really_hold(model_type: str, bf16: bool) -> None:
    real, shapes = (tiny_adapted(model_type, device, checkpointed=True) for device in ("cpu", "meta"))
    assert same(trace_training(shapes, loss_of(shapes, bf16), Kernels()), really_held(real, loss_of(real, bf16)))


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_autocast_holds_what_it_really_holds(model_type: str) -> None:
    real, shapes = tiny_adapted(model_type, "cpu"), tiny_adapted(model_type, "meta")
    assert same(trace_training(shapes, loss_of(shapes, True), Kernels()), really_held(real, loss_of(real, True)))


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """What a layer of torchao or HQQ, or a plain one, keeps its weight in."""
    if type(layer).__name__ == "HQQLinear":
        return [layer.W_q, layer.meta["scale"], layer.meta["zero"]]
    weight = getattr(layer, "weight", None)
    if hasattr(weight, "qdata"):
        return [weight.qdata, weight.scale, weight.zero_point]
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


@pytest.mark.parametrize(
    "quantization", [Quantization("torchao", 8), Quantization("hqq", 4, group_size=32, compute_dtype="float32")]
)
def test_layers_of_other_libraries_hold_what_they_really_hold(quantization: Quantization) -> None:
    pytest.importorskip(quantization.method)
    quantization = dataclasses.replace(quantization, skip_modules=("lm_head",))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    models: list[Any] = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(tiny_config("llama"))
        base = make_safe(base, quantization) if device == "cpu" else base
        lora = peft.LoraConfig(r=4, target_modules=targets)
        models.append(peft.get_peft_model(base, lora, low_cpu_mem_usage=device == "meta").train())
    real, shapes = models
    loss, ledger = loss_of(real), Ledger(64)
    there = [part for layer in real.modules() for part in tensors_of(layer)]
    with ledger:
        ledger.leave_out(there)
        loss().backward()
        gradients = ledger.numbers_of(p.grad for p in real.parameters() if p.grad is not None)
    held = max(ledger.fullest(gradients), key=lambda moment: moment.total)
    kernels = Kernels(quantised=frozenset(quantised_weights(shapes, quantization)), layers=quantization.layers)
    assert same(trace_training(shapes, loss_of(shapes), kernels), held)


def test_gradients_of_earlier_passes_are_counted() -> None:
    model = tiny_adapted("llama", "meta")
    size = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trace_training(model, loss_of(model), Kernels(), gradients_exist=True).gradients >= size
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pass_without_gradients_holds_less() -> None:
    model = tiny_adapted("llama", "meta")
    without = trace_inference(model.eval(), loss_of(model), Kernels())
    assert without.total < trace_training(model, loss_of(model), Kernels()).total


@pytest.mark.parametrize("layers", [9, 16])
def test_two_short_stacks_tell_of_a_deep_one(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", num_hidden_layers=layers)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
    quick = trace_training(model, loss_of(model), Kernels("cuda"))
    monkeypatch.setattr(trace, "common_depth", lambda model: None)
    assert quick.total == pytest.approx(trace_training(model, loss_of(model), Kernels("cuda")).total, rel=0.01)
    assert len(base.model.layers) == layers


def on_meta(config: LlamaConfig) -> PreTrainedModel:
    """A model in bfloat16 by shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


LLAMA_3B = {
    "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
QUERY_VALUE, MLP = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
# Most memory reserved on an L40S, GiB: PEFT's method_comparison/MetaMathQA/results, runs of June 2025.
PUBLISHED: dict[str, tuple[float, peft.PeftConfig | None]] = {
    "lora": (20.8, peft.LoraConfig(r=32, target_modules=QUERY_VALUE, task_type="CAUSAL_LM")),
    "lora of the feed-forward layers": (23.0, peft.LoraConfig(r=10, target_modules=MLP, task_type="CAUSAL_LM")),
    "ia3": (21.6, peft.IA3Config(task_type="CAUSAL_LM")),
    "prefix tuning": (20.4, peft.PrefixTuningConfig(num_virtual_tokens=200, task_type="CAUSAL_LM")),
    "prompt tuning": (22.7, peft.PromptTuningConfig(num_virtual_tokens=200, task_type="CAUSAL_LM")),
    "dora": (22.8, peft.LoraConfig(r=32, use_dora=True, target_modules=QUERY_VALUE, task_type="CAUSAL_LM")),
    "miss": (18.9, peft.MissConfig(r=64, task_type="CAUSAL_LM")),
    "full": (36.2, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_pefts_published_runs_are_predicted_within_a_tenth(name: str) -> None:
    """bfloat16 weights, adapters in float32, no autocast, transformers' own loss on whole logits, four rows of 768 tokens."""
    published, config = PUBLISHED[name]
    model: Any = on_meta(LlamaConfig(**LLAMA_3B))
    model = (peft.get_peft_model(model, config, low_cpu_mem_usage=True) if config else model).train()
    ids, attention = torch.ones(4, 768, dtype=torch.long), torch.ones(4, 768, dtype=torch.long)
    attention[1:, 700:] = 0
    held = trace_training(model, lambda: model(input_ids=ids, attention_mask=attention, labels=ids).loss, Kernels("cuda"))
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    total = held.total + sum(size + 2 * size * trained for size, trained in sizes)  # AdamW: two states as large as the weight
    assert 0.9 * published < total / 2**30 < 1.02 * published


# GB in all, one row of 512 tokens, LoRA r=64 on every linear layer, checkpointed: Dettmers et al. 2023 (arXiv:2305.14314),
# figure 6.
QLORA = {
    "7B": (6.9, {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "65B": (45.0, {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}),
}


@pytest.mark.parametrize("name", QLORA)
def test_qlora_is_predicted_within_a_fifth_of_the_paper(name: str) -> None:
    published, sizes = QLORA[name]
    base = on_meta(LlamaConfig(vocab_size=32000, **sizes))
    lora = peft.LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base, lora, low_cpu_mem_usage=True).train()
    base.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})
    layout = Quantization("bitsandbytes", 4, skip_modules=("lm_head",))
    quantised = quantised_weights(model, layout)
    ids = torch.ones(1, 512, dtype=torch.long)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    held = trace_training(model, loss, Kernels("cuda", quantised=frozenset(quantised)))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    weights = sum(quantised_bytes(p.shape, layout) if id(p) in quantised else 2 * p.numel() for p in frozen)
    adapter = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (weights + 3 * adapter + held.total) / 1e9 == pytest.approx(published, rel=0.2)
