"""`peftkit infer`: one prompt, a file of rows, a chat."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.conftest import instruction_rows, label_rows, tiny_tokenizer, write_jsonl

PROMPTS = [row["instruction"] for row in instruction_rows(7)]


@pytest.fixture
def answer(cli: Any) -> Callable[..., str]:
    """The answer to one prompt by `infer --prompt`."""

    def ask(run: Path, prompt: str, *arguments: Any) -> str:
        result = cli("infer", "--adapter", run, "--prompt", prompt, "--json", *arguments)
        assert result.code == 0, result.err
        assert set(result.json) >= {"prompt", "prediction"}
        return str(result.json["prediction"])

    return ask


def predictions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("run", ["lm_run", "s2s_run"])
def test_a_prompt_is_answered_with_text(cli: Any, answer: Any, request: pytest.FixtureRequest, run: str) -> None:
    folder = request.getfixturevalue(run)
    answers = [answer(folder, prompt) for prompt in PROMPTS]
    assert len(set(answers)) > 1  # it has learned something
    assert all(answers)
    assert cli("infer", "--adapter", folder, "--prompt", PROMPTS[0]).out == f"{answers[0]}\n"


def test_the_answer_is_what_transformers_generates_for_the_chat_template(lm_run: Path, answer: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_run / "adapter")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(lm_run / "adapter").eval()
    text = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    settings = transformers.GenerationConfig.from_pretrained(lm_run / "adapter")
    output = model.generate(input_ids=inputs["input_ids"], generation_config=settings, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == answer(lm_run, PROMPTS[0])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("run", ["lm_run", "s2s_run"])
def test_a_file_is_answered_as_row_by_row_for_every_batch_size(
    cli: Any, answer: Any, request: pytest.FixtureRequest, tmp_path: Path, run: str, batch_size: int
) -> None:
    folder = request.getfixturevalue(run)
    column = "instruction" if run == "lm_run" else "source"
    source = write_jsonl(tmp_path / "in.jsonl", [{column: prompt, "number": n} for n, prompt in enumerate(PROMPTS)])
    arguments = ("--input", source, "--output", tmp_path / "out.jsonl", "--batch-size", batch_size, "--json")
    result = cli("infer", "--adapter", folder, *arguments)
    assert result.json == {"num_rows": 7, "output": str(tmp_path / "out.jsonl")}
    rows = predictions(tmp_path / "out.jsonl")
    assert [(row[column], row["number"]) for row in rows] == [(prompt, n) for n, prompt in enumerate(PROMPTS)]
    assert [row["prediction"] for row in rows] == [answer(folder, prompt) for prompt in PROMPTS]


def test_a_csv_file_is_answered(cli: Any, answer: Any, lm_run: Path, tmp_path: Path) -> None:
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([["id", "instruction"], *([n, prompt] for n, prompt in enumerate(PROMPTS))])
    result = cli("infer", "--adapter", lm_run, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.jsonl")
    assert result.code == 0, result.err
    rows = predictions(tmp_path / "out.jsonl")
    assert [row["prediction"] for row in rows] == [answer(lm_run, prompt) for prompt in PROMPTS]
    assert set(rows[0]) == {"id", "instruction", "prediction"}


@pytest.mark.parametrize("column", ["prompt", "text"])
def test_rows_with_a_prompt_or_a_text_need_not_be_in_the_training_format(
    cli: Any, answer: Any, lm_run: Path, tmp_path: Path, column: str
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{column: PROMPTS[0]}])
    assert cli("infer", "--adapter", lm_run, "--input", source, "--output", tmp_path / "out.jsonl").code == 0
    assert predictions(tmp_path / "out.jsonl")[0]["prediction"] == answer(lm_run, PROMPTS[0])


def test_a_text_is_classified_with_probabilities(cli: Any, cls_run: Path) -> None:
    for row in label_rows(4):
        result = cli("infer", "--adapter", cls_run, "--prompt", row["text"], "--json").json
        assert set(result["probabilities"]) == {"neg", "pos"}
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert result["prediction"] == max(result["probabilities"], key=result["probabilities"].get) == row["label"]


def test_a_classification_for_people_is_a_table(cli: Any, cls_run: Path) -> None:
    result = cli("infer", "--adapter", cls_run, "--prompt", label_rows(1)[0]["text"])
    assert result.out.startswith("pos\n")
    assert result.out.index("│ pos") < result.out.index("│ neg")  # the likeliest first


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_file_of_texts_is_classified(cli: Any, cls_run: Path, tmp_path: Path, batch_size: int) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": row["text"]} for row in label_rows(9)])
    arguments = ("--input", source, "--output", tmp_path / "out.jsonl", "--batch-size", batch_size)
    assert cli("infer", "--adapter", cls_run, *arguments).code == 0
    assert [row["prediction"] for row in predictions(tmp_path / "out.jsonl")] == [row["label"] for row in label_rows(9)]


def test_a_chat_remembers_what_was_said_until_it_is_told_to_start_over(
    cli: Any, answer: Any, lm_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n{PROMPTS[1]}\n/new\n{PROMPTS[1]}\n\nnever read\n"))
    result = cli("infer", "--adapter", lm_run)
    assert result.code == 0, result.err
    first, with_history, anew = result.out.splitlines()
    assert (first, anew) == (answer(lm_run, PROMPTS[0]), answer(lm_run, PROMPTS[1]))
    assert with_history != anew


def test_a_classifier_can_be_talked_to(cli: Any, cls_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{label_rows(1)[0]['text']}\n"))
    result = cli("infer", "--adapter", cls_run)
    assert result.code == 0, result.err
    assert result.out.startswith("pos (")


def test_max_new_tokens_ends_an_answer(lm_run: Path, answer: Any) -> None:
    tokenizer = tiny_tokenizer()
    long, short = (answer(lm_run, PROMPTS[0], "--max-new-tokens", number) for number in (8, 2))
    assert tokenizer(short)["input_ids"] == tokenizer(long)["input_ids"][:2]


def test_temperature_0_is_the_likeliest_answer_and_a_high_one_is_not(lm_run: Path, answer: Any) -> None:
    assert answer(lm_run, PROMPTS[0], "--temperature", 0) == answer(lm_run, PROMPTS[0])
    assert answer(lm_run, PROMPTS[0], "--temperature", 50) != answer(lm_run, PROMPTS[0])


def plain_adapter(folder: Path, base: str, task: str) -> Path:
    """An adapter made by peft alone, with random weights in lora_B."""
    torch.manual_seed(0)
    is_classifier = task == "SEQ_CLS"
    auto = transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(base, **({"num_labels": 3} if is_classifier else {}))
    targets = ["query"] if is_classifier else ["q_proj", "v_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(folder)
    return folder


def test_an_adapter_of_peft_alone_answers(answer: Any, models_dir: Path, tmp_path: Path) -> None:
    folder = plain_adapter(tmp_path / "plain", str(models_dir / "llama"), "CAUSAL_LM")
    assert not (folder / "peftkit.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "llama")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    text = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[0]}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer(folder, PROMPTS[0], "--max-new-tokens", 6) == expected


def test_a_classifier_of_peft_alone_answers_with_numbered_labels(cli: Any, models_dir: Path, tmp_path: Path) -> None:
    folder = plain_adapter(tmp_path / "plain", str(models_dir / "bert"), "SEQ_CLS")
    found = cli("infer", "--adapter", folder, "--prompt", "the cat", "--json").json["probabilities"]
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(models_dir / "bert")("the cat", return_tensors="pt")
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]
    assert found == {
        f"LABEL_{number}": pytest.approx(float(p), abs=1e-5) for number, p in enumerate(logits.softmax(-1).detach())
    }


def test_base_names_the_base_of_an_adapter_that_cannot_find_it(cli: Any, answer: Any, models_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(models_dir / "llama", tmp_path / "llama")
    folder = plain_adapter(tmp_path / "plain", str(tmp_path / "llama"), "CAUSAL_LM")
    expected = answer(folder, PROMPTS[0], "--max-new-tokens", 6)
    shutil.rmtree(tmp_path / "llama")
    lost = cli("infer", "--adapter", folder, "--prompt", "the cat")
    assert lost.code == 7
    assert str(tmp_path / "llama") in lost.err
    assert "--base" in lost.err
    assert answer(folder, PROMPTS[0], "--max-new-tokens", 6, "--base", models_dir / "llama") == expected


def test_a_base_of_another_shape_is_refused(cli: Any, lm_run: Path, models_dir: Path) -> None:
    result = cli("infer", "--adapter", lm_run, "--prompt", "the cat", "--base", models_dir / "gpt2")
    assert result.code == 7
    assert f"the adapter {lm_run / 'adapter'}" in result.err


def nothing(folder: Path, lm_run: Path) -> None:
    """Nothing is there."""


def empty(folder: Path, lm_run: Path) -> None:
    folder.mkdir()


def unfinished(folder: Path, lm_run: Path) -> None:
    folder.mkdir()
    shutil.copy(lm_run / "resolved.yaml", folder)


def without_tensors(folder: Path, lm_run: Path) -> None:
    shutil.copytree(lm_run / "adapter", folder)
    (folder / "adapter_model.safetensors").unlink()


def cut_tensors(folder: Path, lm_run: Path) -> None:
    shutil.copytree(lm_run / "adapter", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 40)


def broken_facts(folder: Path, lm_run: Path) -> None:
    shutil.copytree(lm_run / "adapter", folder)
    (folder / "peftkit.json").write_text("{")


def broken_config(folder: Path, lm_run: Path) -> None:
    shutil.copytree(lm_run / "adapter", folder)
    (folder / "peftkit.json").unlink()
    (folder / "adapter_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, "there is no run directory or adapter folder"),
        (empty, "is no adapter: it has neither peftkit.json nor adapter_config.json"),
        (unfinished, "has no adapter yet: its training did not end; `peftkit train --resume --output"),
        (without_tensors, "adapter_model.safetensors"),
        (cut_tensors, "adapter_model.safetensors cannot be read"),
        (broken_facts, "peftkit.json"),
        (broken_config, "adapter_config.json"),
    ],
)
def test_what_is_no_adapter_is_refused(cli: Any, lm_run: Path, tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "adapter_of_mine", lm_run)
    result = cli("infer", "--adapter", tmp_path / "adapter_of_mine", "--prompt", "the cat")
    assert result.code == 7, result.err
    assert words in result.err


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question_text": "why"}, "no column `instruction` or `question`; the row has `question_text`"),
        ({"instruction": "  "}, "column `instruction` is blank"),
        ({"instruction": 3}, "column `instruction` holds a number, not text"),
        ({"prompt": ""}, "no text in `prompt` or `text`"),
    ],
)
def test_a_row_that_cannot_be_answered_is_named(cli: Any, lm_run: Path, tmp_path: Path, row: Any, words: str) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"instruction": "the cat"}, row])
    result = cli("infer", "--adapter", lm_run, "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.code == 3
    assert f"{source}:2: " in result.err
    assert words in result.err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("text", "words"), [("{oops\n", ":1: not valid JSON"), ("", "has no rows")])
def test_a_file_that_cannot_be_read_is_refused(cli: Any, lm_run: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    result = cli("infer", "--adapter", lm_run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert result.code == 3
    assert words in result.err


def test_a_row_longer_than_the_adapter_was_trained_for_is_refused(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"instruction": "the cat " * 60}])
    result = cli("infer", "--adapter", lm_run, "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.code == 3
    assert f"{source}:1: " in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a", "--input", "b", "--output", "c"], "--prompt and --input: give one of the two"),
        (["--input", "b"], "--input and --output go together"),
        (["--output", "c"], "--input and --output go together"),
        (["--json"], "--json needs --prompt or --input"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(cli: Any, lm_run: Path, arguments: list[str], words: str) -> None:
    result = cli("infer", "--adapter", lm_run, *arguments)
    assert result.code == 2
    assert words in result.err
