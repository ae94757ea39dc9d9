"""docs/extending.md adds a method, a task, a format and an export target: done to a copy of the package, and run there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import label_rows, write_jsonl
from tests.docs.documents import ROOT, blocks, commands

PAGE = ROOT / "docs" / "extending.md"
RUN = """\
import sys, shlex
from peftkit.cli import main
for line in sys.stdin:
    print("$", line, end="", flush=True)
    sys.argv = shlex.split(line)
    try:
        main()
    except SystemExit as error:
        assert not error.code, line
"""


def add_to(package: Path) -> None:
    """Write the modules of the page, and replace the lines of its diffs."""
    for block in blocks(PAGE):
        if block.kind == "python":
            path = package.parent / re.search(r"`(peftkit/\S+)`", block.before)[1]  # type: ignore[index]
            assert not path.exists(), path
            path.write_text(block.text, encoding="utf-8")
        elif block.kind == "diff":
            head, *lines = block.text.splitlines()
            path = package.parent / head.removeprefix("--- ")
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] == sign) for sign in "-+")
            text = path.read_text(encoding="utf-8")
            assert text.count(old) == 1, f"{path.name}: {old}"
            path.write_text(text.replace(old, new), encoding="utf-8")


def write_recipes(folder: Path, models: Path) -> None:
    """The recipes that the page names."""
    turns = [{"turns": ["who?", f"tom {number}", "sure?", "yes"]} for number in range(20)]
    stars = [
        {"text": row["text"], "label": 5 if row["label"] == "pos" else 1 + number % 3}
        for number, row in enumerate(label_rows(24))
    ]
    rows = {
        "support": ("SEQ_CLS", "bert", label_rows(24)),
        "stars": ("GRADE", "bert", stars),
        "talk": ("CAUSAL_LM", "llama", turns),
    }
    for name, (task, model, content) in rows.items():
        recipe = {
            "task": task,
            "model": {"name_or_path": str(models / model)},
            "adapter": {"method": "lora"},
            "data": {"train": str(write_jsonl(folder / f"{name}.jsonl", content)), "validation": 0.2, "max_length": 60},
            "training": {"max_steps": 4, "batch_size": 8},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


@pytest.fixture(scope="module")
def output(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What all commands of the page print, run in one process by a package with its additions."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "peftkit", folder / "peftkit", ignore=shutil.ignore_patterns("__pycache__"))
    add_to(folder / "peftkit")
    write_recipes(folder, models_dir)
    lines = "".join(f"{command.line}\n" for command in commands(PAGE))
    result = subprocess.run([sys.executable, "-c", RUN], input=lines, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (export,) = folder.glob("runs/attention/exports/npz/export.json")
    assert json.loads(export.read_text(encoding="utf-8"))["check"]["passed"]
    return result.stdout + result.stderr


def test_the_method_trains_what_it_says(output: str) -> None:
    assert "attention weights" in output


def test_the_task_is_measured_and_answers(output: str) -> None:
    assert "mae" in output


def test_the_format_is_recognised_and_shown(output: str) -> None:
    assert "format turns" in output


def test_the_page_has_an_example_of_each_kind() -> None:
    folders = {re.search(r"peftkit/(\w+)/", block.before)[1] for block in blocks(PAGE) if block.kind == "python"}  # type: ignore[index]
    assert folders == {"methods", "tasks", "formats", "exports"}
