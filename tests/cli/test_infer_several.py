"""`peftkit infer` with several adapters on one base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Result, write_jsonl
from tests.serving import PROMPTS

Cli = Callable[..., Result]


@pytest.fixture
def options(language_adapters: dict[str, Path]) -> list[str]:
    """Three adapters of two methods."""
    return [part for name in ("lora", "wide", "ia3") for part in ("--adapter", f"{name}={language_adapters[name]}")]


def test_a_prompt_is_answered_by_all_and_by_the_base(cli: Cli, options: list[str], answers_alone: dict[str, list[str]]) -> None:
    result = cli("infer", *options, "--prompt", PROMPTS[1], "--json")
    found = {answer["adapter"]: answer["prediction"] for answer in result.json["answers"]}
    assert found == {name: answers_alone[name][1] for name in ("lora", "wide", "ia3", "base")}


def test_one_of_them_can_be_asked(cli: Cli, options: list[str], answers_alone: dict[str, list[str]]) -> None:
    assert cli("infer", *options, "--prompt", PROMPTS[1], "--use", "wide").out == f"[wide]\n{answers_alone['wide'][1]}\n"


def test_each_row_of_a_file_chooses_its_adapter(
    cli: Cli, options: list[str], answers_alone: dict[str, list[str]], tmp_path: Path
) -> None:
    names = ["ia3", "base", None, "lora", "wide"]
    rows: list[dict[str, Any]] = [{"prompt": text, "id": n} for n, text in enumerate(PROMPTS)]
    for row, name in zip(rows, names, strict=True):
        row.update({"adapter": name} if name else {})
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    result = cli("infer", *options, "--input", source, "--output", tmp_path / "out.jsonl", "--use", "wide", "--json")
    assert result.json == {"num_rows": 5, "output": str(tmp_path / "out.jsonl")}
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wanted = [answers_alone[name or "wide"][n] for n, name in enumerate(names)]
    assert [(row["id"], row["adapter"], row["prediction"]) for row in found] == [
        (n, name or "wide", wanted[n]) for n, name in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("name", "words"), [("nobody", "in.jsonl:2: `adapter` is 'nobody'"), (None, "in.jsonl:2: no `adapter`")]
)
def test_a_row_for_nobody_is_named(cli: Cli, options: list[str], tmp_path: Path, name: str | None, words: str) -> None:
    rows = [{"prompt": "old", "adapter": "lora"}, {"prompt": "old", "adapter": name}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    result = cli("infer", *options, "--input", source, "--output", tmp_path / "out.jsonl")
    assert result.code == 3
    assert words in result.err
    assert "there are lora, wide, ia3, base" in result.err


def test_a_chat_switches_adapters(
    cli: Cli, options: list[str], answers_alone: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = [
        PROMPTS[1],
        "/new",
        "/adapter base",
        PROMPTS[1],
        "/new",
        "/adapter nobody",
        "/adapters",
        "/adapter ia3",
        PROMPTS[1],
    ]
    lines = iter([*typed, ""])
    monkeypatch.setattr("peftkit.console.ask", lambda prompt: next(lines))
    result = cli("infer", *options)
    answers = [answers_alone[name][1] for name in ("lora", "base", "ia3")]
    assert [line.strip() for line in result.out.splitlines()] == answers
    assert "there is no adapter `nobody`; there are lora, wide, ia3, base" in result.err
    assert "* base" in result.err


@pytest.mark.parametrize(
    ("further", "words"),
    [
        (["--use", "nobody"], "--use nobody: there are lora, wide, ia3, base, all"),
        (["--use", "all"], "--use all: goes with --prompt alone"),
        (["--task-id", "one", "--prompt", "x"], "none of these adapters was trained on several tasks"),
        (["--json"], "--json needs --prompt or --input"),
    ],
)
def test_options_without_sense_are_refused(cli: Cli, options: list[str], further: list[str], words: str) -> None:
    result = cli("infer", *options, *further)
    assert result.code == 2
    assert words in result.err


def test_use_needs_names(cli: Cli, language_adapters: dict[str, Path]) -> None:
    result = cli("infer", "--adapter", language_adapters["lora"], "--use", "x", "--prompt", "old")
    assert result.code == 2
    assert "has no effect on one adapter without a name" in result.err
