"""Every shipped recipe trains, ends with a passed certificate, and what its header says to run runs.

The models are tiny stand-ins of the same architectures (tests/stand_ins.py), the rows of hub data sets a few with the same
columns; a recipe is changed by `--set` alone: two steps, and what these need.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import write_jsonl
from tests.real_configs import MODELS
from tests.recipes import LAYOUT, NAMES, RECIPES, ROOT, header_commands, model_of, put_stand_ins_of, train, without
from tests.runs import run_cli

EXTRA = {
    "causal_lm_bloomz_adalora": ["adapter.tinit=0", "adapter.tfinal=0"],  # neither of two steps is left out
    "causal_lm_qlora": ["training.optim=adamw_bnb_8bit"],  # pages need a GPU
}
EMBEDDED = "BAAI/bge-small-en-v1.5"  # in place of all-MiniLM-L6-v2, a model of the same architecture


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the one that the commands of the headers are typed in; runs stay from test to test."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("recipes", "configs"):
        (folder / name).symlink_to(ROOT / name)
    write_jsonl(folder / "texts.jsonl", [{"text": "my parcel is late"}])
    return folder


def train_shortly(arguments: list[str]) -> None:
    """`peftkit train RECIPE ...` for two steps on stand-ins, in one process however many it is for."""
    recipe = Path(arguments[0])
    settings = ["training.max_steps=2", "data.cache=false", *EXTRA.get(recipe.stem, [])]
    model = model_of(recipe)
    if model not in MODELS:
        model = EMBEDDED
        settings.append(f"model.name_or_path={EMBEDDED}")
    put_stand_ins_of(recipe, model)
    # Layouts are planned by tests/test_recipe_plans.py, and trained with by tests/engine/test_sharded.py.
    train(without(arguments, LAYOUT | {"--output"}) if LAYOUT & {*arguments} else arguments, settings)


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_shipped_recipe_trains_and_its_header_runs(recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command, *arguments in header_commands(recipe):
        if command == "train":
            train_shortly(arguments)
        else:
            named = [re.sub(r"^(runs/.*)-\.\.\.$", r"\1-1", argument) for argument in arguments]
            result = run_cli(command, *named)
            assert result.code == 0, f"{arguments}: {result.err}"
