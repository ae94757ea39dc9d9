"""peftkit and the plain scripts with the same settings, one after the other, and a table of their figures.

    python benchmarks/side_by_side.py --model MINILM_FOLDER --data FOLDER --results results.jsonl

FOLDER holds sentence_polarity, wnut17, xquad_en and stsb_en, each with train.jsonl and test.jsonl. Every run is a line of
`results.jsonl`; runs that are there already are not repeated. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["query", "value"]},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit"},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 20},
    "bottleneck": {"method": "bottleneck", "style": "pfeiffer", "reduction_factor": 16},
    "full": {"method": "full"},
    "head": {"method": "head"},
}


@dataclass(frozen=True)
class Bench:
    """One data set: the plain script, the recipe that says the same, and the metric that both print."""

    script: str
    task: str
    metric: str
    learning_rates: dict[str, float]
    epochs: int
    batch_size: int
    max_length: int
    max_rows: int | None = None
    sections: dict[str, Any] = field(default_factory=dict)


BENCHES = {
    "sentence_polarity": Bench(
        "plain_peft.py",
        "SEQ_CLS",
        "accuracy",
        {"lora": 1e-3, "ia3": 3e-2, "bitfit": 5e-3, "prefix": 3e-2, "bottleneck": 1e-3, "full": 1e-4, "head": 1e-2},
        epochs=1,
        batch_size=32,
        max_length=64,
        max_rows=4000,
    ),
    "wnut17": Bench("plain_token_cls.py", "TOKEN_CLS", "f1", {"lora": 3e-3, "full": 3e-4}, 1, 32, 256),
    "xquad_en": Bench(
        "plain_question_answering.py",
        "QUESTION_ANS",
        "f1",
        {"lora": 2e-3, "full": 2e-4},
        epochs=1,
        batch_size=4,
        max_length=384,
        max_rows=500,
    ),
    "stsb_en": Bench(
        "plain_sts.py",
        "FEATURE_EXTRACTION",
        "spearman",
        {"lora": 1e-3, "full": 1e-4},
        epochs=1,
        batch_size=32,
        max_length=128,
        max_rows=3000,
        sections={"embedding": {"pooling": "mean", "loss": "cosine", "score_range": [0, 5]}},
    ),
}


def run(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command prints last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_plain(bench: Bench, method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The plain script."""
    settings = {
        "--model": options.model,
        "--train": folder / "train.jsonl",
        "--test": folder / "test.jsonl",
        "--method": method,
        "--learning-rate": bench.learning_rates[method],
        "--epochs": bench.epochs,
        "--batch-size": bench.batch_size,
        "--max-length": bench.max_length,
        **({"--max-rows": bench.max_rows} if bench.max_rows else {}),
    }
    script = Path(__file__).with_name(bench.script)
    return run([sys.executable, str(script), *(str(part) for pair in settings.items() for part in pair)])


def run_peftkit(bench: Bench, method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`peftkit train` with a recipe of the same settings; JSON is YAML too."""
    recipe = {
        "task": bench.task,
        "model": {"name_or_path": options.model},
        "adapter": ADAPTERS[method],
        "data": {
            "train": {"path": str(folder / "train.jsonl"), "max_rows": bench.max_rows},
            "test": str(folder / "test.jsonl"),
            "max_length": bench.max_length,
            **({} if bench.task == "QUESTION_ANS" else {"truncation": "right"}),
        },
        "training": {
            "learning_rate": bench.learning_rates[method],
            "num_train_epochs": bench.epochs,
            "batch_size": bench.batch_size,
            "micro_batch_size": bench.batch_size,
            "logging_steps": 50,
        },
        **bench.sections,
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        output = str(Path(scratch) / "run")
        result = run([sys.executable, "-m", "peftkit", "train", str(path), "--output", output, "--json"])
    kept = {key: result[key] for key in ("trainable_params", "train_seconds", "certificate")}
    return result["metrics"] | kept


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each data set and method."""
    lines = ["| data set | method | metric | plain script | peftkit | trained parameters |", "|---|---|---|---|---|---|"]
    found = {(row["data"], row["method"], row["tool"]): row for row in results}
    for data, bench in BENCHES.items():
        for method in bench.learning_rates:
            plain, ours = (found.get((data, method, tool)) for tool in ("plain", "peftkit"))
            if plain is None or ours is None:
                continue
            same = plain["trainable_params"] == ours["trainable_params"]
            counts = f"{ours['trainable_params']:,}" + ("" if same else f" (plain: {plain['trainable_params']:,})")
            names = [bench.metric] + (["exact_match"] if bench.task == "QUESTION_ANS" else [])
            shown = [", ".join(f"{row[name]:.3f}" for name in names) for row in (plain, ours)]
            lines.append(f"| {data} | {method} | {', '.join(names)} | {' | '.join(shown)} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one for each run")
    options = parser.parse_args()
    results = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    done = {(row["data"], row["method"], row["tool"]) for row in results}
    for data, bench in BENCHES.items():
        for method in bench.learning_rates:
            for tool, runner in (("plain", run_plain), ("peftkit", run_peftkit)):
                if (data, method, tool) in done:
                    continue
                row = {"data": data, "method": method, "tool": tool} | runner(bench, method, options, options.data / data)
                results.append(row)
                with options.results.open("a") as handle:
                    handle.write(json.dumps(row) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
