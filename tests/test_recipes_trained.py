"""Every shipped recipe trains, ends with a passed certificate, and what its header says to run afterwards runs.

The models are tiny stand-ins of the same architectures (tests/stand_ins.py), the rows of hub data sets a few with the same
columns; a recipe is changed by `--set` alone: two steps, and what these need.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

import pytest

from peftkit.recipe.yaml_file import read_yaml
from tests.conftest import write_jsonl
from tests.real_configs import MODELS
from tests.runs import run_cli
from tests.stand_ins import put_stand_ins

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHORT = ["training.max_steps=2", "data.cache=false"]
EXTRA = {
    "causal_lm_bloomz_adalora": ["adapter.tinit=0", "adapter.tfinal=0"],  # none of two steps is left out
    "causal_lm_qlora": ["training.optim=adamw_bnb_8bit"],  # pages need a GPU
}
EMBEDDED = "BAAI/bge-small-en-v1.5"  # in place of all-MiniLM-L6-v2, a model of the same architecture
# How processes and machines share a run is planned by tests/test_recipe_plans.py, and trained by tests/engine/test_sharded.py.
LAYOUT = {"--processes", "--launch", "--num-machines", "--machine-rank", "--main-process-ip"}


def header_commands(recipe: Path) -> list[list[str]]:
    """The arguments of every peftkit command in the header of a recipe, in order."""
    lines = [line[1:] for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    found = re.findall(r"^ [\w -]+: +peftkit (.*)$", text, re.MULTILINE)
    return [shlex.split(re.split(r" {4,}\(", command)[0]) for command in found]


def paths_in(recipe: Path) -> list[str]:
    """Paths, hub ids among them, of the sources of a recipe, and of those that its header puts in their place."""
    return re.findall(r"path: ([^\s,}]+)", recipe.read_text(encoding="utf-8"))


def without_options(arguments: list[str], names: Collection[str]) -> list[str]:
    """A command line without some options and their values."""
    places = {place + step for place, part in enumerate(arguments) if part in names for step in (0, 1)}
    return [part for place, part in enumerate(arguments) if place not in places]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the one that the commands of the headers are typed in; runs stay from test to test."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("recipes", "configs"):
        (folder / name).symlink_to(ROOT / name)
    write_jsonl(folder / "texts.jsonl", [{"text": "my parcel is late"}])
    return folder


def train(arguments: list[str]) -> None:
    """`peftkit train RECIPE ...` for two steps on stand-ins, with a certificate; once for each output folder."""
    recipe, rest = Path(arguments[0]), [re.sub("num_train_epochs=.*", "max_steps=2", part) for part in arguments[1:]]
    name = read_yaml(recipe)[0]["model"]["name_or_path"]
    if name not in MODELS:
        name, rest = EMBEDDED, [*rest, "--set", f"model.name_or_path={EMBEDDED}"]
    put_stand_ins(Path(os.environ["HF_HOME"]), [name], paths_in(recipe))
    output = rest[rest.index("--output") + 1] if "--output" in rest else f"runs/{recipe.stem}-1"
    if Path(output).exists():
        return
    for setting in SHORT + EXTRA.get(recipe.stem, []):
        rest += ["--set", setting] if setting not in rest else []
    result = run_cli("train", recipe, *rest, "--json", *([] if "--output" in rest else ["--output", output]))
    assert result.code == 0, result.err
    assert result.json["certificate"]["passed"]


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_shipped_recipe_trains_and_its_header_runs(recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command, *arguments in header_commands(recipe):
        if command == "train":
            train(without_options(arguments, LAYOUT | {"--output"}) if LAYOUT & {*arguments} else arguments)
        else:
            named = [re.sub(r"^(runs/.*)-\.\.\.$", r"\1-1", argument) for argument in arguments]
            result = run_cli(command, *named)
            assert result.code == 0, f"{arguments}: {result.err}"
