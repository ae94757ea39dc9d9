"""Adapters on many architectures: heads, answers under virtual tokens, Conv1D, tied embeddings and experts."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.model import Base, load_base_model
from peftkit.engine.modules import linearised, with_conv1d
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import Example
from tests.conftest import bert_like_tokenizer, rows_of, write_jsonl
from tests.contracts.tiny_models import DECODERS, save_tiny_model
from tests.runs import run_cli

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4, "lora_alpha": 8},
    "prompt_tuning": {"method": "prompt_tuning", "num_virtual_tokens": 4},
    "prefix_tuning": {"method": "prefix_tuning", "num_virtual_tokens": 4},
}
MODELS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": (
        "bert", "roberta", "distilbert", "deberta-v2", "modernbert", "electra", "albert", "mpnet", "xlnet", "bart", "t5",
        "llama", "gpt2", "qwen2", "gemma2", "opt", "bloom", "gpt_neox", "falcon", "mistral",
    ),
    "TOKEN_CLS": ("modernbert", "deberta-v2", "distilbert", "llama", "gpt2", "t5"),
    "QUESTION_ANS": ("modernbert", "roberta", "distilbert", "big_bird", "llama", "qwen2", "t5", "bart"),
}  # fmt: skip
PREFIXES = ("model", "transformer", "bert", "roberta", "distilbert", "deberta", "electra", "albert", "mpnet", "gpt_neox")


@dataclass(frozen=True)
class Run:
    """A trained adapter on a model with a new head."""

    task: str
    method: str
    folder: Path
    summary: dict[str, Any]

    @functools.cached_property
    def loaded(self) -> LoadedAdapter:
        """The adapter, ready to answer."""
        return load_adapter(self.folder / "run")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny model, by type: `tiny("llama")`; further arguments change its config."""
    root = tmp_path_factory.mktemp("architectures")

    @functools.cache
    def folder(model_type: str, **changes: Any) -> Path:
        return save_tiny_model(model_type, root / "-".join([model_type, *changes]), **changes)

    return folder


def write_recipe(folder: Path, task: str, model: Path, adapter: dict[str, Any], **training: Any) -> Path:
    """A recipe of two steps over four rows, which lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(model)},
        "adapter": adapter,
        "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows_of(task, 4))), "max_length": 120},
        "training": {"learning_rate": 0.05, "max_steps": 2, "batch_size": 4, "micro_batch_size": 4} | training,
    }
    if task == "CAUSAL_LM":
        recipe["generation"] = {"max_new_tokens": 4}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def trained(folder: Path, task: str, model: Path, adapter: dict[str, Any], **training: Any) -> Run:
    """A run of such a recipe."""
    result = run_cli("train", write_recipe(folder, task, model, adapter, **training), "--output", folder / "run", "--json")
    assert result.code == 0, result.err
    return Run(task, adapter["method"], folder, result.json)


CELLS = [(task, name, method) for task, names in MODELS.items() for name in names for method in ("lora", "prompt_tuning")]


@pytest.fixture(scope="module", params=CELLS, ids="-".join)
def run(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run for each task, model and method."""
    task, name, method = request.param
    return trained(tmp_path_factory.mktemp("run"), task, tiny(name), ADAPTERS[method])


def bare(name: str) -> str:
    """A parameter's name without what its class calls the backbone."""
    first, _, rest = name.partition(".")
    return rest if first in PREFIXES else name


def untrained(run: Run) -> dict[str, torch.Tensor]:
    """The tensors that the checkpoint lacks, as training found them."""
    base = run.loaded.facts.base_model(run.loaded.folder)
    model, _ = load_base_model(base, run.loaded.facts.encoding)
    in_file = load_file(Path(base.path) / "model.safetensors").keys()
    known = {*in_file, *map(bare, in_file)}
    return {name: tensor.detach() for name, tensor in model.named_parameters() if bare(name) not in known}


def plain(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors by the base model's names, without the copies that PEFT keeps of what it replaces."""
    wrappers = re.compile(r"^base_model\.(model\.)?|modules_to_save\.default\.")
    return {wrappers.sub("", name): tensor for name, tensor in tensors if ".original_module." not in name}


def test_every_tensor_of_a_new_head_is_trained_saved_and_restored(run: Run) -> None:
    assert run.summary["certificate"]["passed"]  # with another seed for the new head
    saved = plain(load_file(run.folder / "run/adapter/adapter_model.safetensors").items())
    restored = plain(run.loaded.model.named_parameters())
    head = untrained(run)
    assert head
    for name, before in head.items():
        assert not torch.equal(saved[name], before), f"{name} has not moved"
        assert torch.equal(saved[name], restored[name])


def test_an_adapter_answers_a_file_and_merges_where_it_can(run: Run) -> None:
    answers = run.folder / "answers.jsonl"
    result = run_cli("infer", "--adapter", run.folder / "run", "--input", run.folder / "rows.jsonl", "--output", answers)
    assert result.code == 0, result.err
    assert len([json.loads(line)["prediction"] for line in answers.read_text().splitlines()]) == 4
    merged = run_cli("merge", "--adapter", run.folder / "run", "--output", run.folder / "merged", "--json")
    assert merged.code == (0 if run.method == "lora" else 2), merged.err
    assert (run.folder / "merged").is_dir() == (run.method == "lora")


def probes(loaded: LoadedAdapter) -> list[Example]:
    """Four texts of differing length."""
    encoded = [example for row in loaded.runtime.probe_rows() for example in loaded.runtime.encode(row, "probe", target=False)]
    return [example for example in encoded if example is not None]


@torch.no_grad()
def test_logits_of_a_row_do_not_depend_on_the_padding_of_its_batch(run: Run) -> None:
    runtime, model = run.loaded.runtime, run.loaded.model
    examples = probes(run.loaded)
    together = runtime.forward(model, runtime.collate(examples))
    for example, row in zip(examples, together, strict=True):
        alone = runtime.forward(model, runtime.collate([example]))[0]
        cut = row if run.task == "SEQ_CLS" else row[: len(alone)]
        assert len(alone) == (2 if run.task == "SEQ_CLS" else example.length)  # no logits of virtual tokens
        torch.testing.assert_close(cut, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["distilbert", "deberta-v2", "modernbert", "albert", "mpnet", "xlnet"])
def test_a_model_without_keys_and_values_is_refused_prefixes_with_the_reason(tiny: Any, tmp_path: Path, name: str) -> None:
    recipe = write_recipe(tmp_path, "SEQ_CLS", tiny(name), ADAPTERS["prefix_tuning"])
    for command in (("plan", recipe), ("train", recipe, "--output", tmp_path / "run")):
        result = run_cli(*command)
        assert result.code == 2
        assert "keeps no keys and values, so none can be put in front of them" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("name", DECODERS)
def test_virtual_tokens_reach_every_decoder(tiny: Any, tmp_path: Path, name: str, method: str) -> None:
    if (name, method) == ("deepseek_v3", "prefix_tuning"):
        refused = run_cli("plan", write_recipe(tmp_path, "CAUSAL_LM", tiny(name), ADAPTERS[method]))
        assert (refused.code, "one compressed vector in place of keys and values" in refused.err) == (2, True)
        return
    assert trained(tmp_path, "CAUSAL_LM", tiny(name), ADAPTERS[method]).summary["certificate"]["passed"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_the_backbone_of_a_decoder_that_answers_questions_is_that_of_the_checkpoint(tiny: Any, name: str) -> None:
    model, missing = load_base_model(Base(str(tiny(name)), TASKS["QUESTION_ANS"]), Encoding(max_length=8))
    in_file = {bare(key): tensor for key, tensor in load_file(tiny(name) / "model.safetensors").items()}
    backbone = {bare(key): tensor for key, tensor in model.state_dict().items() if not key.startswith("qa_outputs.")}
    assert missing == {"qa_outputs.weight", "qa_outputs.bias"}
    assert backbone.keys() == {key for key in in_file if not key.startswith("lm_head.")}
    assert all(torch.equal(tensor, in_file[key]) for key, tensor in backbone.items())


@torch.no_grad()
def test_gpt2_is_linearised_and_put_back_exactly(tiny: Any) -> None:
    ids = torch.arange(5, 45).view(2, 20)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt2")).eval()
    before, logits = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(ids).logits
    assert "Conv1D" not in {type(module).__name__ for module in linearised(model).modules()}
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-6)
    after = with_conv1d(model).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(model(ids).logits, logits)


def test_a_merged_loha_on_gpt2_is_a_plain_gpt2(tiny: Any, tmp_path: Path) -> None:
    run = trained(tmp_path, "CAUSAL_LM", tiny("gpt2"), {"method": "loha", "r": 4})
    assert run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged").code == 0
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "merged/model.safetensors").items()}
    assert shapes == {name: tensor.shape for name, tensor in load_file(tiny("gpt2") / "model.safetensors").items()}
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(plain.eval()(ids).logits, run.loaded.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt2")).eval()
    assert not torch.allclose(base(ids).logits, plain(ids).logits, atol=1e-3)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "modules_to_save": ["embed_tokens"]},
        {"method": "lora", "modules_to_save": ["lm_head"]},
        {"method": "lora", "trainable_token_indices": [40, 41, 42]},
        {"method": "trainable_tokens", "token_indices": list(range(60, 120))},
    ],
    ids="-".join,
)
def test_embeddings_that_are_trained_themselves_merge_exactly(tiny: Any, tmp_path: Path, adapter: dict[str, Any]) -> None:
    trained(tmp_path, "CAUSAL_LM", tiny("llama", tie_word_embeddings=True), adapter)
    result = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert result.code == 0, result.err
    assert result.json["max_abs_diff_saved"] < 1e-5


EXPERTS = dict.fromkeys(("deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), "mlp")
EXPERTS |= {"granitemoe": "block_sparse_moe", "llama4_text": "feed_forward"}
FURTHER = [(name, {}) for name in EXPERTS] + [(name, {"target_modules": ["q_proj"]}) for name in ("mixtral", "qwen3_moe")]


@pytest.mark.parametrize(("name", "further"), FURTHER, ids=str)
def test_fused_experts_train_reload_and_merge(tiny: Any, tmp_path: Path, name: str, further: dict[str, Any]) -> None:
    experts = [f"{EXPERTS[name]}.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    trained(tmp_path, "CAUSAL_LM", tiny(name), {"method": "lora", "r": 4, "target_parameters": experts} | further)
    result = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--json")
    assert result.code == 0, result.err
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny(name), tmp_path / "merged"))
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    of_experts = {key for key in changed if re.search(r"experts|(input|output)_linear", key)}  # Granite's files: the latter
    assert of_experts
    assert all(further and "q_proj" in key for key in changed - of_experts)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_the_answer_of_bert_depends_on_which_text_is_which(tiny: Any, tmp_path: Path, method: str) -> None:
    run = trained(tmp_path, "QUESTION_ANS", with_two_texts(tiny("bert"), tmp_path / "bert"), ADAPTERS[method])
    runtime, model = run.loaded.runtime, run.loaded.model
    batch = runtime.collate(probes(run.loaded))
    assert batch["token_type_ids"].sum() > 0
    other = batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert not torch.allclose(runtime.forward(model, batch), runtime.forward(model, other), atol=1e-4)


def with_two_texts(model: Path, folder: Path) -> Path:
    """The model with a tokenizer that tells the two texts of a pair apart."""
    transformers.AutoModel.from_pretrained(model).save_pretrained(folder)
    bert_like_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["bert", "llama", "deberta-v2", "t5"])
def test_answers_are_learned_by_heart_behind_virtual_tokens(tiny: Any, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path, "QUESTION_ANS", tiny(name), ADAPTERS["prompt_tuning"], max_steps=80, warmup_steps=0, logging_steps=1
    )
    contexts = ["the cat sat because tom ran home", "tom ran while it was late", "in an old tree tom ran", "dogs and tom ran"]
    answers = [{"text": ["tom ran"], "answer_start": [text.index("tom")]} for text in contexts]
    rows = [{"question": "who?", "context": text, "answers": answer} for text, answer in zip(contexts, answers, strict=True)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = run_cli("train", recipe, "--output", run, "--json")
    assert result.code == 0, result.err
    assert result.json["train_loss"] < 0.1
    assert run_cli("infer", "--adapter", run, "--input", source, "--output", tmp_path / "answers.jsonl").code == 0
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in found] == ["tom ran"] * 4
    assert [row["start"] for row in found] == [answer["answer_start"][0] for answer in answers]


@pytest.mark.parametrize(("name", "place"), [("bert", 0), ("deberta-v2", 0), ("llama", -1)])
def test_the_token_that_is_pooled_is_one_of_the_text(tiny: Any, tmp_path: Path, name: str, place: int) -> None:
    """The first one of an encoder, the last one of a decoder; the same as by hand on [virtual tokens, text]."""
    run = trained(tmp_path, "SEQ_CLS", tiny(name), ADAPTERS["prompt_tuning"])
    example = probes(run.loaded)[0]
    batch, model = run.loaded.runtime.collate([example]), run.loaded.model
    base: Any = model.get_base_model()
    embeds = base.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([model.get_prompt(1), embeds], dim=1)
    with model.disable_adapter():
        states = base.base_model(inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2])).last_hidden_state
        pooled = states[:, 4:][:, place][:, None]
    pooler = getattr(base.base_model, "pooler", None) or getattr(base, "pooler", None)
    head = getattr(base, "classifier", None) or base.score  # the trained one
    logits = head(pooler(pooled) if pooler is not None else pooled[:, 0])
    torch.testing.assert_close(run.loaded.runtime.forward(model, batch), logits, rtol=1e-4, atol=1e-5)
