"""What a merge holds in memory: a layer and the adapter, not the model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers

from tests.conftest import tiny_tokenizer
from tests.forks import Forked

MIB = 2**20
LIMIT_MIB = 120  # above what the process has before it begins
PROGRAM = """
import contextlib, sys
from peftkit.cli import main
from peftkit.commands import merge
from peftkit.engine.in_files import in_memory
if sys.argv[1] == "whole":
    merge.weights_in_files = lambda folder: contextlib.nullcontext(in_memory)
sys.argv = ["peftkit", *sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
main()
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of all linear layers for a base of 253 MiB in float32, stored in bfloat16 and in shards."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 25, "num_attention_heads": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes)).to(torch.bfloat16)
    assert 4 * model.num_parameters() > 2 * LIMIT_MIB * MIB
    model.save_pretrained(folder / "base", max_shard_size="20MB")
    tiny_tokenizer().save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def anonymous_mib(pid: int) -> float:
    """Memory of a process that no file backs."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0.0)


def peak_of_merging(way: str, adapter: Path, output: Path) -> float:
    """The most that a merge took, in MiB above what its process had before."""
    command = [sys.executable, "-c", PROGRAM, way, "merge", "--adapter", str(adapter), "--output", str(output)]
    process = Forked(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    assert process.stdout.readline() == "ready\n"
    before = peak = anonymous_mib(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, anonymous_mib(process.pid))
        time.sleep(0.002)
    assert process.wait() == 0, process.communicate()
    return peak - before


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_merge_holds_a_layer_and_the_adapter_in_memory(adapter: Path, tmp_path: Path) -> None:
    found = peak_of_merging("files", adapter, tmp_path / "merged")
    whole = peak_of_merging("whole", adapter, tmp_path / "again")  # or the limit would prove nothing
    assert found < LIMIT_MIB < whole
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
