"""Tab in bash, zsh and fish: commands, options and values, by the scripts that `peftkit --show-completion` prints."""

from __future__ import annotations

import os
import pty
import resource
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [
    ("peftkit val", {"validate"}),
    ("peftkit train --resu", {"--resume"}),
    ("peftkit init --task TOK", {"TOKEN_CLS"}),
    ("peftkit init --task tok", {"token_cls"}),
    ("peftkit init --method loh", {"loha"}),
    ("peftkit compare recipes/one.yaml --methods loha,lok", {"loha,lokr"}),
    ("peftkit methods bott", {"bottleneck"}),
    ("peftkit explain training.batch", {"training.batch_size"}),
    ("peftkit export --target onnx,open", {"onnx,openvino"}),
    ("peftkit train rec", {"recipes/one.yaml", "recipes/two.yml"}),
    ("peftkit validate recipes/t", {"recipes/two.yml"}),
    ("peftkit diff recipes/one.yaml recipes/o", {"recipes/one.yaml"}),
]
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., str]:
    """Run a command in a folder with recipes, `peftkit` on the path, and the completion script of its shell in `script`."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "peftkit"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m peftkit "$@"\n')
    program.chmod(0o755)
    (tmp_path / "recipes").mkdir()
    for name in ("recipes/one.yaml", "recipes/two.yml", "recipes/notes.txt", "record.csv"):
        (tmp_path / name).write_text("")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
    }

    def run(name: str, code: str) -> str:
        (tmp_path / "script").write_text(called([str(program)], environment | {"_PEFTKIT_COMPLETE": f"source_{name}"}))
        return called([name, "-c", code], environment)

    def called(command: list[str], environment: dict[str, str]) -> str:
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    return run


def test_bash_completes_commands_options_and_values(shell: Callable[..., str]) -> None:
    asked = "\n".join(
        f'COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _peftkit_completion peftkit; echo "${{COMPREPLY[*]}}"'
        for line, _ in CASES
    )
    found = [set(line.split()) for line in shell("bash", f"source ./script; {asked}").splitlines()]
    assert found == [names for _, names in CASES]


@needs_fish
def test_fish_completes_commands_options_and_values(shell: Callable[..., str]) -> None:
    cases = CASES[:4] + CASES[-3:-2]  # fish asks twice for each
    asked = "; ".join(f"echo (complete -C '{line}' | string split -f 1 \\t)" for line, _ in cases)
    found = [set(line.split()) for line in shell("fish", f"source ./script; {asked}").splitlines()]
    assert found == [names for _, names in cases]


@needs_zsh
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("peftkit val", "peftkit validate "),
        ("peftkit methods bott", "peftkit methods bottleneck "),
        ("peftkit diff rec", "diff rec"),
    ],
)
def test_zsh_completes_what_is_typed(shell: Callable[..., str], tmp_path: Path, typed: str, completed: str) -> None:
    shell("zsh", "true")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.environ |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "TERM": "dumb", "PS1": "> "}
        os.execvp("zsh", ["zsh", "-f", "-i"])
    setup = "unsetopt zle_bracketed_paste; autoload -Uz compinit; compinit -u -D; source ./script; echo READY''NOW\n"
    os.write(terminal, setup.encode())
    assert "READYNOW" in _shown_until(terminal, "READYNOW")
    os.write(terminal, f"{typed}\t".encode())
    shown = _shown_until(terminal, completed)
    os.kill(process, 9)
    os.waitpid(process, 0)
    os.close(terminal)
    assert completed in shown


def _shown_until(terminal: int, wanted: str) -> str:
    shown, end = "", time.monotonic() + 20
    while wanted not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace")
    return shown


@pytest.mark.parametrize("line", ["peftkit tra", "peftkit init --method lo", "peftkit explain training.b"])
def test_completion_is_quick_and_loads_nothing_heavy(line: str) -> None:
    code = "import sys; from peftkit.cli import main\ntry: main()\nfinally: print(*{'torch', 'numpy', 'yaml'} & {*sys.modules})"
    words = line.split()
    environment = os.environ | {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_PEFTKIT_COMPLETE": "complete_bash"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert shown.startswith(words[-1])
    assert "torch" not in shown.splitlines()[-1]
    assert "numpy" not in shown.splitlines()[-1]
    assert seconds < 1.5, "CPU seconds on any machine; a third of that here"


def test_the_script_is_printed_for_the_shell_that_asks() -> None:
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m peftkit --show-completion; true'], capture_output=True, text=True, check=True
    )
    assert "complete -o default -F _peftkit_completion peftkit" in result.stdout
