"""The folder that a page's commands run in: every name that the documents use is there, small enough to run in seconds.

A run is trained once and copied; files of rows repeat what the page shows of them, or are made here. A page that names a
new file or run needs a line of `FILES` or `RUNS`.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import label_rows, rows_of, write_jsonl
from tests.docs.documents import ROOT, Block, blocks
from tests.runs import run_cli

_REPEATS = 30  # of the rows that a page shows: enough for a fraction
_NAMED = re.compile(r"`([\w./-]+\.(?:csv|jsonl|yaml|yml|txt))`")
Rows = list[dict[str, Any]]


def recipe_of(task: str, models: Path, train: str) -> dict[str, Any]:
    """A recipe of two steps on a tiny model, as a mapping."""
    recipe: dict[str, Any] = {
        "task": task,
        "model": {"name_or_path": str(models / {"CAUSAL_LM": "llama"}.get(task, "bert"))},
        "adapter": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": train, "validation": 0.2, "max_length": 60},
        "training": {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8, "logging_steps": 1},
    }
    if task == "CAUSAL_LM":
        recipe["generation"] = {"max_new_tokens": 8}
    return recipe


def _texts(count: int) -> Rows:
    return [{"text": row["text"]} for row in label_rows(count)]


# Name -> its rows.
FILES: dict[str, Callable[[], Rows]] = {
    "rows.jsonl": lambda: rows_of("CAUSAL_LM", 32),
    "intents.jsonl": lambda: label_rows(24),
    "reviews.csv": lambda: label_rows(24),
    "text.txt": lambda: _texts(12),
    "text.jsonl": lambda: _texts(12),
    **{f"{half}_{part}.jsonl": lambda: label_rows(12) for half in ("cards", "accounts") for part in ("test", "dev")},
}
# Configurations of other tools, which `migrate` reads.
CONFIGS = {
    "data/dataset_info.json": '{"mine": {"file_name": "../rows.jsonl"}}',
    "llama3_lora_sft.yaml": "model_name_or_path: owner/name\nstage: sft\nfinetuning_type: lora\ndataset: mine\n",
    "config.yml": "base_model: owner/name\nadapter: lora\nlora_r: 8\ndatasets: [{path: rows.jsonl, type: alpaca}]\n",
    "run_sft.sh": "trl sft --model_name_or_path owner/name --dataset_name rows.jsonl --use_peft\n",
}
# Name -> (task, file of its rows).
RECIPES = {"recipe.yaml": ("CAUSAL_LM", "rows.jsonl"), "banking.yaml": ("SEQ_CLS", "intents.jsonl")}
# What makes a run, or the folder of a comparison; it is made once.
MADE = {
    "chat": ("train", "recipe.yaml"),
    "intents": ("train", "banking.yaml"),
    "comparison": ("compare", "banking.yaml", "--methods", "lora,ia3", "--budget", "steps", "2"),
}
STOPPED = "runs/mine"  # a run of recipe.yaml that `--resume` can go on with
# The name of a folder in the documents -> which of these it is.
RUNS = {
    "RUN": "chat",
    "runs/my-run": "chat",
    "runs/one": "chat",
    "runs/other": "chat",
    "experiments/one": "chat",
    "runs/support": "chat",
    "runs/sql": "chat",
    "runs/quickstart-20261127-070000": "intents",
    "runs/quickstart-20261127-120000": "intents",
    "runs/cards": "intents",
    "runs/accounts": "intents",
    "other/adapter": "intents",
    "runs/compare-banking-20261127-060000": "comparison",
}
_FOLDERS = ("recipes", "configs")  # of the repository, as they are


def write_recipes(folder: Path, models: Path) -> None:
    """The recipes of RECIPES, with their rows and all other FILES."""
    for name, make in FILES.items():
        write_rows(folder / name, make())
    for name, (task, rows) in RECIPES.items():
        (folder / name).write_text(yaml.safe_dump(recipe_of(task, models, rows), sort_keys=False), encoding="utf-8")


def prepare(folder: Path, page: Path, models: Path, made: Callable[[str], Path]) -> None:
    """Put everything that the documents name into a folder; `made` gives the folder that one of MADE has made."""
    for name in _FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    write_recipes(folder, models)
    for name, content in CONFIGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    if STOPPED in page.read_text(encoding="utf-8"):
        stop = ("--set", "training.max_seconds=0.001", "--output", folder / STOPPED)
        assert run_cli("train", folder / "recipe.yaml", *stop).code == 75
    for name, kind in RUNS.items():
        source = made(kind)
        shutil.copytree(source / "adapter" if name.endswith("/adapter") else source, folder / name)
    for block in blocks(page):
        names = _NAMED.findall(block.before) if block.before.endswith(":") else []
        for number, name in enumerate(names):
            write_shown(folder / name, block, number * _REPEATS)


def write_shown(path: Path, block: Block, first: int) -> None:
    """A file that a page shows: a recipe as it is, rows often enough to train on, numbered from `first` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if block.kind in ("yaml", "yml"):
        path.write_text(block.text, encoding="utf-8")
    elif rows := list(rows_in(block)):
        write_rows(path, [numbered(row, turn) for turn in range(first, first + _REPEATS) for row in rows])


def rows_in(block: Block) -> Iterator[dict[str, Any]]:
    """The rows of a block of csv, json or jsonl."""
    if block.kind == "csv":
        yield from csv.DictReader(block.text.splitlines())
    elif block.kind in ("json", "jsonl"):
        yield from map(json.loads, block.text.splitlines())


def numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row made distinct by a number after its first text, or after the first turn's."""
    if isinstance(messages := row.get("messages"), list):
        return row | {"messages": [numbered(messages[0], number), *messages[1:]]}
    name = "content" if "content" in row else next((key for key, value in row.items() if isinstance(value, str)), None)
    return row if name is None else row | {name: f"{row[name]} {number}"}


def write_rows(path: Path, rows: Rows) -> None:
    """Rows in the kind of file that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        assert path.suffix == ".jsonl", f"the test cannot write {path.name}"
        write_jsonl(path, rows)
