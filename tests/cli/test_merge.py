"""`peftkit merge`: one stand-alone model, or nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peftkit.engine import fold
from peftkit.engine.certify import TOLERANCE
from peftkit.recipe.quantization import Quantization
from tests.conftest import instruction_rows, label_rows, tiny_tokenizer
from tests.runs import peftkit_process, tiny_recipe, train

GPTQ = dataclasses.asdict(Quantization("gptq", 4, is_stored=True))
PROMPTS = [row["instruction"] for row in instruction_rows(4)]


def alone(folder: Path, prompt: str) -> str:
    """The greedy answer of a model folder by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def merge(cli: Any, adapter: Path, output: Path, *arguments: str) -> Any:
    result = cli("merge", "--adapter", adapter, "--output", output, "--json", *arguments)
    assert result.code == 0, result.err
    assert result.json["max_abs_diff"] <= 1e-4
    assert result.json["max_abs_diff_saved"] <= result.json["tolerance"]
    return result.json


def test_a_merged_language_model_answers_alone_like_its_adapter(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    merge(cli, lm_run, tmp_path / "merged")
    for prompt in PROMPTS:
        answer = cli("infer", "--adapter", lm_run, "--prompt", prompt, "--json").json["prediction"]
        assert alone(tmp_path / "merged", prompt) == answer


def test_a_merged_classifier_gives_the_adapters_probabilities_and_names(cli: Any, cls_run: Path, tmp_path: Path) -> None:
    merge(cli, cls_run, tmp_path / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "neg", 1: "pos"}
    for row in label_rows(3):
        found = cli("infer", "--adapter", cls_run, "--prompt", row["text"], "--json").json["probabilities"]
        probabilities = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1)
        assert [found["neg"], found["pos"]] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_a_merged_encoder_decoder_answers_alone_like_its_adapter(cli: Any, s2s_run: Path, tmp_path: Path) -> None:
    merge(cli, s2s_run, tmp_path / "merged")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for prompt in PROMPTS:
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        answer = cli("infer", "--adapter", s2s_run, "--prompt", prompt, "--json").json["prediction"]
        assert tokenizer.decode(output[0], skip_special_tokens=True) == answer


def test_a_sentencepiece_model_goes_along_with_the_same_vocabulary(
    cli: Any, lm_run: Path, models_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(models_dir / "llama", tmp_path / "base")
    (tmp_path / "base/tokenizer.model").write_bytes(b"pieces")
    merge(cli, lm_run, tmp_path / "merged", "--base", str(tmp_path / "base"))
    assert (tmp_path / "merged/tokenizer.model").read_bytes() == b"pieces"
    named = json.loads((tmp_path / "merged/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert named["1"]["special"]  # to a converter that reads no tokenizer.json
    tokenizer = json.loads((tmp_path / "base/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(tokenizer))
    merge(cli, lm_run, tmp_path / "other", "--base", str(tmp_path / "base"))
    assert not (tmp_path / "other/tokenizer.model").exists()


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_the_merged_model_is_written_in_the_dtype_that_is_asked_for(
    cli: Any, lm_run: Path, tmp_path: Path, dtype: str, expected: torch.dtype
) -> None:
    found = merge(cli, lm_run, tmp_path / "merged", "--dtype", dtype)
    assert found["dtype"] == str(expected).removeprefix("torch.")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged/model.safetensors").values()} == {expected}


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "lora", "use_dora": True},
        {"method": "lora", "init_lora_weights": "pissa", "use_rslora": True},
        {"method": "lora", "init_lora_weights": "olora", "target_modules": "all-linear"},
        {"method": "lora", "modules_to_save": ["embed_tokens", "lm_head"]},
        {"method": "lora", "trainable_token_indices": [5, 6]},
        {"method": "lora", "target_modules": ["embed_tokens", "q_proj"]},
        {"method": "head"},
        {"method": "full"},
    ],
    ids=["dora", "pissa", "olora", "saved whole", "tokens", "embedding", "head", "full"],
)
def test_every_mergeable_adapter_is_merged(cli: Any, models_dir: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    train(tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter), tmp_path / "run")
    merge(cli, tmp_path / "run", tmp_path / "merged")
    answer = cli("infer", "--adapter", tmp_path / "run", "--prompt", PROMPTS[0], "--json", "--max-new-tokens", 8)
    assert alone(tmp_path / "merged", PROMPTS[0]) == answer.json["prediction"]
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_a_bfloat16_adapter_is_merged_within_its_rounding(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, model={"dtype": "bfloat16"})
    train(recipe, tmp_path / "run")
    assert merge(cli, tmp_path / "run", tmp_path / "merged")["dtype"] == "bfloat16"


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no base can be loaded."""

    def load(*arguments: Any) -> None:
        raise AssertionError("a base is loaded")

    monkeypatch.setattr("peftkit.engine.loaded.load_base_model", load)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_folder_that_is_not_empty_is_refused(cli: Any, lm_run: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = cli(command, "--adapter", lm_run, "--output", tmp_path)
    assert result.code == 2
    assert f"--output {tmp_path}: is not empty" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dtype_that_does_not_exist_is_refused(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    result = cli("merge", "--adapter", lm_run, "--output", tmp_path / "merged", "--dtype", "int8")
    assert result.code == 2
    assert "--dtype: `int8` is not allowed; it takes auto | float32 | bfloat16 | float16" in result.err


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("merge", {"method": "shadow"}, "a shadow adapter cannot be merged: "),
        ("convert", {"method": "ia3"}, "a ia3 adapter cannot be turned into a LoRA; these can: "),
        ("merge", {"quantization": GPTQ}, "this adapter cannot be merged: gptq layers cannot be turned into plain ones"),
        ("convert", {"method": "vera", "quantization": GPTQ}, "into a LoRA: gptq layers cannot be turned into plain ones"),
    ],
)
def test_what_is_known_of_an_adapter_is_refused_before_its_base_is_loaded(
    cli: Any, lm_run: Path, tmp_path: Path, command: str, changes: dict[str, Any], words: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(lm_run / "adapter", adapter)
    facts = json.loads((adapter / "peftkit.json").read_text()) | changes
    (adapter / "peftkit.json").write_text(json.dumps(facts))
    result = cli(command, "--adapter", adapter, "--output", tmp_path / "out")
    assert (result.code, words in result.err) == (2, True)


def test_replicated_layers_cannot_be_merged(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    adapter = {"method": "lora", "layer_replication": [[0, 2], [0, 2]]}
    train(tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=adapter), tmp_path / "run")
    result = cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")
    assert result.code == 2
    assert "`layer_replication` shares base layers" in result.err
    assert not (tmp_path / "merged").exists()


def test_lora_biases_without_a_bias_to_merge_into_are_refused(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    train(tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter={"method": "lora", "lora_bias": True}), tmp_path / "run")
    result = cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")
    assert result.code == 2
    assert "--adapter: this adapter cannot be merged" in result.err
    assert not (tmp_path / "merged").exists()


def test_an_adapted_embedding_that_is_tied_to_the_output_is_merged_into_an_untied_model(
    cli: Any, models_dir: Path, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.from_pretrained(models_dir / "llama", tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tiny_tokenizer().save_pretrained(tmp_path / "tied")
    adapter = {"method": "lora", "target_modules": ["embed_tokens", "q_proj"]}
    source = {"name_or_path": str(tmp_path / "tied")}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model=source, adapter=adapter)
    notes = cli("plan", recipe, "--json").json["notes"]
    assert any("embed_tokens is tied to another embedding" in note for note in notes)
    train(recipe, tmp_path / "run")
    merge(cli, tmp_path / "run", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_a_merge_that_is_wrong_is_refused_and_leaves_nothing(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fold._plain

    def wrong(*arguments: Any) -> Any:
        layer = right(*arguments)
        layer.weight.data = layer.weight.data * 1.001
        return layer

    monkeypatch.setattr(fold, "_plain", wrong)
    result = cli("merge", "--adapter", lm_run, "--output", tmp_path / "out" / "merged")
    assert (result.code, "merged model's logits differ from the adapter's by up to" in result.err) == (6, True)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("rounding", "code"), [(0.0, 6), (1.0, 0)])
def test_16_bits_may_move_logits_as_much_as_they_move_the_adapters_own(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: float, code: int
) -> None:
    monkeypatch.setitem(TOLERANCE, "bfloat16", 1e-6)
    monkeypatch.setattr("peftkit.engine.merge._rounding", lambda *arguments: rounding)
    result = cli("merge", "--adapter", lm_run, "--output", tmp_path / "merged", "--dtype", "bfloat16")
    assert (result.code, (tmp_path / "merged").exists()) == (code, not code), result.err
    assert ("the saved (bfloat16; float32 rounds least) model's logits differ" in result.err) == bool(code)


def test_a_model_that_float32_is_too_coarse_for_is_compared_in_float64(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = merge(cli, lm_run, tmp_path / "first")
    assert found["compared_in"] == "float32"
    monkeypatch.setitem(TOLERANCE, "float32", found["max_abs_diff"] / 10 / max(1.0, found["tolerance"] / 1e-4))
    result = cli("merge", "--adapter", lm_run, "--output", tmp_path / "second", "--json")
    assert (result.code, result.json["compared_in"]) == (0, "float64"), result.err
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert all(torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-6) for name in weights[0])


def test_the_merged_folder_has_tokenizer_template_and_generation_settings(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    merge(cli, lm_run, tmp_path / "merged")
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "merged", lm_run / "adapter")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    ends = json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {tokenizers[0].eos_token_id, tokenizers[0].convert_tokens_to_ids("<|im_end|>")}


def test_a_merge_that_is_told_to_end_leaves_nothing(lm_run: Path, tmp_path: Path) -> None:
    process = peftkit_process("merge", "--adapter", lm_run, "--output", tmp_path / "merged")
    while not list(tmp_path.glob(".merged.*")):  # it is being written
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert (process.returncode, list(tmp_path.iterdir())) == (75, [])
    assert "stopped by SIGTERM before it was done" in message
