"""What export targets say before anything is loaded: rules, options, names of tokenizers, templates in pieces."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import LoadError, RecipeError
from peftkit.exports import EXPORTS
from peftkit.exports.gguf_vocab import UnknownTokenizerError, pre_tokenizer_name, read_vocabulary
from peftkit.exports.go_template import UnlikePiecesError, find_pieces
from peftkit.exports.jobs import make_jobs, read_options, refuse
from peftkit.exports.subject import Subject, tensor_shapes

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": True}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "rms_norm_eps": 1e-6}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "added_tokens": [{"id": 3, "content": "</s>", "special": True}],
}
SPM = {
    "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": ["▁ a", "▁a b"],
              "vocab": {"<unk>": 0, "<0x41>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁ab": 6}},
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace"}]},
}  # fmt: skip


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A plain LoRA of a Llama, as its files say."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    shapes = {f"{LAYER}.lora_A.weight": (8, 32), f"{LAYER}.lora_B.weight": (32, 8)}
    return Subject(tmp_path, None, "CAUSAL_LM", "lora", "owner/name", adapter=LORA, model=LLAMA, shapes=shapes)


def refusals(subject: Subject, target: str, *settings: str) -> str:
    """What a target's lint refuses, in one text."""
    (job,) = make_jobs(subject, [target], settings, Path("out"))
    return "\n".join(str(finding) for finding in job.findings if finding.refuses)


@pytest.mark.parametrize(
    "settings", [(target, form) for target in ("vllm", "sglang", "gguf") for form in ("adapter", "merged")]
)
def test_a_plain_lora_is_taken(settings: tuple[str, str], subject: Subject) -> None:
    target, form = settings
    assert refusals(subject, target, f"form={form}") == ""


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "is a DoRA.*--merged"),
    "biases": ({"bias": "all"}, "trained biases"),
    "a changed base": ({"init_lora_weights": "pissa"}, "changes the base"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "trained whole"),
    "single tokens": ({"trainable_token_indices": [1]}, "trains single tokens"),
}


@pytest.mark.parametrize("target", ["vllm", "sglang", "gguf"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_lora_is_refused_as_an_adapter_and_taken_merged(what: str, target: str, subject: Subject) -> None:
    changes, message = REFUSED[what]
    changed = replace(subject, adapter=LORA | changes)
    with pytest.raises(RecipeError, match=message):
        refuse(make_jobs(changed, [target], ["form=adapter"], Path("out")))
    assert refusals(changed, target, "form=merged") == ""


def test_another_method_is_told_to_convert_or_to_merge(subject: Subject) -> None:
    found = refusals(replace(subject, method="lokr"), "vllm")
    assert "peftkit convert" in found
    assert "--merged" in found
    assert "cannot be merged" in refusals(replace(subject, method="prompt_tuning"), "vllm", "form=merged")


def test_a_rank_beyond_vllms_is_refused_and_patterns_count(subject: Subject) -> None:
    assert "ranks up to 512" in refusals(replace(subject, adapter=LORA | {"rank_pattern": {"q_proj": 1024}}), "vllm")


def test_sglang_names_the_layers_that_it_does_not_know(subject: Subject) -> None:
    shapes = {name.replace("q_proj", "c_attn"): shape for name, shape in subject.shapes.items()}
    assert "no LoRA onto c_attn" in refusals(replace(subject, shapes=shapes), "sglang")


def test_vllm_takes_a_linear_head_where_the_base_has_one(subject: Subject) -> None:
    adapter = LORA | {"modules_to_save": ["score"]}
    shapes = {**subject.shapes, "base_model.model.score.weight": (2, 32)}
    head = replace(subject, task="SEQ_CLS", adapter=adapter, shapes=shapes)
    assert "has no head" in refusals(head, "vllm")
    assert refusals(replace(head, model=LLAMA | {"architectures": ["LlamaForSequenceClassification"]}), "vllm") == ""


def test_a_lora_on_tied_embeddings_is_refused(subject: Subject) -> None:
    shapes = {**subject.shapes, "base_model.model.lm_head.lora_A.weight": (8, 32)}
    tied = replace(subject, shapes=shapes, model=LLAMA | {"tie_word_embeddings": True})
    assert "share one matrix" in refusals(tied, "vllm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is none of.*llama_cpp=FOLDER"),
        ({"rope_scaling": {"type": "longrope"}}, "of the type longrope"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    ],
)
def test_gguf_says_what_it_cannot_write(changes: dict[str, Any], message: str, subject: Subject) -> None:
    with pytest.raises(RecipeError, match=message):
        refuse(make_jobs(replace(subject, model=LLAMA | changes), ["gguf"], [], Path("out")))


def test_options_are_checked_by_the_targets_that_know_them() -> None:
    exporters = [EXPORTS["gguf"], EXPORTS["safetensors"]]
    gguf, plain = read_options(exporters, ["gguf.dtype=q8_0", "safetensors.dtype=float16"])
    assert (gguf.model_dump()["dtype"], plain.model_dump()["dtype"]) == ("q8_0", "float16")
    for text, message in {
        "dtyp=f16": "did you mean `dtype`",
        "onnx.dtype=f16": "none of the targets of this command",
        "dtype": "OPTION=VALUE",
        "gguf.dtype=q9": "`q9` is not allowed",
    }.items():
        with pytest.raises(RecipeError, match=message):
            read_options(exporters, [text])


def test_targets_that_always_merge_say_so_to_merged(subject: Subject) -> None:
    with pytest.raises(RecipeError, match="always get a merged model"):
        make_jobs(subject, ["safetensors"], ["form=merged"], Path("out"))
    with pytest.raises(RecipeError, match=r"no such target.*did you mean `vllm`"):
        make_jobs(subject, ["vlm"], [], Path("out"))
    with pytest.raises(RecipeError, match="belongs to no run directory"):
        make_jobs(subject, ["vllm"], [], None)


def test_a_command_for_a_shell_quotes_what_it_must(subject: Subject) -> None:
    (job,) = make_jobs(replace(subject, base="a b"), ["vllm"], ["name=mine"], Path("out"))
    command = job.exporter.command(subject=replace(subject, base="a b"), options=job.options)
    assert command == "vllm serve 'a b' --enable-lora --lora-modules \"mine=$here\" --max-lora-rank 8"


def test_byte_level_tokens_and_merges_become_a_vocabulary() -> None:
    found = read_vocabulary(TOKENIZER, 5)
    assert (found.model, found.pre, found.merges) == ("gpt2", "gpt-2", ["a b"])
    assert (found.tokens, found.types) == (["a", "b", "ab", "</s>", "[PAD4]"], [1, 1, 1, 3, 5])
    with pytest.raises(UnknownTokenizerError, match="the token 3, for which the model of 3 tokens"):
        read_vocabulary(TOKENIZER, 3)


def test_sentencepiece_scores_follow_the_order_of_merges() -> None:
    found = read_vocabulary(SPM, 7)
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
    assert found.types[:2] == [2, 6]
    assert found.scores[5] > found.scores[6] > found.scores[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram"}}, "of the kind Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "changes texts first"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name for"),
    ],
)
def test_tokenizers_without_a_name_in_llama_cpp_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownTokenizerError, match=message):
        pre_tokenizer_name(TOKENIZER | changes)


def chatml(messages: Any, generation: bool) -> str:
    """A template of pieces, with a system message of its own."""
    default = "" if messages[0]["role"] == "system" else "<sys>be kind</sys>"
    turns = "".join(f"<{message['role']}>{message['content']}</>" for message in messages)
    return f"<s>{default}{turns}" + "<assistant>" * generation


def llama2(messages: Any, generation: bool) -> str:
    """A template that puts the system message into the first user's turn."""
    text, system = "", ""
    for message in messages:
        if message["role"] == "system":
            system = f"<<{message['content']}>>"
        elif message["role"] == "user":
            text, system = f"{text}<s>[INST] {system}{message['content']} [/INST]", ""
        else:
            text += f" {message['content']}</s>"
    return text


CONVERSATION = [{"role": role, "content": text} for role, text in [("user", "hi"), ("assistant", "yes"), ("user", "why?")]]


@pytest.mark.parametrize("render", [chatml, llama2])
def test_the_pieces_of_a_template_put_its_text_together(render: Any) -> None:
    pieces = find_pieces(render)
    for messages in (CONVERSATION, [{"role": "system", "content": "be short"}, *CONVERSATION], CONVERSATION[:1]):
        assert pieces.render(messages) == render(messages, True)
        assert pieces.without("<s>").render(messages) == render(messages, True).removeprefix("<s>")


def test_a_template_that_counts_its_turns_is_no_template_of_pieces() -> None:
    def counting(messages: Any, generation: bool) -> str:
        return "".join(f"{number}{message['content']};" for number, message in enumerate(messages))

    with pytest.raises(UnlikePiecesError):
        find_pieces(counting)


def test_shapes_are_read_from_the_header_alone(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    assert tensor_shapes(tmp_path / "x") == {"a": (2, 3)}
    (tmp_path / "x").write_bytes(b"short")
    with pytest.raises(LoadError, match="is damaged"):
        tensor_shapes(tmp_path / "x")
