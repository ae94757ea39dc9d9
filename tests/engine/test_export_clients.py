"""What is written for other engines, read by programs: architectures and vocabularies by llama.cpp, templates by Go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from peftkit.exports.gguf_torch import write_model
from peftkit.exports.go_template import find_pieces
from peftkit.exports.llama_cpp import find_client, find_go
from peftkit.exports.llama_cpp_torch import check_with_llama_cpp
from peftkit.exports.ollama_torch import run_go
from peftkit.run import write_json
from tests.conftest import WORDS, tiny_tokenizer
from tests.templates import TEMPLATES, template_tokenizer
from tests.unit.test_exports import llama2

CLIENT, WHY = find_client(None)
pytestmark = pytest.mark.export
asks_llama_cpp = pytest.mark.skipif(CLIENT is None, reason=WHY)
GO = find_go(None)

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@dataclass
class StandIn:
    """What the client asks of the material, for a model that no adapter was trained for."""

    folder: Path
    model: Any
    tokenizer: Any
    work_dir: Path
    position_limit: int = 256

    @property
    def subject(self) -> Any:
        return SimpleNamespace(folder=self.folder)

    @property
    def runtime(self) -> Any:
        settings = SimpleNamespace(template_date=None, chat_template_kwargs={})
        return SimpleNamespace(tokenizer=self.tokenizer, settings=settings)

    def load(self, form: str) -> Any:
        return self.model

    def batches(self) -> list[dict[str, torch.Tensor]]:
        texts = [" ".join(WORDS[:20]), "Tom's 12 birds\n\n  ate   345 apples, naïve ☃!"]
        return [dict(self.tokenizer(text, return_tensors="pt")) for text in texts]


def spm_tokenizer() -> Any:
    """SentencePiece's BPE as a tokenizer.json has it: a space in front, bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def written(folder: Path, name: str, tokenizer: Any, kind: str) -> tuple[StandIn, Path]:
    """A random model of a kind, its tokenizer, and its GGUF."""
    family, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | {"vocab_size": len(tokenizer)} | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_model(folder, folder / "model.gguf", kind)
    return StandIn(folder, model, tokenizer, folder), folder / "model.gguf"


@asks_llama_cpp
@pytest.mark.parametrize("name", ["llama 3", "qwen2", "qwen3"])
def test_llama_cpp_answers_as_transformers_does(name: str, tmp_path: Path) -> None:
    material, path = written(tmp_path, name, tiny_tokenizer(), "f32")
    check = check_with_llama_cpp(material, None, "f32", path)
    assert check.passed, check.detail
    assert check.numbers["same_tokens"] == check.numbers["tokens"] == 32


@asks_llama_cpp
def test_a_sentencepiece_vocabulary_makes_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = spm_tokenizer()
    material, path = written(tmp_path, "mistral", tokenizer, "f32")
    texts = ["the cat sat", " two  spaces", "Tom's naïve ☃\n\tend", "a<s>b"]
    rows = [{"row": {}, "text": text, "input_ids": [tokenizer(text, add_special_tokens=False)["input_ids"]]} for text in texts]
    write_json(tmp_path / "renderings.json", {"renderings": rows})
    check = check_with_llama_cpp(material, None, "f32", path)
    assert check.passed, check.detail


def jinja(template: str) -> Any:
    """What renders a template of Hugging Face's."""
    tokenizer = template_tokenizer(template)
    return lambda messages, generation: tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=generation
    )


@pytest.mark.skipif(GO is None, reason="there is no `go` on the path")
@pytest.mark.parametrize("name", [*TEMPLATES, "llama2"])
def test_go_renders_chat_templates_as_jinja_does(name: str, tmp_path: Path) -> None:
    render = llama2 if name == "llama2" else jinja(TEMPLATES[name])
    turns = [{"role": role, "content": text} for role, text in [("user", "{{ hi }}"), ("assistant", "a"), ("user", "why?")]]
    conversations = [turns[:1], turns, [{"role": "system", "content": "be short"}, *turns]]
    _, texts = run_go(str(GO), find_pieces(render).go(), conversations, tmp_path / "job.json")
    assert texts == [render(messages, True) for messages in conversations]
