"""`peftkit infer --input`: a job that is interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.engine import generate as engine
from tests.conftest import Result, instruction_rows, write_jsonl

Infer = Callable[..., Result]


@pytest.fixture
def infer(cli: Any, lm_run: Path, tmp_path: Path) -> Infer:
    """Answer seven rows, two at a time."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"instruction": row["instruction"]} for row in instruction_rows(7)])

    def run(*arguments: Any) -> Result:
        result: Result = cli(
            "infer", "--adapter", lm_run, "--input", source, "--output", tmp_path / "out.jsonl", "--batch-size", 2, *arguments
        )
        return result

    return run


@pytest.fixture
def interrupted(infer: Infer, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The job, stopped by Ctrl-C in its third batch."""
    plain, calls = engine.generate, []

    def stop(*arguments: Any) -> list[str]:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", stop)
        return infer()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_interrupted_job_keeps_its_answers_and_says_so(interrupted: Result, tmp_path: Path) -> None:
    assert interrupted.code == 130
    assert "interrupted after 4 of 7 rows; the same command goes on with the others" in interrupted.err
    assert not (tmp_path / "out.jsonl").exists()
    assert len(lines(tmp_path / "out.jsonl.part")) == 1 + 4


@pytest.mark.parametrize("tail", ["", '{"row": 0, "ans'])  # a kill may cut the last line short
def test_the_same_command_answers_the_rest(
    interrupted: Result, infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    with (tmp_path / "out.jsonl.part").open("a") as handle:
        handle.write(tail)
    plain, counts = engine.generate, []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", lambda *arguments: (counts.append(len(arguments[1])), plain(*arguments))[1])
        result = infer()
    assert result.code == 0, result.err
    assert "4 of 7 rows are answered already" in result.err
    assert counts == [2, 1]
    assert not (tmp_path / "out.jsonl.part").exists()
    found = lines(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()
    assert infer().code == 0
    assert lines(tmp_path / "out.jsonl") == found


def test_another_job_does_not_mix_with_what_is_left_of_one(interrupted: Result, infer: Infer, tmp_path: Path) -> None:
    result = infer("--max-new-tokens", 3)
    assert result.code == 2
    assert "out.jsonl.part holds 4 answers of another input, adapter or settings; repeat that command" in result.err
    assert len(lines(tmp_path / "out.jsonl.part")) == 1 + 4


@pytest.mark.parametrize("text", ["not JSON\n", "no line end", "[1]\n", '{"job": "x"}\n{"answer": 1}\n', '{"other": 1}\n'])
def test_a_file_of_others_in_its_place_is_refused_and_kept(infer: Infer, tmp_path: Path, text: str) -> None:
    (tmp_path / "out.jsonl.part").write_text(text)
    result = infer()
    assert result.code == 2
    assert "out.jsonl.part, and what is there holds something else; move it away, or name another output" in result.err
    assert (tmp_path / "out.jsonl.part").read_text() == text


def test_a_job_that_ended_before_its_first_answer_leaves_nothing(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", lambda *arguments: 1 / 0)
        assert infer().code == 1
    assert not (tmp_path / "out.jsonl.part").exists()
    (tmp_path / "out.jsonl.part").write_text('{"job": "another"}\n')  # of a job that was killed
    assert infer("--max-new-tokens", 3).code == 0


def test_answers_outlive_a_kill_while_their_file_is_written_anew(
    interrupted: Result, infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        assert infer().code == 130
    assert len(lines(tmp_path / "out.jsonl.part")) == 1 + 4
