"""`peftkit infer`: what does not fit, what cannot be written, and what has no effect."""

from __future__ import annotations

import datetime
import decimal
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from peftkit.commands import infer as command
from tests.conftest import Result, tiny_tokenizer, write_jsonl
from tests.runs import tiny_recipe, train

Infer = Callable[..., Result]


@pytest.fixture(scope="module")
def gpt2_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAUSAL_LM run on the tiny GPT-2, which has 256 positions."""
    folder = tmp_path_factory.mktemp("gpt2")
    recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, model={"name_or_path": str(models_dir / "gpt2")})
    train(recipe, folder / "run")
    return folder / "run"


def prompt_of(num_tokens: int) -> str:
    """A text that the run's template makes so many tokens."""
    tokenizer = tiny_tokenizer()
    for length in range(num_tokens):
        text = "a" * length
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        if len(ids) == num_tokens:
            return text
    raise AssertionError(num_tokens)


@pytest.fixture
def infer(cli: Any, tmp_path: Path) -> Infer:
    """`infer --input` of prompts, three at a time."""

    def run(adapter: Path, prompts: list[str], *arguments: Any) -> Result:
        source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
        options = ("--input", source, "--output", tmp_path / "out.jsonl", "--batch-size", 3)
        result: Result = cli("infer", "--adapter", adapter, *options, *arguments)
        return result

    return run


def answers(path: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_answer_ends_where_the_model_has_no_more_positions(infer: Infer, cli: Any, gpt2_run: Path, tmp_path: Path) -> None:
    prompts = [prompt_of(20), prompt_of(251), prompt_of(30), prompt_of(251)]
    result = infer(gpt2_run, prompts, "--max-new-tokens", 32)
    assert result.code == 0, result.err
    assert "after 2 of 4 prompts" in result.err
    assert "in.jsonl:2: after 6 tokens" in result.err
    alone = [
        cli(
            "infer", "--adapter", gpt2_run, "--prompt", prompt, "--max-new-tokens", 6 if len(prompt) > 99 else 32, "--json"
        ).json
        for prompt in prompts
    ]
    assert answers(tmp_path / "out.jsonl") == [answer["prediction"] for answer in alone]


def test_a_prompt_without_room_for_one_token_is_named_before_any_answer(
    infer: Infer, gpt2_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "answer_batches", lambda *arguments, **options: pytest.fail("it has answered"))
    result = infer(gpt2_run, ["a", prompt_of(257)])
    assert result.code == 3
    assert "in.jsonl:2: 257 tokens" in result.err


def test_rows_of_a_parquet_file_keep_their_times_numbers_and_bytes(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    row = {
        "instruction": "a cat",
        "at": datetime.datetime(2025, 1, 2, 3, 4),
        "price": decimal.Decimal("1.50"),
        "raw": b"\xff\x00",
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    result = cli("infer", "--adapter", lm_run, "--input", tmp_path / "in.parquet", "--output", tmp_path / "out.jsonl")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert {name: found[name] for name in ("at", "price", "raw")} == {
        "at": "2025-01-02T03:04:00",
        "price": "1.50",
        "raw": "/wA=",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-new-tokens", "3"], "--max-new-tokens: no effect"),
        (["--max-new-tokens", "3", "--temperature", "0.5"], "--max-new-tokens and --temperature: no effect"),
    ],
)
def test_settings_of_writing_are_refused_before_the_model_is_loaded(
    cli: Any, cls_run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.setattr(command, "load_adapter", lambda *arguments: pytest.fail("it has loaded the model"))
    result = cli("infer", "--adapter", cls_run, "--prompt", "a cat", *options)
    assert result.code == 2
    assert f"{words}: this adapter is for SEQ_CLS, and only CAUSAL_LM, SEQ_2_SEQ_LM write text" in result.err


@pytest.mark.parametrize(("place", "words"), [(".", "is a folder; name a file in it"), ("file/out", "is a file, no folder")])
@pytest.mark.parametrize("name", ["infer", "evaluate"])
def test_an_output_that_cannot_be_written_is_refused_first(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: str, name: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "load_adapter", lambda *arguments: pytest.fail("it has loaded the model"))
    output = tmp_path / place
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a cat"}])
    asked = ["infer", "--adapter", lm_run, "--input", source, "--output", output]
    result = cli(*(asked if name == "infer" else ["evaluate", lm_run, "--predictions", output]))
    assert result.code == 2
    assert words in result.err


def test_an_output_folder_without_the_right_to_write_is_refused(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode, **options: not mode & os.W_OK)
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a cat"}])
    result = cli("infer", "--adapter", lm_run, "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.code == 2
    assert f"the folder {tmp_path} may not be written to" in result.err
