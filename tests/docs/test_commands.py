"""Every command of README.md, README.zh.md and docs/ is run, in a folder where the names that the documents use exist.

A page's commands run in their order in this process, with as few steps as will do; `runs/NAME-...` is the newest run of that
name. What is shown under a command must be what it prints, numbers and widths aside. What cannot run here is a line of
`NOT_RUN`, with its reason: it is read by the real command line all the same.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import re
import shutil
import signal
import sys
import urllib.request
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer
from huggingface_hub import constants

from peftkit.cli import app
from tests.comparing import in_this_process
from tests.conftest import Result
from tests.docs.documents import CHINESE, PAGES, ROOT, Command, commands, inline_commands
from tests.docs.places import MADE, prepare, write_recipes
from tests.real_configs import MODELS
from tests.runs import peftkit_process, run_cli
from tests.stand_ins import put_stand_ins

# Pattern of a command line -> why it is not run here.
NOT_RUN = {
    "peftkit train * --processes *": "starts processes: tests/engine/test_launched_runs.py does",
    "peftkit train * --launch *": "starts processes: tests/engine/test_sharded.py does, with every file of configs/",
    "peftkit evaluate * --harness *": "its tasks come from the hub",
    "peftkit push * --private": "writes to the hub",
    "peftkit doctor*": "five processes that import torch: 17 s",
}
_STEPS = ("--set", "training.max_steps=2")
# What shortens a command; the last of an option counts.
SHORTER: dict[str, tuple[str, ...]] = {
    "train": _STEPS,
    "compare": ("--seeds", "1", "--budget", "steps", "2", "--jobs", "1"),
    "sweep": ("--budget", "steps", "2", "--jobs", "1"),
    "init": ("--force",),
    "migrate": ("--force",),
    "push": ("--base", "owner/name"),
}
_CHAT = "where is my parcel?\n"  # what is typed where a command begins a chat
# test_extending.py runs the commands of the one, test_readmes.py holds the other to README.md.
_ELSEWHERE = {ROOT / "docs" / "extending.md", CHINESE}
RUN_PAGES = [page for page in PAGES if page not in _ELSEWHERE and any(commands(page))]


def why_not_run(line: str) -> str | None:
    """Why a command is not run here; None where it is."""
    return next((reason for pattern, reason in NOT_RUN.items() if fnmatchcase(line, pattern)), None)


def shortened(words: list[str]) -> list[str]:
    """A command line with as little to do as shows that it works."""
    more = list(SHORTER.get(words[0], ()))
    if words[0] == "compare" and "--methods" in words and len(words[words.index("--methods") + 1].split(",")) > 5:
        more += ["--methods", "lora,ia3"]
    if "--resume" in words or "--locked" in words:
        return words
    return words + more + (["--trials", "2"] if "--search" in words and words[0] == "sweep" else [])


def resolved(words: list[str]) -> list[str]:
    """Words with `NAME-...` as the newest that is called so, and patterns as a shell expands them."""
    found: list[str] = []
    for word in words:
        head, mark, name = word.rpartition("=") if "=runs/" in word else ("", "", word)
        pattern = f"{name[:-3]}*" if name.endswith("...") else name
        paths = sorted(glob.glob(pattern), key=lambda path: Path(path).stat().st_mtime_ns) if "*" in pattern else []
        assert paths or "..." not in pattern, f"there is no {name}"
        found += [head + mark + path for path in (paths[-1:] if name.endswith("...") else paths)] or [word]
    return found


@pytest.fixture(scope="module")
def made(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that a command of MADE has made, when it is asked for first."""
    root = tmp_path_factory.mktemp("made")
    write_recipes(root, models_dir)

    @functools.cache
    def folder_of(kind: str) -> Path:
        command, recipe, *options = MADE[kind]
        with in_this_process():
            result = run_cli(command, root / recipe, *options, "--output", root / kind)
        assert result.code == 0, result.err
        return root / kind

    return folder_of


def put_stand_ins_of(page: Path) -> None:
    """Stand-ins of what a page names of the hub, itself or by a shipped recipe."""
    text = page.read_text(encoding="utf-8")
    recipes = [ROOT / name for name in re.findall(r"recipes/\w+\.yaml", text)]
    text += "".join(path.read_text(encoding="utf-8") for path in recipes if path.is_file())
    paths = re.findall(r"path: ([^\s,}]+)", text)
    put_stand_ins(Path(constants.HF_HOME), [name for name in MODELS if name in text], paths)


def serve(words: list[str]) -> Result:
    """Start the server, ask whether it is well, end it."""
    process = peftkit_process(*words, "--port", "0")
    assert process.stderr is not None
    address = next(line for line in process.stderr if "serving at" in line).split()[2].rstrip("/")
    with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGTERM)
    return Result(process.wait(20), f"serving at {address}/", "")


def run(command: Command) -> Result:
    """Run a command of a page in the current folder."""
    words = resolved(list(command.words))
    if words[0] == "serve":
        return serve(words)
    for option in ("--output", "--dry-run"):  # where several examples write to the same place
        if option in words and words[0] not in ("train", "evaluate", "init") and Path(words[words.index(option) + 1]).is_dir():
            shutil.rmtree(words[words.index(option) + 1])
    trials_here = in_this_process() if words[0] in ("compare", "sweep") else contextlib.nullcontext()
    with patch.object(sys, "stdin", io.StringIO(_CHAT)), trials_here:
        return run_cli(*shortened(words))


def masked(line: str) -> str:
    """A line without numbers, their units, spaces and the rules of tables, and of a row of figures its name and width: what is
    the same for another model and other rows."""
    if "│" in line:
        line = line.strip("│ ").partition("│")[0] + "|" * line.count("│")
    return re.sub(r"[+-]?\d[\d,.:e+-]*( [KMG]iB)?|[━─┏┓┗┛┡┩└┘╇┻┳┃│]|\s", "", line)


def check_shown(command: Command, result: Result) -> None:
    """Each line that a page shows under a command is one that it printed; `...` stands for anything."""
    printed = [masked(line) for line in f"{result.out}\n{result.err}".splitlines()]
    for line in command.shown:
        pattern = re.escape(masked(line)).replace(r"\.\.\.", ".*")
        if masked(line) not in ("", "..."):
            assert any(re.fullmatch(pattern, text) for text in printed), f"{command.place}: {line}\n{result.out}{result.err}"


@pytest.mark.parametrize("page", RUN_PAGES, ids=[page.name for page in RUN_PAGES])
def test_every_command_of_a_page_runs_and_prints_what_is_shown(
    page: Path, models_dir: Path, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_stand_ins_of(page)
    prepare(tmp_path, page, models_dir, made)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    for command in commands(page):
        if not command.words[0].startswith("-") and not why_not_run(command.line):
            result = run(command)
            is_refusal = any("error (exit" in line or re.match(r"\S+\.yaml:\d+: ", line) for line in command.shown)
            assert (result.code == 0) != is_refusal, f"{command.place}: {command.line}\n{result.out}{result.err}"
            check_shown(command, result)


def test_every_command_line_is_read_by_the_program() -> None:
    program: Any = typer.main.get_command(app)
    for command in [command for page in PAGES for command in commands(page)]:
        name, *words = command.words
        if not name.startswith("-") and not command.place.startswith("extending.md"):
            assert name in program.commands, f"{command.place}: there is no command {name}"
            program.commands[name].make_context(name, list(words))  # raises where an option or a value is not known


def test_commands_within_sentences_have_options_that_there_are() -> None:
    program: Any = typer.main.get_command(app)
    for page in PAGES:
        for line in inline_commands(page):
            name, *words = re.findall(r"[\w.-]+", line)[1:]
            if name in program.commands:
                known = {option for parameter in program.commands[name].params for option in parameter.opts}
                unknown = {word for word in words if word.startswith("--")} - known
                assert not unknown, f"{page.name}: {line}"
            else:
                begins = any(whole.startswith(name) for whole in (*program.commands, "--"))
                assert begins or name.startswith("-"), f"{page.name}: {line}"


def test_every_exception_is_still_needed() -> None:
    lines = [command.line for page in RUN_PAGES for command in commands(page)]
    idle = [pattern for pattern in NOT_RUN if not any(fnmatchcase(line, pattern) for line in lines)]
    assert not idle
