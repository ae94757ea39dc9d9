"""Every shorter way gives the loss and the gradients of the plain one, on many architectures; else it is not taken."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftkit.engine.adapter import attach_adapter
from peftkit.engine.batches import join
from peftkit.engine.fast import FastPaths, find_fast_paths, proven_head, take_fast_paths, without_mask
from peftkit.engine.fused import FORWARDS, separate
from peftkit.engine.hooks import Context
from peftkit.engine.model import base_of, load_base_model
from peftkit.engine.packing import for_model, way_of
from peftkit.engine.segments import _has_kernel_of_rows, segments_attention
from peftkit.engine.step import Step
from peftkit.engine.token_loss import chunked_loss, liger_loss, loss_and_gradient
from peftkit.plan import Hardware, Plan, make_plan
from peftkit.recipe import load_recipe
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Example
from peftkit.tasks.language_torch import token_loss_sum
from tests.conftest import tiny_tokenizer
from tests.contracts.tiny_models import save_tiny_model
from tests.runs import curve, tiny_recipe, train

EXACT = {"rtol": 1e-5, "atol": 1e-6}
CPU = Hardware("cpu", "the CPU", True, 2**34)
# What is taken: rows end to end (E) or without a mask (M), the loss from hidden states (H), layers with a shorter forward (F).
TAKEN = {
    "llama": "EHF", "qwen2": "EHF", "qwen3": "EHF", "mistral": "EHF", "gemma": "EHF", "gemma2": "EHF", "gemma3_text": "EHF",
    "gpt2": "EH", "gpt_neox": "EHF", "gpt_bigcode": "EHF", "opt": "EHF", "phi": "EHF", "mixtral": "EHF", "qwen3_moe": "EHF",
    "gpt_oss": "EHF", "cohere": "EHF", "granite": "EHF", "olmo2": "EHF", "bloom": "MHF", "falcon": "MH", "mpt": "MHF",
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"sliding_window": 7},
    "gpt_oss": {"sliding_window": 7},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.7},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with an adapter that has been trained a little, and what to run it with."""

    plan: Plan
    model: nn.Module
    runtime: Any
    examples: list[Example]


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Case]:
    """Make a case of a model type and changes of the recipe's sections."""

    def make(model_type: str, task: str = "CAUSAL_LM", **sections: dict[str, Any]) -> Case:
        folder = save_tiny_model(model_type, tmp_path / model_type, **CHANGES.get(model_type, {}))
        model_section = {"name_or_path": str(folder)} | sections.pop("model", {})
        adapter = {"method": "lora", "r": 4, "target_modules": "all-linear"}
        recipe = tiny_recipe(task, tmp_path, tmp_path, model=model_section, **({"adapter": adapter} | sections))
        plan = make_plan(load_recipe(recipe, []), CPU)
        base, missing = load_base_model(base_of(plan), Encoding(max_length=60))
        runtime = plan.task.runtime(tiny_tokenizer(adds_end=task != "CAUSAL_LM"), Encoding(max_length=60))
        model = attach_adapter(base, missing, Context(plan, 6, runtime.tokenizer, runtime)).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return Case(plan, model, runtime, some_examples(task))

    return make


def some_examples(task: str) -> list[Example]:
    """Rows of very different lengths, one of them with weights where the task has them."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for number, length in enumerate((9, 23, 3, 40, 17)):
        ids = torch.randint(5, 299, (length,), generator=generator).tolist()
        labels = [IGNORE_INDEX if place < length // 3 else token for place, token in enumerate(ids)]
        labels = labels if task == "CAUSAL_LM" else [label for label in labels if label != IGNORE_INDEX][:7]
        weights = [0.5] * length if number == 1 and task == "CAUSAL_LM" else None
        examples.append(Example({"input_ids": ids}, labels, 1.0, f"row {number}", length, weights=weights))
    return examples


def loss_and_gradients(case: Case, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss, and the gradient of every trained parameter."""
    case.model.zero_grad()
    loss = compute()
    loss.backward()
    trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    return loss.detach(), [torch.zeros(1) if p.grad is None else p.grad.clone() for p in trained]


def plainly(case: Case, smoothing: float = 0.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As transformers would: padded rows, a mask, whole logits."""
    batch = case.runtime.collate(case.examples)
    return loss_and_gradients(
        case, lambda: case.runtime.loss_sum(case.runtime.forward(case.model, batch), batch["labels"], smoothing)
    )


def shortly(case: Case, paths: FastPaths, smoothing: float = 0.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """By the ways that were taken."""
    if paths.rows == "padded":
        batch = case.runtime.collate(case.examples)
        batch = without_mask(batch) if paths.drops_mask else batch
    else:
        batch = for_model(case.runtime.collate([join(case.examples)]), case.model, way_of(case.model))
    return loss_and_gradients(case, lambda: Step(case.model, case.runtime, paths.head, smoothing)(batch))


def take(case: Case, notes: list[str] | None = None) -> FastPaths:
    """Take the ways; without `notes` none may be given up."""
    found: list[str] = [] if notes is None else notes
    paths = take_fast_paths(case.plan, case.model, case.runtime, case.examples[:3], found.append)
    assert notes is not None or not found
    return paths


def letters(paths: FastPaths) -> str:
    """The ways in short, as `TAKEN` has them."""
    ways = {"E": paths.rows == "end_to_end", "M": paths.drops_mask, "H": paths.head is not None, "F": bool(paths.fused)}
    return "".join(letter for letter, taken in ways.items() if taken)


def assert_same(left: tuple[torch.Tensor, list[torch.Tensor]], right: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Losses and gradients are equal to 1e-5."""
    torch.testing.assert_close(left[0], right[0], **EXACT)
    scale = max(float(gradient.abs().max()) for gradient in left[1])
    for one, other in zip(left[1], right[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("model_type", TAKEN)
def test_loss_and_gradients_are_those_of_the_plain_way(case: Any, model_type: str) -> None:
    made = case(model_type)
    plain = plainly(made)
    paths = take(made)
    assert letters(paths) == TAKEN[model_type]
    assert_same(plain, shortly(made, paths))


@pytest.mark.parametrize("model_type", TAKEN)
def test_the_plan_without_weights_says_what_is_then_taken(case: Any, model_type: str) -> None:
    made = case(model_type)
    foretold = find_fast_paths(made.plan, made.model.to("meta"))
    assert letters(foretold) == TAKEN[model_type]
    assert all(choice.reason for choice in foretold.choices)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders_take_their_loss_from_hidden_states(case: Any, model_type: str) -> None:
    made = case(model_type, "SEQ_2_SEQ_LM")
    plain = plainly(made, 0.1)
    paths = take(made)
    assert "H" in letters(paths)
    assert_same(plain, shortly(made, paths, 0.1))


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "r": 4, "target_modules": ["q_proj", "lm_head"]},
        {"method": "lora", "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"method": "lora", "r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
        {"method": "lora", "r": 4, "use_dora": True},
        {"method": "lora", "r": 4, "bias": "all"},
        {"method": "ia3"},
        {"method": "full"},
        {"method": "head"},
        {"method": "ln_tuning"},
        {"method": "prompt_tuning", "num_virtual_tokens": 4},
        {"method": "prefix_tuning", "num_virtual_tokens": 4},
        {"method": "bottleneck"},
    ],
    ids=lambda adapter: "-".join(map(str, adapter.values())),
)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_every_method_has_the_same_loss_and_gradients(case: Any, model_type: str, adapter: dict[str, Any]) -> None:
    names = {"q_proj": "c_attn"} if model_type == "gpt2" else {}
    targets = {"target_modules": [names.get(name, name) for name in adapter.get("target_modules", [])] or None}
    made = case(model_type, adapter=adapter | (targets if "target_modules" in adapter else {}))
    plain = plainly(made, 0.1)
    assert_same(plain, shortly(made, take(made), 0.1))


def test_a_model_that_computes_something_else_keeps_the_plain_way(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("llama")
    base = made.model.get_base_model()
    monkeypatch.setattr(
        base.lm_head, "forward", lambda states: nn.functional.linear(states, base.lm_head.weight) * states.mean()
    )
    monkeypatch.setattr("peftkit.engine.fused._Norm.apply", lambda x, weight, epsilon: x)
    notes: list[str] = []
    paths = take(made, notes)
    assert any("RMS norms keep their own forward" in note for note in notes)
    assert all("forward" not in vars(module) for kind, module in paths.fused if kind == "RMS norms")


def test_a_wrong_update_shows_though_the_adapter_has_not_learned_yet(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("llama")
    layers = [module for module in made.model.modules() if hasattr(module, "lora_B")]
    for layer in layers:
        nn.init.zeros_(layer.lora_B["default"].weight)
    without_update: Callable[..., Any] = lambda layer, x: layer.base_layer(x)  # noqa: E731
    monkeypatch.setitem(FORWARDS, "LoRA layers", without_update)
    notes: list[str] = []
    take(made, notes)
    assert notes == ["the LoRA layers keep their own forward: the shorter one gives other logits"]
    assert not any(layer.lora_B["default"].weight.any() for layer in layers)


def test_a_model_that_looks_at_the_whole_batch_keeps_its_mask(case: Any) -> None:
    made = case("bloom")

    def mix(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        mask = kwargs.get("attention_mask")
        output.logits = output.logits + (output.logits.mean() if mask is None else output.logits[mask.bool()].mean())
        return output

    made.model.get_base_model().register_forward_hook(mix, with_kwargs=True)
    made.examples[:] = [example for example in made.examples if example.length > 16] * 2
    notes: list[str] = []
    assert not take(made, notes).drops_mask
    assert "rows keep their padding mask: without it logits are others" in notes


def test_rows_that_change_each_other_by_the_method_keep_their_mask(case: Any) -> None:
    made = case("llama", adapter={"method": "lily", "r": 4})
    paths = find_fast_paths(made.plan, made.model)
    assert (paths.rows, paths.drops_mask) == ("padded", False)


def test_noise_that_depends_on_the_length_of_a_row_has_padded_rows(case: Any) -> None:
    made = case("llama", training={"neftune_noise_alpha": 5.0})
    paths = find_fast_paths(made.plan, made.model)
    assert (paths.rows, paths.by_row, paths.drops_mask) == ("padded", False, True)


@pytest.mark.parametrize("packing", ["auto", True])
@pytest.mark.parametrize(
    ("model_type", "adapter"),
    [
        ("llama", {"method": "lora", "r": 4, "modules_to_save": ["lm_head"]}),
        ("llama", {"method": "head"}),
        ("qwen2", {"method": "bitfit"}),
        ("qwen2", {"method": "lora", "r": 4, "bias": "all"}),
        ("llama", {"method": "ln_tuning"}),
        ("llama", {"method": "lora", "r": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_weights_in_16_bits_are_proven_as_they_are_trained(
    case: Any, model_type: str, adapter: dict[str, Any], packing: Any
) -> None:
    made = case(model_type, model={"dtype": "bfloat16"}, adapter=adapter, data={"packing": packing})
    assert made.plan.mixed_precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16):
        plain = plainly(made)
    paths = take(made)
    assert paths.rows != "padded"
    with torch.autocast("cpu", torch.bfloat16):
        short = shortly(made, paths)
    torch.testing.assert_close(plain[0], short[0], rtol=2e-2, atol=0)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_ways_are_proven_on_few_logits(case: Any, task: str) -> None:
    made, sizes = case("llama" if task == "CAUSAL_LM" else "t5", task), []
    long = made.examples[0]
    made.examples[:] = [dataclasses.replace(long, inputs={"input_ids": [7] * 80}, labels=[7] * 80)] * 3
    forward = made.runtime.forward
    made.runtime.forward = lambda model, batch: sizes.append(forward(model, batch)) or sizes[-1]
    assert take(made).head is not None
    assert proven_head(made.model.eval(), made.runtime, made.examples, "no", "float32") is not None
    assert max(len(logits.flatten(0, 1)) for logits in sizes) <= 3 * (3 * 16 + 2)


def test_nothing_is_kept_for_a_matrix_that_is_not_trained(case: Any) -> None:
    made = case("llama")
    take(made)
    batch, kept = made.runtime.collate(made.examples), []
    for trained in (True, False):
        for name, parameter in made.model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(trained)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):  # noqa: B023
            loss = made.runtime.forward(made.model, batch).sum()
        loss.backward()
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.9 * kept[0]


def test_a_loss_that_hidden_states_do_not_give_is_taken_from_whole_logits(case: Any) -> None:
    made = case("granite")
    made.model.get_base_model().config.logits_scaling = 1.0
    before = dataclasses.replace(take(made), rows="padded")
    assert before.head is not None
    for _, module in before.fused:
        separate(module)
    made.model.get_base_model().final_logits_bias = torch.ones(1, 300)  # which Granite's own forward does not add
    notes: list[str] = []
    assert take(made, notes).head is None
    assert notes == ["the loss is taken from whole logits: hidden states give others"]


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 0.0, 1.0, 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_is_the_one_that_autograd_finds(weights: Sequence[float] | None, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 11, requires_grad=True), torch.tensor([3, 0, 10, 4, 4])
    given = None if weights is None else torch.tensor(weights)
    labels = targets[None] if given is None else torch.stack([targets.float(), given], dim=-1)[None]
    expected = token_loss_sum(logits[None], labels, smoothing)
    expected.backward()
    loss, gradient = loss_and_gradient(logits.detach(), targets, given, smoothing)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, logits.grad)


def test_logits_are_never_whole(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("llama")
    head = take(made).head
    monkeypatch.setattr("peftkit.engine.token_loss._CPU_ROWS", 16)
    states, targets, sizes = torch.randn(50, 32, requires_grad=True), torch.randint(0, 300, (50,)), []
    monkeypatch.setattr(head.module, "forward", lambda part: sizes.append(len(part)) or nn.functional.linear(part, weight))
    weight = head.module.weight
    chunked_loss(states, targets, None, head, 0.0).backward()
    assert sizes == [16, 16, 16, 2]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS"])
def test_whole_runs_are_the_same_with_and_without(models_dir: Path, tmp_path: Path, task: str) -> None:
    recipe = tiny_recipe(task, models_dir, tmp_path)
    train(recipe, tmp_path / "fast")
    train(recipe, tmp_path / "plain", "--set", "training.fast_paths=false")
    fast, plain = (curve(tmp_path / name, "loss", "grad_norm") for name in ("fast", "plain"))
    assert fast == [pytest.approx(line, rel=1e-5) for line in plain]


def test_ligers_kernel_is_given_what_ours_gets(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = dataclasses.replace(take(case("llama")).head, softcap=2.0)
    states, targets = torch.randn(9, 32), torch.randint(0, 300, (9,))

    def apply(given: Any, weight: Any, wanted: Any, bias: Any, classes: Any, ignored: int, *options: Any) -> Any:
        logits = torch.tanh(nn.functional.linear(given, weight, bias) / options[3]) * options[3]
        assert (classes, ignored, options[0], options[2]) == (None, -100, 0.0, "sum")
        return nn.functional.cross_entropy(logits, wanted, reduction="sum", label_smoothing=options[1]), None

    module = types.SimpleNamespace(LigerFusedLinearCrossEntropyFunction=types.SimpleNamespace(apply=apply))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", module)
    ours = chunked_loss(states.requires_grad_(), targets, None, head, 0.1)
    torch.testing.assert_close(liger_loss(states, targets, head, 0.1), ours)


@pytest.mark.parametrize("window", [0, 5])
def test_the_kernel_of_all_rows_is_given_what_the_loop_gets(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    lengths = [9, 3, 14]
    query, key, value = (torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2))
    given = torch.tensor([window, *lengths]).view(1, 1, 1, -1)
    module = types.SimpleNamespace(is_causal=True, num_key_value_groups=2)
    expected, _ = segments_attention(module, query, key, value, given, scaling=0.3)  # type: ignore[arg-type]

    def varlen_attn(q: Any, k: Any, v: Any, *, cu_seq_q: Any, cu_seq_k: Any, window_size: Any, **options: Any) -> Any:
        assert cu_seq_q is cu_seq_k
        assert (options["max_q"], options["max_k"], options["enable_gqa"]) == (14, 14, True)
        parts = []
        for start, end in itertools.pairwise(cu_seq_q.tolist()):
            places = torch.arange(end - start)
            distance = places[:, None] - places[None]
            seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
            row = [states[start:end].transpose(0, 1)[None] for states in (q, k, v)]
            attend = nn.functional.scaled_dot_product_attention
            parts.append(attend(*row, attn_mask=seen, scale=options["scale"], enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr("peftkit.engine.segments._has_kernel_of_rows", lambda *arguments: True)
    found, _ = segments_attention(module, query, key, value, given, scaling=0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("size", "value_size", "dtype", "capability", "taken"),
    [
        (128, 128, torch.bfloat16, (9, 0), True),
        (128, 128, torch.float16, (8, 0), True),
        (128, 128, torch.float16, (7, 5), False),
        (192, 128, torch.bfloat16, (9, 0), False),
        (512, 512, torch.bfloat16, (9, 0), False),
        (36, 36, torch.bfloat16, (9, 0), False),
        (128, 128, torch.float32, (9, 0), False),
    ],
)
def test_the_kernel_of_all_rows_is_taken_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, size: int, value_size: int, dtype: torch.dtype, capability: Any, taken: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query, value = (types.SimpleNamespace(is_cuda=True, device="cuda", shape=(1, 4, 10, n)) for n in (size, value_size))
    assert _has_kernel_of_rows(query, value, dtype) is taken  # type: ignore[arg-type]
