"""Tiny models built from configs, tiny data, and the command line called in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
}


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
        tokenizer.save_pretrained(root / name)
    return root


def tiny_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of 300 tokens with ChatML markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=256,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_recipe(task: str, model: Path, train: Path, max_length: int) -> dict[str, Any]:
    """A recipe of six steps on a tiny model, as a mapping to change and write."""
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(model)},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": str(train), "max_length": max_length},
        "training": {"learning_rate": 0.01, "max_steps": 6, "batch_size": 8, "micro_batch_size": 4, "logging_steps": 1},
    }
    return recipe | ({} if task == "SEQ_CLS" else {"generation": {"max_new_tokens": 8}})


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
