"""Tiny models built from configs, tiny data, and the command line called in this process."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from peftkit.methods import METHODS
from peftkit.recipe.fit import why_not
from peftkit.tasks import TASKS

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_HOME = tempfile.TemporaryDirectory(prefix="peftkit-tests-")  # tokenised rows are kept there
os.environ["HF_HOME"] = _HOME.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_SENTENCES = """
the cat sat on a mat and saw two red birds in an old tree while seven small dogs ran home because it was late
how many apples are left if tom has three and buys four more then he eats one good bad great poor film
"""
WORDS = _SENTENCES.split()
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


ROWS: dict[str, dict[str, Any]] = {
    "CAUSAL_LM": {"instruction": "hello", "output": "hi"},
    "SEQ_2_SEQ_LM": {"source": "hello", "target": "hi"},
    "SEQ_CLS": {"text": "hello", "label": "greeting"},
    "TOKEN_CLS": {"tokens": ["hello", "tom"], "tags": ["O", "B-PER"]},
    "QUESTION_ANS": {"question": "who?", "context": "tom sat", "answers": {"text": ["tom"], "answer_start": [0]}},
    "FEATURE_EXTRACTION": {"anchor": "hello", "positive": "hi"},
}


PAIRS = [(task, method) for task in TASKS for method in METHODS]
FITTING = [(task, method) for task, method in PAIRS if not why_not(METHODS[method], task, {})]


@dataclass
class Result:
    """What a command line call gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


@pytest.fixture(scope="module", autouse=True)
def _without_memory_plan(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs are not traced for their memory where tests are about something else: it takes as long as training a tiny model."""
    if request.path.parent.name not in ("engine", "contracts") or request.path.stem == "test_memory":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftkit.commands.train.plan_memory", lambda *arguments: SimpleNamespace(total=1))
        yield


def pytest_collection_finish() -> None:
    """Leave what is imported by now, millions of objects, to no further search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _without_waiting_for_disks() -> Iterator[None]:
    """Files are not forced to the disk, which takes a fifth of the time: no test takes the power away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `peftkit ARGS` in this process: `cli("train", recipe, "--json")`."""

    def run(*arguments: Any) -> Result:
        from peftkit.cli import main

        monkeypatch.setattr(sys, "argv", ["peftkit", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(bool(error.code))
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe from a mapping (or text) into the test's folder: `write_recipe({...}, name="r.yaml")`."""

    def write(content: dict[str, Any] | str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A valid recipe as a mapping; its model is a name on the hub, which validation does not look up."""
    write_jsonl(tmp_path / "train.jsonl", [ROWS["CAUSAL_LM"]])
    return {
        "task": "CAUSAL_LM",
        "model": {"name_or_path": "owner/name"},
        "adapter": {"method": "lora", "r": 4},
        "data": {"train": "train.jsonl", "validation": 0.1},
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_adapter(folder: Path, peft_type: str = "LORA") -> Path:
    """A folder that says of itself that it is a PEFT adapter of a type, which is all that validation reads of one."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}), encoding="utf-8")
    return folder


def write_starter_adapters(folder: Path) -> None:
    """The trained adapters that starter recipes in this folder name, for X-LoRA and for AdapterFusion."""
    for name in ("first", "second"):
        write_adapter(folder / "runs" / name)
    for name in ("one_task", "other_task"):
        write_adapter(folder / "runs" / name, "BOTTLENECK")


def instruction_rows(count: int) -> list[dict[str, str]]:
    """Distinct rows of differing length with a question and its answer."""
    rows = []
    for index in range(count):
        words = [WORDS[(index * 7 + step * 3) % len(WORDS)] for step in range(3 + index % 6)]
        rows.append({"instruction": " ".join(words), "output": " ".join(reversed(words[: 2 + index % 4]))})
    return rows


def label_rows(count: int) -> list[dict[str, str]]:
    """Distinct rows of two learnable classes."""
    rows = []
    for index in range(count):
        good = index % 2 == 0
        words = [WORDS[(index * 5 + step * 11) % (len(WORDS) - 6)] for step in range(2 + index % 5)]
        rows.append(
            {"text": " ".join([*words, "good great" if good else "bad poor", "film"]), "label": "pos" if good else "neg"}
        )
    return rows


def tag_rows(count: int) -> list[dict[str, list[str]]]:
    """Distinct rows of four to eight words with learnable tags in BIO."""
    tags = {"cat": "B-WHO", "birds": "B-WHO", "tom": "B-WHO", "dogs": "B-WHO", "sat": "B-DID", "ran": "B-DID", "home": "I-DID"}
    rows = []
    for index in range(count):
        words = [WORDS[(index * 7 + step * 3) % len(WORDS)] for step in range(4 + index % 5)]
        rows.append({"tokens": words, "tags": [tags.get(word, "O") for word in words]})
    return rows


def question_rows(count: int) -> list[dict[str, Any]]:
    """Distinct rows with a context of 30 words (two windows of 60 tokens); every fourth question has no answer."""
    rows = []
    for index in range(count):
        words = [WORDS[(index * 5 + step) % len(WORDS)] for step in range(30)]
        place = index * 3 % 25
        start = len(" ".join([*words[:place], ""]))
        found = {"text": [words[place]], "answer_start": [start]} if index % 4 else {"text": [], "answer_start": []}
        rows.append({"question": f"who is {words[place]}?", "context": " ".join(words), "answers": found})
    return rows


def pair_rows(count: int) -> list[dict[str, str]]:
    """Distinct rows of two texts that share two words."""
    texts = [[WORDS[(index * 5 + step) % len(WORDS)] for step in range(7)] for index in range(count)]
    return [{"anchor": " ".join(words[:4]), "positive": " ".join(words[2:])} for words in texts]


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    """Rows that a task learns from."""
    makers: dict[str, Callable[[int], list[Any]]] = {
        "CAUSAL_LM": instruction_rows,
        "SEQ_2_SEQ_LM": lambda number: [
            {"source": row["instruction"], "target": row["output"]} for row in instruction_rows(number)
        ],
        "SEQ_CLS": label_rows,
        "TOKEN_CLS": tag_rows,
        "QUESTION_ANS": question_rows,
        "FEATURE_EXTRACTION": pair_rows,
    }
    return makers[task](count)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of tiny models with random weights and tokenizers: `llama`, `gpt2`, `bert`, `t5`."""
    import torch
    import transformers

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    configs: dict[str, tuple[str, Any]] = {
        "llama": (
            "LlamaForCausalLM",
            transformers.LlamaConfig(
                vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, **common,
            ),
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            transformers.GPT2Config(
                vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            ),
        ),
        "bert": (
            "BertModel",
            transformers.BertConfig(
                vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
            ),
        ),
        "t5": (
            "T5ForConditionalGeneration",
            transformers.T5Config(
                vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
            ),
        ),
    }  # fmt: skip
    tokenizer = tiny_tokenizer()
    for name, (class_name, config) in configs.items():
        getattr(transformers, class_name)(config).save_pretrained(root / name)
        (tiny_tokenizer(adds_end=True) if name == "t5" else tokenizer).save_pretrained(root / name)
    return root


def tiny_tokenizer(chat_template: str | None = CHATML, *, adds_end: bool = False) -> Any:
    """A byte-level BPE tokenizer of 300 tokens with ChatML markers; like T5's, it may end every text with `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    if adds_end:
        end = ("</s>", backend.token_to_id("</s>"))
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=256,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


def bert_like_tokenizer() -> Any:
    """A tokenizer of short pieces that puts [CLS] and [SEP] around texts and tells the two texts of a pair apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    backend.train_from_iterator([f"{' '.join(WORDS)} ?"] * 3, trainer)
    numbers = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=numbers
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def tiny_recipe(task: str, model: Path, train: Path, max_length: int) -> dict[str, Any]:
    """A recipe of six steps on a tiny model, as a mapping to change and write."""
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(model)},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": str(train), "max_length": max_length},
        "training": {"learning_rate": 0.01, "max_steps": 6, "batch_size": 8, "micro_batch_size": 4, "logging_steps": 1},
    }
    return recipe | ({"generation": {"max_new_tokens": 8}} if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else {})


@pytest.fixture
def lm_recipe(models_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A CAUSAL_LM recipe on the tiny Llama."""
    train = write_jsonl(tmp_path / "train.jsonl", instruction_rows(22))
    return tiny_recipe("CAUSAL_LM", models_dir / "llama", train, 128)


@pytest.fixture
def cls_recipe(models_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A SEQ_CLS recipe on the tiny BERT."""
    train = write_jsonl(tmp_path / "labels.jsonl", label_rows(24))
    return tiny_recipe("SEQ_CLS", models_dir / "bert", train, 48)


@pytest.fixture
def s2s_recipe(models_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A SEQ_2_SEQ_LM recipe on the tiny T5."""
    rows = [{"source": row["instruction"], "target": row["output"]} for row in instruction_rows(20)]
    return tiny_recipe("SEQ_2_SEQ_LM", models_dir / "t5", write_jsonl(tmp_path / "pairs.jsonl", rows), 64)


@pytest.fixture(scope="session")
def language_adapters(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of several methods on the tiny Llama, by name."""
    from tests.serving import LANGUAGE, train_language

    root = tmp_path_factory.mktemp("adapters")
    return {name: train_language(models_dir, root, name) for name in LANGUAGE}


@pytest.fixture(scope="session")
def answers_alone(language_adapters: dict[str, Path]) -> dict[str, list[str]]:
    """What each of them, loaded by itself, answers to PROMPTS, and `base` without any."""
    from peftkit.engine.loaded import load_adapter, without_adapter
    from tests.serving import PROMPTS, alone, answers_of

    found = {name: alone(path, PROMPTS) for name, path in language_adapters.items()}
    with without_adapter(load_adapter(language_adapters["lora"])) as base:
        return found | {"base": answers_of(base, PROMPTS)}
