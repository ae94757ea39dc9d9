"""What `plan` says of every shipped recipe on the real model: the table of docs/recipes.md, written by `UPDATE_DOCS=1`.

Models are their config.json on the meta device. Rows are those of the stand-ins, repeated and each stretched to
`data.max_length` tokens, so that memory does not depend on how many and how long they happen to be.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest

import peftkit.engine.survey
from peftkit.engine.data import Data
from peftkit.engine.examples import ExampleWriter
from peftkit.engine.fit import CONTEXT_BYTES, HOLES, gpu_of
from peftkit.plan import Hardware
from peftkit.tasks.example import IGNORE_INDEX, Example
from tests.real_configs import MODELS
from tests.recipes import NAMES, RECIPES, ROOT, header_commands, model_of, put_stand_ins_of, train
from tests.runs import run_cli
from tests.stand_ins import REAL_SIZE

DOCS = ROOT / "docs" / "recipes.md"
ROWS = 64  # as many as the largest batch
GPU_GIB = (24, 80)
GPU = Hardware("cuda", "a GPU", supports_bf16=True, memory_bytes=80 * 2**30)
# What recipes build on is made for the real model by one step: of all-MiniLM-L6-v2, and of one layer as wide as flan-t5-base.
ONE_STEP = {
    "quickstart": [
        "data.train={path: data/support_desk/train.jsonl, max_rows: 16}", "data.validation=null", "data.test=null",
        "training.metric_for_best_model=null", "training.eval_on_start=false", "training.max_steps=1",
    ],
    "seq_2_seq_multitask_prompts": [
        "model.init=random", "model.config_overrides={num_layers: 1, num_decoder_layers: 1, vocab_size: 4000}",
        f"model.revision={REAL_SIZE}", "evaluation.generation_metrics=[]", "training.max_steps=1",
    ],
}  # fmt: skip


def longest(example: Example, length: int) -> Example:
    """The example with every sequence made so many tokens long, and nothing more to learn."""
    inputs = {name: _longer(value, length) for name, value in example.inputs.items()}
    if example.labels != [] and isinstance(example.labels, list) and len(example.labels) == example.length:
        missing = length - len(example.labels)
        return dataclasses.replace(example, inputs=inputs, labels=example.labels + [IGNORE_INDEX] * missing)
    return dataclasses.replace(example, inputs=inputs)


def _longer(values: list[Any], length: int) -> list[Any]:
    if isinstance(values[0], list):
        return [_longer(part, length) for part in values]
    return values + values[-1:] * (length - len(values))


@pytest.fixture
def stretched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training rows of the longest length."""
    load_data = peftkit.engine.survey.load_data

    def load(*arguments: Any, **options: Any) -> Data:
        data = load_data(*arguments, **options)
        writer = ExampleWriter(tmp_path / "stretched")
        for number in range(max(len(data.sample), ROWS)):
            writer.add(longest(data.sample[number % len(data.sample)], data.encoding.max_length))
        return dataclasses.replace(data, train=writer.finish())

    monkeypatch.setattr(peftkit.engine.survey, "load_data", load)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that commands are typed in."""
    folder = tmp_path_factory.mktemp("real")
    for name in ("recipes", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def in_real_size(recipe: Path) -> list[str]:
    """What makes a recipe one of the real model, and its stand-ins and adapters, made where they are missing."""
    for command, *arguments in header_commands(recipe):
        path = Path(arguments[0])
        if command == "train" and path.name != recipe.name:
            put_stand_ins_of(path)
            train(arguments, ONE_STEP[path.stem])
    put_stand_ins_of(recipe)
    # The embedded model is its real self.
    return ["--set", "data.cache=false", *(["--set", f"model.revision={REAL_SIZE}"] if model_of(recipe) in MODELS else [])]


def plan_for(gib: float, recipe: Path, *arguments: str) -> dict[str, Any]:
    """What `plan` says on a GPU of so much memory, with `needed`: its bytes, CUDA's context and holes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftkit.commands.plan.detect_hardware", lambda: gpu_of(gib, GPU))
        result = run_cli("plan", recipe, "--json", *arguments)
    assert result.code == 0, result.err
    planned: dict[str, Any] = result.json
    return planned | {"needed": planned["memory_bytes"]["total"] * HOLES + CONTEXT_BYTES}


def table_row(recipe: Path) -> str:
    """The recipe's line of the table, by `plan` for the smallest of the GPUs that it fits."""
    settings = in_real_size(recipe)
    gib, planned = next((gib, found) for gib in GPU_GIB if (found := plan_for(gib, recipe, *settings))["needed"] <= gib * 2**30)
    rows = re.search(r"largest pass: (\d+ x \d+) tokens", planned["memory_from"])
    assert rows
    cells = [
        f"[`{recipe.stem}`](../recipes/{recipe.name})", model_of(recipe), f"`{planned['method']}`", planned["task"],
        f"{planned['trainable_params']:,}", f"{planned['all_params']:,}", rows[1],
        f"{planned['needed'] / 2**30:.1f} of {gib}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


@pytest.mark.usefixtures("stretched")
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_the_table_of_recipes_says_what_the_plan_says(recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    row, text = table_row(recipe), DOCS.read_text(encoding="utf-8")
    if os.environ.get("UPDATE_DOCS"):
        text = re.sub(rf"^\| \[`{recipe.stem}`\].*$", lambda _: row, text, flags=re.MULTILINE)
        DOCS.write_text(text, encoding="utf-8")
    assert row in text.splitlines(), f"run it with UPDATE_DOCS=1; the line begins with | [`{recipe.stem}`]"


def test_the_table_has_the_shipped_recipes_alone() -> None:
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", DOCS.read_text(encoding="utf-8"), re.MULTILINE)) == NAMES


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_eight_gpus_take_a_recipe_as_it_is(recipe: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    planned = plan_for(80, recipe, "--processes", "8", *in_real_size(recipe))
    assert planned["problems"] == []
    assert planned["needed"] <= 80 * 2**30


LAID_OUT = [
    arguments
    for path in RECIPES
    for command, *arguments in header_commands(path)
    if command == "train" and {"--processes", "--launch"} & {*arguments} and "--num-machines" not in arguments
]


@pytest.mark.parametrize("arguments", LAID_OUT, ids=[" ".join(arguments[1:]) for arguments in LAID_OUT])
def test_a_layout_in_a_header_fits_the_gpus_that_it_names(
    arguments: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    recipe, *layout = arguments
    (gib,) = re.findall(r"^# Needs: .*GPUs with (\d+) GB", Path(recipe).read_text(encoding="utf-8"), re.MULTILINE)
    assert plan_for(int(gib), Path(recipe), *layout, *in_real_size(Path(recipe)))["needed"] <= int(gib) * 2**30
