"""Recomputed layers and offloaded activations: the same loss and gradients, and really less that is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, set_seed

from peftkit.engine.savings import Offload, checkpoint_layers, is_dear, offload_activations, recomputable
from tests.contracts.matrix import Cell, write_recipe
from tests.contracts.tiny_models import tiny_config
from tests.runs import curve, run_cli, tiny_recipe, train

SETTINGS = [True, "selective", 1]
AUTO = {"bert": AutoModelForSequenceClassification, "t5": AutoModelForSeq2SeqLM}
IDS = torch.arange(3, 83).view(2, 40)


def model_of(model_type: str, **changes: Any) -> Any:
    set_seed(0)
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    return AUTO.get(model_type, AutoModelForCausalLM).from_config(config).train()


def loss_of(model: Any) -> torch.Tensor:
    torch.manual_seed(7)  # of the dropout
    is_classifier = "ForSequenceClassification" in type(model).__name__
    labels = torch.tensor([0, 1]) if is_classifier else IDS
    loss: torch.Tensor = model(input_ids=IDS, labels=labels, **({} if is_classifier else {"use_cache": False})).loss
    return loss


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def step(model: Any) -> tuple[float, list[torch.Tensor]]:
    loss = loss_of(model)
    loss.backward()
    return float(loss), gradients(model)


def assert_same_step(model: Any, change: Callable[[], None]) -> None:
    loss, expected = step(model)
    model.zero_grad()
    change()
    changed_loss, found = step(model)
    assert changed_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "mixtral", "opt", "t5"])
def test_recomputed_layers_give_the_same_loss_and_gradients(model_type: str, setting: Any) -> None:
    model = model_of(model_type)
    assert_same_step(model, lambda: checkpoint_layers(model, setting))


@pytest.mark.parametrize("setting", SETTINGS)
def test_dropout_is_the_same_when_a_layer_is_recomputed(setting: Any) -> None:
    model = model_of("opt", dropout=0.3, attention_dropout=0.3)
    assert float(loss_of(model)) != pytest.approx(float(loss_of(model.eval())), rel=1e-4)
    assert_same_step(model.train(), lambda: checkpoint_layers(model, setting))


class Computed(TorchDispatchMode):
    """Counts dear operations and all others, and the bytes of dear results."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["dear" if is_dear(op, args) else str(op)] += 1
        return op(*args, **(kwargs or {}))


def computed_again(setting: Any) -> Counter[str]:
    """What the backward pass of a Llama computes more than without recomputing."""
    counts = []
    for chosen in (False, setting):
        model = model_of("llama")
        if chosen:
            checkpoint_layers(model, chosen)
        loss = loss_of(model)
        with Computed() as found:
            loss.backward()
        counts.append(found.counts)
    return counts[1] - counts[0]


def test_true_computes_products_again_and_selective_does_not() -> None:
    everything, selective = computed_again(True), computed_again("selective")
    assert everything["dear"] >= 2 * 6  # the last product of a layer is needed by nothing in it
    assert selective["dear"] == 0
    assert selective["aten.silu.default"] == everything["aten.silu.default"] == 2


@pytest.mark.parametrize(("setting", "expected"), [(False, [1, 1, 1]), (True, [2, 2, 2]), (1, [2, 1, 1]), (2, [2, 2, 1])])
def test_a_number_is_that_of_the_first_layers(setting: Any, expected: list[int]) -> None:
    model, runs = model_of("llama", num_hidden_layers=3), [0, 0, 0]
    checkpoint_layers(model, setting) if setting else None
    for number, layer in enumerate(recomputable(model)):
        layer.input_layernorm.register_forward_hook(lambda *_, place=number: runs.__setitem__(place, runs[place] + 1))  # type: ignore[union-attr, operator]
    step(model)
    assert runs == expected


# Layers that add to their base layer's output in place; torch's own selective checkpointing is silently wrong for some.
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("method", "model"), [("adalora", "bert"), ("gralora", "llama"), ("poly", "llama"), ("cpt", "llama")])
def test_methods_train_alike_with_recomputed_layers(
    models_dir: Path, tmp_path: Path, method: str, model: str, setting: Any
) -> None:
    recipe = write_recipe(Cell(method, "SEQ_CLS" if model == "bert" else "CAUSAL_LM", model), models_dir, tmp_path)
    arguments = ("--set", "data.validation=null", "--set", "training.eval_on_start=false", "--set", "training.eval_steps=null")
    arguments += ("--set", "training.load_best_model_at_end=null", "--set", "training.max_steps=3")
    train(recipe, tmp_path / "plain", *arguments)
    train(recipe, tmp_path / "again", *arguments, "--set", f"training.gradient_checkpointing={str(setting).lower()}")
    for ours, plain in zip(
        curve(tmp_path / "again", "loss", "grad_norm"), curve(tmp_path / "plain", "loss", "grad_norm"), strict=True
    ):
        assert ours == pytest.approx(plain, rel=2e-5)


@pytest.mark.parametrize("setting", ["selective", "1"])
def test_a_run_with_recomputed_layers_is_certified(models_dir: Path, tmp_path: Path, setting: str) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    summary = train(recipe, tmp_path / "run", "--set", f"training.gradient_checkpointing={setting}")
    assert summary["certificate"]["passed"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.gradient_checkpointing=3", "is 3; LlamaForCausalLM has 2 layers that can be recomputed"),
        ("training.activation_offloading=true", "moves activations from a CUDA GPU to the CPU's memory"),
    ],
)
def test_the_plan_refuses_what_this_model_or_machine_cannot(models_dir: Path, tmp_path: Path, setting: str, words: str) -> None:
    result = run_cli("plan", tiny_recipe("CAUSAL_LM", models_dir, tmp_path), "--set", setting)
    assert result.code == 2
    assert f"{setting.partition('=')[0]}: {words}" in result.err


class FakeOffload(Offload):
    """Keeps copies of its own in place of those in the CPU's memory."""

    def __init__(self, model: nn.Module, min_bytes: int) -> None:
        super().__init__(model.parameters(), min_bytes)
        self.moved: list[torch.Tensor] = []
        self.brought_back = 0

    def move_out(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        held = tensor.clone()
        self.moved.append(tensor)

        def move_back() -> torch.Tensor:
            self.brought_back += 1
            return held

        return move_back


@pytest.mark.parametrize("setting", [False, True, "selective"])
def test_offloaded_activations_give_the_same_gradients(setting: Any) -> None:
    model = model_of("llama")
    offload = FakeOffload(model, min_bytes=4096)

    def change() -> None:
        offload_activations(model, offload)
        if setting:
            checkpoint_layers(model, setting)

    assert_same_step(model, change)
    assert offload.brought_back > 0


def test_activations_are_offloaded_and_parameters_are_not() -> None:
    model = model_of("llama")
    offload = FakeOffload(model, min_bytes=4096)
    offload_activations(model, offload)
    loss_of(model)
    places = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not {tensor.untyped_storage().data_ptr() for tensor in offload.moved} & places
    assert min(tensor.numel() * tensor.element_size() for tensor in offload.moved) >= 4096


def test_what_several_operations_save_is_moved_once() -> None:
    model = model_of("llama", num_hidden_layers=1)
    offload = FakeOffload(model, min_bytes=0)
    offload_activations(model, offload)
    inputs: list[torch.Tensor] = []
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    loss_of(model)  # q_proj, k_proj and v_proj read the same
    assert sum(tensor.data_ptr() == inputs[0].data_ptr() for tensor in offload.moved) == 1


def test_recomputed_layers_leave_their_inputs_alone_to_be_offloaded() -> None:
    sizes = []
    for setting in (False, True):
        model = model_of("llama")
        offload = FakeOffload(model, min_bytes=1024)
        offload_activations(model, offload)
        checkpoint_layers(model, setting) if setting else None
        loss_of(model)
        sizes.append(sum(tensor.numel() for tensor in offload.moved))
    assert sizes[1] < 0.5 * sizes[0]


def test_nothing_is_offloaded_where_nothing_is_kept() -> None:
    model = model_of("llama")
    offload = FakeOffload(model, min_bytes=0)
    offload_activations(model, offload)
    with torch.no_grad():
        loss_of(model)
    assert offload.moved == []


def test_a_pass_that_fails_closes_what_it_opened() -> None:
    model = model_of("llama")
    offload_activations(model, FakeOffload(model, min_bytes=0))
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10_000]]))
    x = torch.ones(2, requires_grad=True)
    assert (x * x).grad_fn._saved_self is x  # type: ignore[union-attr]  # no hook is left


def test_attention_of_all_rows_is_kept() -> None:
    import torch.nn.attention.varlen

    assert is_dear(torch.ops.torch_attn._varlen_attn.default, ())
