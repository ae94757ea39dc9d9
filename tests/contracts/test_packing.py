"""Packing: which rows go together, the proof before training, and losses, gradients and adapters that do not notice."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.adapter import attach_adapter, trained_parameters
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.hooks import Context
from peftkit.engine.model import base_of, load_base_model, load_tokenizer
from peftkit.engine.packing import best_fit, block_positions, for_model, prove_packing, way_of
from peftkit.errors import RecipeError
from peftkit.methods import METHODS, bottleneck_torch
from peftkit.methods.bottleneck import BottleneckSection
from peftkit.plan import make_plan
from peftkit.recipe.fit import why_not
from peftkit.recipe.load import load_recipe
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX
from tests.conftest import tiny_tokenizer
from tests.contracts.matrix import SETTINGS
from tests.contracts.test_packing_types import (
    LENGTHS,
    PACKS,
    packed_batch,
    rows,
    small_config,
    small_model,
)
from tests.contracts.tiny_models import save_tiny_model

sizes = st.integers(1, 60)
slow_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def first_fit(lengths: list[int], capacity: int) -> int:
    """Packs of first-fit decreasing."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((place for place, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(capacity - length)
        else:
            rooms[place] -= length
    return len(rooms)


@slow_machine
@given(st.lists(sizes, max_size=80), sizes)
def test_every_row_is_in_one_pack(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))


@slow_machine
@given(st.lists(sizes, max_size=80), sizes)
def test_a_pack_of_several_rows_keeps_to_the_capacity(lengths: list[int], capacity: int) -> None:
    for pack in best_fit(lengths, capacity):
        assert sum(lengths[row] for row in pack) <= capacity or len(pack) == 1


@slow_machine
@given(st.lists(sizes, max_size=80), sizes)
def test_packs_and_their_rows_are_in_order(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert [sorted(pack) for pack in packs] == packs
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)


@slow_machine
@given(st.lists(sizes, max_size=80), sizes)
def test_no_two_packs_would_fit_into_one(lengths: list[int], capacity: int) -> None:
    fills = sorted(sum(lengths[row] for row in pack) for pack in best_fit(lengths, capacity))
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


@slow_machine
@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30))
def test_each_row_goes_to_the_fullest_pack_with_room_for_it(lengths: list[int], capacity: int) -> None:
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [fill for fill in fills if fill + length <= capacity]
        if fitting:
            fills.remove(max(fitting))
        fills.append(max(fitting, default=0) + length)
    assert sorted(fills) == sorted(sum(lengths[row] for row in pack) for pack in best_fit(lengths, capacity))


def test_best_fit_needs_no_more_packs_than_first_fit_on_random_rows() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        lengths = [chance.randint(1, 100) for _ in range(chance.randint(1, 200))]
        assert len(best_fit(lengths, 128)) <= first_fit(lengths, 128)


def test_rows_are_packed_the_same_every_time() -> None:
    assert best_fit([5, 3, 5, 2, 9, 1], 8) == [[0, 1], [2, 3, 5], [4]]
    assert best_fit([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert best_fit([], 8) == []


def test_positions_start_again_with_every_row_and_every_token_of_padding() -> None:
    assert block_positions([3, 1, 2], 9) == [0, 1, 2, 0, 0, 1, 0, 0, 0]


ARCHITECTURES = [
    "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_oss", "llama", "mistral", "mixtral", "mpt", "opt", "phi",
    "qwen2", "qwen3",
]  # fmt: skip


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over the targets, as training takes it."""
    runtime = TASKS["CAUSAL_LM"].runtime(tiny_tokenizer(), Encoding(max_length=8))
    return runtime.loss_sum(logits, labels)


def loss_by_row(model: Any) -> torch.Tensor:
    """The loss of the rows of all packs, in one padded batch."""
    parts = [rows()[row] for pack in PACKS for row in pack]
    ids = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    labels = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=IGNORE_INDEX)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return loss_of(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)


def loss_by_pack(model: Any) -> torch.Tensor:
    """The same, packed: the first token of a row is no target of the row before it."""
    batch = packed_batch()
    labels = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
    return loss_of(model(**for_model(batch, model, way_of(model)), use_cache=False).logits, labels)


def loss_and_gradients(model: Any, loss: Callable[[Any], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """A loss, and the gradients of what is trained as one vector."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    return float(value.detach()), torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padded_rows_give_the_same_loss_and_gradients(model_type: str, attention: str) -> None:
    model = small_model(small_config(model_type), attention)
    if model is None:
        return
    model.train()
    loss, gradients = loss_and_gradients(model, loss_by_row)
    packed_loss, packed_gradients = loss_and_gradients(model, loss_by_pack)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert float((packed_gradients - gradients).norm() / gradients.norm()) < 1e-5


def forward(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """As training reads a batch."""
    runtime = TASKS["CAUSAL_LM"].runtime(tiny_tokenizer(), Encoding(max_length=8))
    return runtime.forward(model, batch)


def real_rows() -> list[list[int]]:
    """Rows as token ids."""
    return [row.tolist() for row in rows()]


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_oss", "mixtral", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_passes_where_rows_are_kept_apart(model_type: str, dtype: torch.dtype) -> None:
    model = small_model(small_config(model_type), "eager").to(dtype)
    largest = prove_packing(model, real_rows(), forward)
    assert 0 <= largest < (1e-3 if dtype == torch.float32 else 0.5)


@pytest.mark.parametrize("model_type", ["mamba", "bloom", "lfm2", "recurrent_gemma", "roberta", "zaya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_catches_a_model_that_the_table_does_not_know(
    monkeypatch: pytest.MonkeyPatch, model_type: str, dtype: torch.dtype
) -> None:
    model = small_model(small_config(model_type), "eager").to(dtype)
    monkeypatch.setattr("peftkit.engine.packing.why_not_packed", lambda config, attention: "")
    monkeypatch.setattr("peftkit.engine.packing.packs_by", lambda config, attention: "positions")
    with pytest.raises(RecipeError, match=r"data.packing: \w+ with \w+ attention does not keep packed rows apart"):
        prove_packing(model, real_rows(), forward)


class Leaky(nn.Module):
    """A model of which one token hears a little of the one before it, whichever row that is in."""

    def __init__(self, model: Any, place: int) -> None:
        super().__init__()
        self.model, self.place = model, place

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    def forward(self, **inputs: Any) -> Any:
        """The model's output, some of it from one token earlier."""
        output = self.model(**inputs)
        if output.logits.shape[1] > self.place:
            output.logits[:, self.place] += 0.01 * output.logits[:, self.place - 1]
        return output


def test_the_proof_catches_a_leak_into_the_first_token_of_the_second_row() -> None:
    model = small_model(small_config("llama"), "sdpa")
    lengths = {len(row) for row in real_rows()}
    assert prove_packing(Leaky(model, 10_000), real_rows(), forward) < 1e-3
    for length in lengths:
        with pytest.raises(RecipeError, match="does not keep packed rows apart"):
            prove_packing(Leaky(model, length), [[*range(5, 5 + length)]] * 3, forward)


def test_the_proof_names_what_a_model_does_not_take() -> None:
    def refusing(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        if "position_ids" in batch:
            raise TypeError("got an unexpected keyword argument 'position_ids'")
        return forward(model, batch)

    model = small_model(small_config("llama"), "sdpa")
    with pytest.raises(RecipeError, match="does not take packed rows: TypeError: got an unexpected keyword"):
        prove_packing(model, real_rows(), refusing)


def test_the_proof_takes_a_single_row() -> None:
    model = small_model(small_config("llama"), "sdpa")
    assert prove_packing(model, real_rows()[:1], forward) < 1e-3


def test_the_proof_leaves_no_trace() -> None:
    model = small_model(small_config("llama", attention_dropout=0.5), "eager").train()
    model.lm_head.eval()
    loss_by_row(model).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    prove_packing(model, real_rows(), forward)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(old, parameter.grad) for old, parameter in zip(before, model.parameters(), strict=True))
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]


def test_a_refused_type_is_named_before_anything_is_computed() -> None:
    with pytest.raises(RecipeError, match="`mamba` models cannot keep packed rows apart: its recurrent"):
        prove_packing(small_model(small_config("mamba"), "eager"), real_rows(), forward)


@pytest.mark.parametrize("model_type", ["falcon", "gpt_oss", "mpt", "opt"])
def test_a_mask_made_ready_goes_through_an_adapter(model_type: str) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = AdaptedModel(small_model(small_config(model_type), "eager"), config)
    assert way_of(model) == "mask"
    assert prove_packing(model, real_rows(), forward) < 1e-3


LORA = {"method": "lora", "r": 4, "lora_alpha": 8}
INVOCATION = [70, 71]
FURTHER: dict[str, dict[str, Any]] = {
    "alora": LORA | {"alora_invocation_tokens": INVOCATION},
    "bdlora": LORA | {"use_bdlora": {"target_modules_bd_b": ["q_proj", "v_proj"], "nblocks": 2}},
    "dora": LORA | {"use_dora": True},
    "houlsby": {"method": "bottleneck", "style": "houlsby"},
    "layer_replication": LORA | {"layer_replication": [[0, 2], [0, 2]]},
    "monteclora": LORA | {"monteclora_config": {}},
    "parallel": {"method": "bottleneck", "style": "parallel"},
    "trained_embeddings": LORA | {"trainable_token_indices": [60, 61, 62]},
    "velora": LORA | {"velora_config": {}},
}
WORKING = [name for name in METHODS if not why_not(METHODS[name], "CAUSAL_LM", {"model_type": "llama"})]
GRADIENTS = ["adaption_prompt", "bottleneck", "full", "ia3", "lora", "oft", "shadow", "trainable_tokens", "vera"]
TOKENS = range(60, 119)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def experts(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Two LoRA adapters that change something, and two bottleneck adapters."""
    folders: dict[str, list[str]] = {"LORA": [], "BOTTLENECK": []}
    for number in range(2):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(llama), config)
        folders["LORA"].append(str(tmp_path_factory.mktemp(f"expert-{number}")))
        adapted.save_pretrained(folders["LORA"][-1])
        folders["BOTTLENECK"].append(str(save_bottleneck(llama, tmp_path_factory.mktemp(f"bottleneck-{number}"))))
    return folders


def save_bottleneck(llama: Path, folder: Path) -> Path:
    """A bottleneck adapter of random weights."""
    section = BottleneckSection(init_weights="bert")
    model = bottleneck_torch.attach(transformers.AutoModelForCausalLM.from_pretrained(llama), section, [], Path)
    state = {name: tensor for name, tensor in model.state_dict().items() if ".bottleneck." in name}
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "BOTTLENECK", "settings": section.model_dump(mode="json")}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def adapter_rows() -> list[list[int]]:
    """Rows of tokens that the adapters know, each with the tokens that invoke an activated LoRA."""
    chance = random.Random(0)
    return [[chance.choice(TOKENS), *INVOCATION, *chance.choices(TOKENS, k=length - 3)] for length in LENGTHS]


def adapted_llama(llama: Path, adapter: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """The model with an adapter of random weights, and the recipe's section."""
    source = folder / "rows.jsonl"
    source.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n", encoding="utf-8")
    recipe = {"task": "CAUSAL_LM", "model": {"name_or_path": str(llama)}, "adapter": adapter, "data": {"train": str(source)}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    plan = make_plan(load_recipe(path), detect_hardware())
    tokenizer = load_tokenizer(plan)
    runtime = plan.task.runtime(tokenizer, Encoding(max_length=40))
    ids = torch.tensor([adapter_rows()[0]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    context = Context(plan, total_steps=1000, tokenizer=tokenizer, runtime=runtime, batches=lambda number: iter([batch]))
    model: Any = attach_adapter(*load_base_model(base_of(plan)), context)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, plan.recipe.adapter


def judge_adapter(llama: Path, adapter: dict[str, Any], folder: Path) -> bool:
    """Whether an adapter keeps packed rows apart, which must be what its method says."""
    model, section = adapted_llama(llama, adapter, folder)
    method = METHODS[adapter["method"]]
    if method.num_tasks_field:
        return bool(method.why_not_packed(section))
    try:
        prove_packing(model, adapter_rows(), forward)
    except RecipeError:
        return bool(method.why_not_packed(section))
    return not method.why_not_packed(section)


@pytest.mark.parametrize("name", WORKING)
def test_a_method_keeps_packed_rows_apart_or_says_why_not(
    llama: Path, experts: dict[str, list[str]], tmp_path: Path, name: str
) -> None:
    adapter = {"method": name, **SETTINGS.get(name, {})}
    if kind := METHODS[name].reads_adapters.get("adapters"):
        adapter["adapters"] = experts[kind]
    assert judge_adapter(llama, adapter, tmp_path)


@pytest.mark.parametrize("name", FURTHER)
def test_so_does_a_choice_within_a_method(llama: Path, tmp_path: Path, name: str) -> None:
    assert judge_adapter(llama, FURTHER[name], tmp_path)


def test_so_does_a_router_between_adapters(llama: Path, experts: dict[str, list[str]], tmp_path: Path) -> None:
    assert judge_adapter(llama, {"method": "lora", "arrow_config": {"adapters": experts["LORA"], "top_k": 1}}, tmp_path)


def test_the_methods_that_are_refused_are_these() -> None:
    refused = {name for name in WORKING if METHODS[name].why_not_packed(METHODS[name].section())}
    prompts = {"cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning"}
    assert refused == {*prompts, "lily", "poly"}


@pytest.mark.parametrize(
    "name", ["lora", "ia3", "adaption_prompt", "shadow", "oft", "trainable_tokens", "vera", "full", "bottleneck"]
)
def test_an_adapter_gets_the_same_gradients_from_packed_rows(llama: Path, tmp_path: Path, name: str) -> None:
    model, _ = adapted_llama(llama, {"method": name, **SETTINGS.get(name, {})}, tmp_path)
    model.eval()  # no dropout
    loss, gradients = loss_and_gradients(model, loss_by_row)
    packed_loss, packed_gradients = loss_and_gradients(model, loss_by_pack)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert float((packed_gradients - gradients).norm() / gradients.norm()) < 1e-5
