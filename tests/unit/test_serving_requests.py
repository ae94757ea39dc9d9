"""What the server takes, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RecipeError
from peftkit.exports.subject import Subject, read_subject
from peftkit.serving.jobs import Limits, Refusal
from peftkit.serving.requests import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest, parse, require_within
from peftkit.serving.server import listen, read_key, require_key
from peftkit.serving.vllm import vllm_command

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(CHAT | fields).encode())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "function"}]}, "`tools` is not supported here"),
        ({"logit_bias": {"5": 1}}, "`logit_bias` is not supported here"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported here"),
        ({"temperature": 2.5}, "`temperature`: .*less than or equal to 2"),
        ({"temperature": "1"}, "`temperature`: .*valid number"),
        ({"top_p": 0}, "`top_p`"),
        ({"n": 0}, "`n`"),
        ({"max_tokens": 0}, "`max_tokens`"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "say the same"),
        ({"top_logprobs": 3}, "has no effect without `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "`top_logprobs`"),
        ({"stream_options": {"include_usage": True}}, "has no effect without `stream`"),
        ({"stop": ["a"] * 5}, "`stop`"),
        ({"stop": ""}, "`stop`"),
        ({"seed": 2**70}, "`seed`"),
        ({"messages": []}, "`messages`"),
        ({"messages": "hi"}, "`messages`"),
        ({"presence_penalty": -3}, "`presence_penalty`"),
    ],
)
def test_what_a_chat_cannot_have_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words) as refusal:
        chat(**fields)
    assert refusal.value.status == 400


def test_fields_that_ask_for_nothing_are_taken() -> None:
    neutral = {"logit_bias": {}, "tools": None, "store": False, "response_format": {"type": "text"}, "stop": None, "user": "me"}
    assert chat(**neutral, n=1).job() == chat().job()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 10000, b'{"model": "\\ud800"}', b'{"model": NaN}']
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refusal):
        parse(ChatRequest, body)


def test_sampling_is_what_was_asked_for() -> None:
    sampling = chat(max_completion_tokens=5, temperature=0.5, stop="a", seed=-1, logprobs=True, top_logprobs=2).job().sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.stop, sampling.num_logprobs) == (5, 0.5, ("a",), 2)
    assert sampling.seed == 2**63 - 1


def test_several_inputs_are_several_rows() -> None:
    body = {"model": "m", "prompt": ["a", "b"], "n": 3}
    job = parse(CompletionRequest, json.dumps(body).encode()).job()
    assert (len(job.rows), job.copies) == (2, 3)
    require_within(job, Limits(max_rows=6))
    with pytest.raises(Refusal, match="2 inputs with 3 answers each: this server takes 5"):
        require_within(job, Limits(max_rows=5))


@pytest.mark.parametrize("value", [[1, 2, 3], [[1]], "", [], [""]])
def test_embeddings_are_of_texts(value: Any) -> None:
    with pytest.raises(Refusal, match="`input"):
        parse(EmbeddingRequest, json.dumps({"model": "m", "input": value}).encode())


def test_rows_to_classify_are_texts_or_columns() -> None:
    body = {"model": "m", "input": ["a", {"question": "q", "context": "c"}]}
    assert parse(ClassifyRequest, json.dumps(body).encode()).job().rows == [{"text": "a"}, {"question": "q", "context": "c"}]


def test_a_key_is_needed_where_others_can_ask() -> None:
    require_key("127.0.0.1", None)
    require_key("0.0.0.0", "key")
    with pytest.raises(RecipeError, match="needs an API key"):
        require_key("0.0.0.0", None)


@pytest.mark.parametrize(("text", "wanted"), [("secret\n", "secret"), ("", None), ("two words", None), ("schlüssel", None)])
def test_a_key_is_read_from_a_file(tmp_path: Path, text: str, wanted: str | None) -> None:
    (tmp_path / "key").write_text(text, encoding="utf-8")
    if wanted is not None:
        assert read_key(tmp_path / "key", "other") == wanted
        return
    with pytest.raises(RecipeError, match="a key has one or more printable"):
        read_key(tmp_path / "key", None)


def test_a_port_that_is_taken_is_named() -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(RecipeError, match="cannot listen there"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()


def adapter(folder: Path, **fields: Any) -> Subject:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 12, "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/name", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_subject(folder, None)


def test_the_command_of_vllm_names_every_adapter(tmp_path: Path) -> None:
    adapters = {"a": adapter(tmp_path / "a"), "b": adapter(tmp_path / "b", r=4, rank_pattern={"q_proj": 40})}
    assert vllm_command(adapters, "127.0.0.1", 8000) == [
        *("vllm", "serve", "owner/name", "--enable-lora", "--max-lora-rank", "64", "--max-loras", "2", "--lora-modules"),
        *(f"a={tmp_path}/a", f"b={tmp_path}/b", "--host", "127.0.0.1", "--port", "8000"),
    ]


def test_vllm_classifies_with_a_trained_head_of_its_own_kind(tmp_path: Path) -> None:
    command = vllm_command({"a": adapter(tmp_path / "a", task_type="SEQ_CLS", modules_to_save=["score"])}, "127.0.0.1", 80)
    assert command[-8:-4] == ["--runner", "pooling", "--convert", "classify"]


def test_vllm_is_told_the_chat_template_of_training(tmp_path: Path) -> None:
    adapters = {name: adapter(tmp_path / name) for name in "ab"}
    for name, template in (("a", "one"), ("b", "one")):
        (tmp_path / name / "chat_template.jinja").write_text(template)
    assert f"--chat-template {tmp_path}/a/chat_template.jinja" in " ".join(vllm_command(adapters, "127.0.0.1", 80))
    (tmp_path / "b/chat_template.jinja").write_text("other")
    with pytest.raises(RecipeError, match="different chat templates"):
        vllm_command(adapters, "127.0.0.1", 80)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"peft_type": "IA3"}, "takes LoRA adapters; this one is of the method ia3"),
        ({"use_dora": True}, "is a DoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "trained whole"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "this adapter is for SEQ_2_SEQ_LM"),
        ({"r": 1024}, "up to 512"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"a: .*{reason}"):
        vllm_command({"a": adapter(tmp_path / "a", **fields)}, "127.0.0.1", 8000)
