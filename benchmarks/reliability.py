"""Kill a run over and over, at random moments, and compare what comes out with a run that nothing has interrupted.

    python benchmarks/reliability.py --work FOLDER --kills 50 --results reliability.json

Real command lines (`python -m peftkit train`) on a tiny Llama with random weights. After every SIGKILL each checkpoint that is
listed is checked file by file against its checksums, and the newest one is read. At the end the lines of metrics.jsonl and the
bytes of the adapter must be those of the uninterrupted run. Then: damaged checkpoints, and a disk that is full (as root).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "red",
    "birds",
    "in",
    "an",
    "old",
    "tree",
    "while",
    "seven",
    "small",
    "dogs",
    "ran",
    "home",
]
CLOCK = ("seconds", "memory_bytes")  # what no two runs have alike
ADAPTER = "adapter/adapter_model.safetensors"


def write_model(folder: Path) -> None:
    """A Llama of 40 thousand weights, and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(folder: Path, steps: int) -> Path:
    """Dropout, accumulation, and lines, evaluations and checkpoints at steps that do not coincide."""
    write_model(folder / "model")
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(4, 20)))} for _ in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "task": "CAUSAL_LM",
        "model": {"name_or_path": str(folder / "model")},
        "adapter": {"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.1, "max_length": 32},
        "training": {
            "learning_rate": 1e-3, "max_steps": steps, "batch_size": 8, "micro_batch_size": 4,
            "logging_steps": 4, "save_steps": 15, "eval_steps": 38, "save_total_limit": 2,
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def start(recipe: Path, run: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`peftkit train` as a process of its own; what it says goes to a file beside the run."""
    command = [sys.executable, "-m", "peftkit", "train", str(recipe), "--output", str(run), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=run.with_suffix(".err").open("ab"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return facts


def damage(folder: Path) -> list[str]:
    """Files of a checkpoint that are not what its checksums say; independent of peftkit."""
    stated = read_json(folder / "checksums.json")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    return [name for name in stated if digests.get(name) != stated[name]] if stated else ["checksums.json"]


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints and best adapters that are listed."""
    return sorted([*(run / "checkpoints").glob("step-*"), *(run / "checkpoints").glob("best-*")])


def newest_loads(run: Path) -> int | None:
    """Read all of the newest checkpoint; its step."""
    import torch
    from safetensors.torch import load_file

    steps = sorted((run / "checkpoints").glob("step-*"))
    if not steps:
        return None
    load_file(steps[-1] / "trainable.safetensors")
    torch.load(steps[-1] / "optimizer.pt", weights_only=True)
    torch.load(steps[-1] / "rng.pt", weights_only=True)
    return int(read_json(steps[-1] / "state.json")["step"])


def kill_once(recipe: Path, run: Path, draw: random.Random, startup: float) -> dict[str, Any]:
    """Start or resume, and kill: every fourth time while it starts, else while it trains, at a random moment."""
    before = read_json(run / "status.json").get("time", 0)
    arguments = ["--resume"] if (run / "resolved.yaml").is_file() else []
    process = start(recipe, run, *arguments)
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0, startup))
    else:
        while process.poll() is None:
            status = read_json(run / "status.json")
            if status.get("time", 0) != before and "total_steps" in status:
                break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    hidden = [path.name for path in (run / "checkpoints").glob(".*")]
    damaged = {path.name: wrong for path in checkpoints(run) if (wrong := damage(path))}
    return {"code": code, "writing": hidden, "damaged": damaged, "newest_step": newest_loads(run)}


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    found = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in found]


def compare(run: Path, whole: Path) -> dict[str, bool]:
    """Whether a run has the lines and the adapter of another, bit for bit."""
    adapters = [(path / ADAPTER).read_bytes() for path in (run, whole)]
    return {"lines_equal": lines(run) == lines(whole), "adapter_equal": adapters[0] == adapters[1]}


def kill_many(recipe: Path, run: Path, whole: Path, count: int, startup: float) -> dict[str, Any]:
    """Kill a run so many times, then let it end."""
    draw, rounds = random.Random(0), []
    while len(rounds) < count and (not rounds or rounds[-1]["code"] == -signal.SIGKILL):
        rounds.append(kill_once(recipe, run, draw, startup))
        print(len(rounds), rounds[-1], file=sys.stderr, flush=True)
    code = start(recipe, run, "--resume").wait() if rounds[-1]["code"] == -signal.SIGKILL else rounds[-1]["code"]
    kills = [found for found in rounds if found["code"] == -signal.SIGKILL]
    return {
        "kills": len(kills),
        "kills_while_a_checkpoint_was_written": sum(bool(found["writing"]) for found in kills),
        "damaged_checkpoints_listed": sum(len(found["damaged"]) for found in kills),
        "exit_code_at_the_end": code,
    } | compare(run, whole)


def damages(whole: Path, folder: Path) -> dict[str, int]:
    """Cut, flip a bit of, and remove every file of a checkpoint; how many of that peftkit recognises."""
    from peftkit.engine.checksums import damage_of

    source, done, seen = max((whole / "checkpoints").glob("step-*")), 0, 0
    for name in sorted(path.name for path in source.iterdir()):
        for kind in ("cut", "flipped", "gone"):
            shutil.copytree(source, folder)
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            if kind != "gone":
                place = len(content) // 2
                flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
                (folder / name).write_bytes(content[:place] if kind == "cut" else flipped)
            done, seen = done + 1, seen + (damage_of(folder) is not None)
            shutil.rmtree(folder)
    return {"damages": done, "recognised": seen}


def full_disk(recipe: Path, disk: Path, whole: Path) -> dict[str, Any]:
    """Train on a disk that is full before the run has ended, then make room and go on; empty where mounting is not allowed."""
    disk.mkdir()
    size = 2 * sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 3
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], check=False).returncode:
        return {}
    try:
        code = start(recipe, disk / "run").wait()
        damaged = [path.name for path in checkpoints(disk / "run") if damage(path)]
        found = {"exit_code": code, "damaged": damaged, "newest_step": newest_loads(disk / "run")}
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        return found | {"exit_code_resumed": start(recipe, disk / "run", "--resume").wait()} | compare(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=False)


def main() -> None:
    """Run all of it and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--results", type=Path, help="JSON file to write")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True)
    recipe = write_recipe(work, options.steps)
    begun = time.monotonic()
    process = start(recipe, work / "whole")
    while not (work / "whole/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    startup = time.monotonic() - begun
    if process.wait():
        sys.exit((work / "whole.err").read_text())
    results = {
        "kill -9": kill_many(recipe, work / "killed", work / "whole", options.kills, startup),
        "damaged checkpoints": damages(work / "whole", work / "damaged"),
        "full disk": full_disk(recipe, work / "disk", work / "whole"),
    }
    for title, facts in results.items():
        print(title, *(f"  {name}: {value}" for name, value in facts.items()), sep="\n")
    if options.results:
        options.results.write_text(json.dumps(results, indent=2) + "\n")
    equal = [facts[name] for facts in results.values() for name in ("lines_equal", "adapter_equal") if name in facts]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
