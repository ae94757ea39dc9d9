"""The shipped recipes: what their headers say to run, and these commands with a few settings more."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from peftkit.recipe.yaml_file import read_yaml
from tests.real_configs import MODELS
from tests.runs import run_cli
from tests.stand_ins import put_stand_ins

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
# Options that share a run out among processes and machines.
LAYOUT = {"--processes", "--launch", "--num-machines", "--machine-rank", "--main-process-ip"}


def header_commands(recipe: Path) -> list[list[str]]:
    """The arguments of every peftkit command in the header of a recipe, in order: `# Title: peftkit ...    (remark)`."""
    lines = [line[1:] for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    found = re.findall(r"^ [\w -]+: +peftkit (.*)$", text, re.MULTILINE)
    return [shlex.split(re.split(r" {4,}\(", command)[0]) for command in found]


def model_of(recipe: Path) -> str:
    """The name of its model."""
    return str(read_yaml(recipe)[0]["model"]["name_or_path"])


def put_stand_ins_of(recipe: Path, model: str | None = None) -> None:
    """Put what a recipe and its header name on the hub where this process looks for it."""
    model = model or model_of(recipe)
    paths = re.findall(r"path: ([^\s,}]+)", recipe.read_text(encoding="utf-8"))
    put_stand_ins(Path(os.environ["HF_HOME"]), [model] if model in MODELS else [], paths)


def without(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """A command line without some options and their values."""
    places = {place + step for place, part in enumerate(arguments) if part in options for step in (0, 1)}
    return [part for place, part in enumerate(arguments) if place not in places]


def train(arguments: Sequence[str], settings: Sequence[str]) -> None:
    """`peftkit train ARGUMENTS` with settings, one of which is max_steps; it is certified; once for each output folder."""
    (steps,) = [setting for setting in settings if setting.startswith("training.max_steps=")]
    known = [re.sub("training.num_train_epochs=.*", steps, part) for part in arguments]
    further = [part for setting in settings if setting not in known for part in ("--set", setting)]
    if "--output" not in known:
        further += ["--output", f"runs/{Path(known[0]).stem}-1"]
    command = [*known, *further]
    if not Path(command[command.index("--output") + 1]).exists():
        result = run_cli("train", *command, "--json")
        assert result.code == 0, result.err
        assert result.json["certificate"]["passed"]
