"""Memory and disk that run out: exit code 4 and what helps, whatever the command was doing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from peftkit.engine.guard import explain_exhaustion, is_out_of_memory
from peftkit.errors import ResourceError
from tests.conftest import write_jsonl
from tests.runs import tiny_recipe, train

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried")


def fails(error: Exception) -> Any:
    """A function that raises."""

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.fixture(scope="module")
def lm_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAUSAL_LM run with an adapter that can be merged, and converted too."""
    folder = tmp_path_factory.mktemp("loha")
    train(tiny_recipe("CAUSAL_LM", models_dir, folder, adapter={"method": "loha", "r": 4}), folder / "run")
    return folder / "run"


def commands(run: Path, tmp_path: Path) -> dict[str, list[Any]]:
    source = write_jsonl(tmp_path / "in.jsonl", [{"instruction": "a cat", "output": "cat"}])
    return {
        "infer": ["infer", "--adapter", run, "--input", source, "--output", tmp_path / "out.jsonl", "--batch-size", 8],
        "evaluate": ["evaluate", run, "--data", source, "--batch-size", 8],
        "merge": ["merge", "--adapter", run, "--output", tmp_path / "merged"],
        "convert": ["convert", "--adapter", run, "--output", tmp_path / "converted"],
    }


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("name", ["infer", "evaluate", "merge", "convert"])
def test_no_memory_while_the_model_is_loaded(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails(error))
    result = cli(*commands(lm_run, tmp_path)[name])
    assert result.code == 4
    assert "out of memory while" in result.err or "out of memory with --batch-size 8" in result.err
    assert ("--batch-size 4" in result.err) == (name in ("infer", "evaluate"))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("infer", "peftkit.engine.generate.generate"),
        ("evaluate", "peftkit.engine.measure.score_examples"),
        ("merge", "peft.PeftModel.load_adapter"),
        ("merge", "peft.tuners.loha.LoHaModel.merge_and_unload"),
        ("convert", "peftkit.engine.convert.convert_to_lora"),
    ],
)
def test_no_memory_at_work(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    monkeypatch.setattr(where, fails(CPU))
    assert cli(*commands(lm_run, tmp_path)[name]).code == 4


def test_no_memory_for_the_adapter_of_a_run(
    tmp_path: Path, cli: Any, lm_recipe: Any, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.nn.init.kaiming_uniform_

    def fail(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.is_meta:
            return plain(tensor, *arguments, **options)
        raise CUDA

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", fail)
    result = cli("train", write_recipe(lm_recipe), "--output", tmp_path / "run")
    assert (result.code, "training.micro_batch_size: 2" in result.err) == (4, True), result.err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("name", ["infer", "evaluate", "merge", "convert"])
def test_what_the_file_system_refuses(
    cli: Any, lm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    monkeypatch.setattr("os.fsync", fails(OSError(code, os.strerror(code), "place")))
    result = cli(*commands(lm_run, tmp_path)[name])
    assert result.code == 4
    assert ("the disk is full: place" if code == errno.ENOSPC else "place cannot be used: Permission denied") in result.err


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explain_exhaustion(lambda: ""):
        raise RuntimeError("shapes differ")
    with pytest.raises(FileNotFoundError), explain_exhaustion(lambda: ""):
        raise FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(ResourceError, match="the disk is full"), explain_exhaustion(lambda: ""):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # torch.save


def test_the_type_of_an_exhausted_device_is_enough() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("HIP error"))
