"""peftkit, a plain script, a bare loop and the peers on one job, one after the other, several times; a table of their figures.

    python benchmarks/speed/make_envs.py ENVS
    python benchmarks/speed.py --work FOLDER --envs ENVS --results speed.jsonl --rounds 3
    python benchmarks/speed.py --work FOLDER --results growth.jsonl --grow length
    python benchmarks/speed.py --work FOLDER --envs ENVS --results starts.jsonl --starts
    python benchmarks/speed.py --results speed.jsonl --table

Every run is a line of the results; runs that are there already are not repeated. peftkit, the plain script and the bare
loop run with `--peftkit-python` (default: this one), with the peftkit that it imports. `--device cuda --dtype bfloat16` is
the same on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speed_tables import load_results, print_tables

RUNNERS = Path(__file__).with_suffix("")  # the folder `speed` beside this file
OURS = ("peftkit", "plain", "bare")
PEERS = ("trl", "llamafactory", "axolotl", "ms_swift", "torchtune", "litgpt")
GPU_PEERS = ("unsloth",)
NUM_ROWS = 256
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Size:
    """What of the common job grows."""

    vocab_size: int = 32_000
    max_length: int = 512
    batch_size: int = 8
    rank: int = 8
    hidden_size: int = 512
    layers: int = 8

    @property
    def folder_name(self) -> str:
        """Where its model and rows are; batch size and rank need no others."""
        return f"{self.layers}x{self.hidden_size}-vocab{self.vocab_size}-length{self.max_length}"

    @property
    def name(self) -> str:
        """How results call it."""
        return f"{self.folder_name}-batch{self.batch_size}-rank{self.rank}"


# 8 long rows would take more than 20 GiB: the plain script holds several times 4 bytes x cells x vocabulary of logits.
GROWTH = {
    "length": [Size(max_length=length, batch_size=2) for length in (256, 512, 1024, 2048, 4096)],
    "vocabulary": [Size(vocab_size=size) for size in (32_000, 128_000)],
    "batch": [Size(batch_size=size) for size in (2, 8, 16)],
    "rank": [Size(rank=rank) for rank in (8, 64)],
}


def ffn_size(hidden_size: int) -> int:
    """Width of the feed-forward layers, in Llama's proportion (1376 for 512)."""
    return hidden_size * 43 // 16


def make_job(options: argparse.Namespace, size: Size) -> Path:
    """The folder of model and rows, made when it is missing."""
    folder: Path = options.work / "jobs" / size.folder_name
    if not (folder / "rows.jsonl").exists():
        names = ("vocab_size", "max_length", "hidden_size", "layers")
        settings = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(size, name)))]
        command = [options.peftkit_python, str(RUNNERS / "make_job.py"), str(folder), "--rows", str(NUM_ROWS), *settings]
        subprocess.run(command, check=True, env=environment(options, folder))
    return folder


def environment(options: argparse.Namespace, cache_dir: Path, tool: str = "peftkit") -> dict[str, str]:
    """One thread, no network, caches of its own."""
    inherited = {key: value for key, value in os.environ.items() if tool in OURS or key != "PYTHONPATH"}
    threads = {} if options.device == "cuda" else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return (
        inherited
        | threads
        | {
            "HF_HOME": str(cache_dir / "hf"),
            "MODELSCOPE_CACHE": str(cache_dir / "modelscope"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_DISABLED": "true",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONWARNINGS": "ignore",
        }
    )


def python_of(options: argparse.Namespace, tool: str) -> Path:
    """The interpreter of a tool's environment."""
    return Path(options.peftkit_python) if tool in OURS else options.envs / tool / "bin" / "python"


def run(options: argparse.Namespace, tool: str, size: Size, cache_dir: Path) -> dict[str, Any]:
    """One run: the figures, or why there are none."""
    job_dir = make_job(options, size)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "out").mkdir()
        job = describe(options, tool, size, job_dir) | {
            "scratch_dir": str(scratch / "out"),
            "cache_dir": str(cache_dir),
            "result_path": str(scratch / "result.json"),
            "started": time.time(),
        }
        (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [str(python_of(options, tool)), str(RUNNERS / f"run_{tool}.py"), str(scratch / "job.json")]
        env = environment(options, cache_dir, tool)
        with (scratch / "log.txt").open("wb") as log:
            done = subprocess.run(command, stdout=log, stderr=log, env=env, cwd=scratch, check=False)
        if not (scratch / "result.json").exists():
            log_text = (scratch / "log.txt").read_text(errors="replace")
            return {"error": f"exit {done.returncode}", "log": log_text[-3000:]}
        result: dict[str, Any] = json.loads((scratch / "result.json").read_text(encoding="utf-8"))
    tokens = count_tokens(job_dir, size.batch_size, options.steps)
    return result | {"tokens": tokens, "flops_per_token": flops_per_token(size, tokens)}


def describe(options: argparse.Namespace, tool: str, size: Size, job_dir: Path) -> dict[str, Any]:
    """The common job in words that a runner reads (`Job` in meter.py)."""
    return {
        "model_dir": str(job_dir / "model"),
        "rows_path": str(job_dir / "rows.jsonl"),
        "tokens_path": str(job_dir / "tokens.jsonl"),
        "steps": options.steps,
        "batch_size": size.batch_size,
        "max_length": size.max_length,
        "rank": size.rank,
        "alpha": 2 * size.rank,
        "targets": TARGETS,
        "learning_rate": options.learning_rate,
        "device": options.device,
        "dtype": options.dtype,
        "seed": 0,
        "settings": [text.partition(":")[2] for text in options.set if text.startswith(f"{tool}:")],
    }


def flops_per_token(size: Size, tokens: dict[str, list[int]]) -> float:
    """Operations a token costs at least: forward, backward to activations, gradients of the adapter alone; causal attention."""
    hidden, ffn = size.hidden_size, ffn_size(size.hidden_size)
    frozen = size.layers * (4 * hidden**2 + 3 * hidden * ffn) + hidden * size.vocab_size
    adapter = size.layers * len(TARGETS) * 2 * hidden * size.rank
    length = sum(tokens["real"]) / (size.batch_size * len(tokens["real"]))
    return 4 * frozen + 6 * adapter + 6 * size.layers * hidden * length


def count_tokens(job_dir: Path, batch_size: int, steps: int) -> dict[str, list[int]]:
    """Tokens, targets and padded cells of each step."""
    rows = [json.loads(line) for line in (job_dir / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    batches = [rows[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
    lengths = [[len(row["input_ids"]) for row in batch] for batch in batches]
    targets = [sum(label != -100 for row in batch for label in row["labels"]) for batch in batches]
    return {"real": [sum(row) for row in lengths], "cells": [max(row) * len(row) for row in lengths], "targets": targets}


def sizes_of(options: argparse.Namespace) -> list[Size]:
    """The jobs to run."""
    return GROWTH[options.grow] if options.grow else [replace(Size(), **dict(options.size))]


def pick_tools(options: argparse.Namespace) -> list[str]:
    """The tools to run; one without an environment is left out, and said so."""
    every = [*OURS] if options.grow else [*OURS, *PEERS, *(GPU_PEERS if options.device == "cuda" else ())]
    tools = options.only or every
    for tool in tools:
        if not python_of(options, tool).exists():
            print(f"{tool}: left out, there is no {python_of(options, tool)}", file=sys.stderr)
    return [tool for tool in tools if python_of(options, tool).exists()]


def measure(options: argparse.Namespace) -> None:
    """All runs that are missing, tools alternating."""
    tools = pick_tools(options)
    sizes = sizes_of(options)
    results = load_results(options.results)
    done = {(row["job"], row["tool"], row["round"], row["start"]) for row in results if "error" not in row}
    starts = ("cold", "again") if options.starts else ("",)
    for number in range(options.rounds):
        for size in sizes:
            for tool in tools:
                cache_dir = options.work / "caches" / (f"start{number}" if options.starts else "") / tool / size.folder_name
                if options.starts and (size.name, tool, number, "cold") not in done:
                    shutil.rmtree(cache_dir, ignore_errors=True)
                for start in starts:
                    if (size.name, tool, number, start) in done:
                        continue
                    about = {"job": size.name, "tool": tool, "round": number, "start": start, "device": options.device}
                    now = {"dtype": options.dtype, "date": time.strftime("%Y-%m-%d %H:%M"), "load": os.getloadavg()[0]}
                    row = about | now | run(options, tool, size, cache_dir)
                    with options.results.open("a", encoding="utf-8") as handle:
                        handle.write(json.dumps(row) + "\n")
                    print(tool, size.name, number, start, row.get("error", "done"), flush=True)


def size_setting(text: str) -> tuple[str, int]:
    """`rank=64` as a name and a number."""
    name, _, value = text.partition("=")
    if name not in Size.__dataclass_fields__:
        raise argparse.ArgumentTypeError(f"`{name}` is none of {', '.join(Size.__dataclass_fields__)}")
    if not value.isdigit() or int(value) == 0:
        raise argparse.ArgumentTypeError(f"`{text}`: {name} takes a whole number from 1 on")
    return name, int(value)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one for each run")
    parser.add_argument("--work", type=Path, default=Path("speed_work"), help="folder for models, rows and caches")
    parser.add_argument("--envs", type=Path, default=Path("speed_envs"), help="folder that make_envs.py filled")
    parser.add_argument("--peftkit-python", default=sys.executable, help="interpreter of peftkit, plain and bare")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS, *GPU_PEERS], help="these tools alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run; from the second on they are measured")
    parser.add_argument("--size", nargs="+", type=size_setting, default=[], help="another job, such as vocab_size=128000")
    parser.add_argument("--grow", choices=GROWTH, help="several jobs, of growing size")
    parser.add_argument("--starts", action="store_true", help="measure starts: the first one, and one more with what it left")
    parser.add_argument("--set", nargs="+", default=[], help="settings of a tool, such as peftkit:data.packing=true")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    batch_sizes = [size.batch_size for size in sizes_of(options)]
    most = NUM_ROWS // max(batch_sizes)
    if not 2 <= options.steps <= most:
        parser.error(f"--steps {options.steps}: it takes 2 (the first is not measured) to {most} ({NUM_ROWS} rows are made)")
    options.work, options.envs, options.results = (path.absolute() for path in (options.work, options.envs, options.results))
    return options


def main() -> None:
    """Run what is missing, print the tables."""
    options = parse()
    if not options.table:
        measure(options)
    print_tables(load_results(options.results))


if __name__ == "__main__":
    main()
