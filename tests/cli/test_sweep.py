"""`peftkit sweep`: grids and searches, judged on validation rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkit.recipe import load_recipe
from tests.comparing import compared, in_this_process, recipe_to_vary
from tests.runs import run_cli


@pytest.fixture(scope="module")
def recipe(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe to vary."""
    return recipe_to_vary(models_dir, tmp_path_factory.mktemp("swept"))


def test_a_grid_tries_every_combination_and_writes_the_best_recipe(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with in_this_process():
        result = run_cli(
            "sweep", recipe, "--grid", "training.learning_rate=1e-6,0.1", "--grid", "adapter.r=2", "--metric", "loss",
            "--output", folder,
        )  # fmt: skip
    assert result.code == 0, result.err
    found = compared(folder)
    assert [variant["overrides"] for variant in found["variants"]] == [
        {"training.learning_rate": rate, "adapter.r": r} for rate in (1e-6, 0.1) for r in (2,)
    ]
    assert (found["kind"], found["split"], found["greater_is_better"]) == ("sweep", "validation", False)
    best = min(found["variants"], key=lambda variant: variant["summary"]["loss"]["mean"])
    assert found["best"]["variant"] == best["name"]
    chosen = load_recipe(folder / "best.yaml").recipe
    assert (chosen.training.learning_rate, chosen.adapter.r) == tuple(best["overrides"].values())
    assert "validation rows choose" in result.out
    assert "test accuracy" in result.out


def test_a_search_goes_on_in_its_study_where_it_was(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ranges = ("--search", "adapter.r=int:2:8:log", "--search", "training.learning_rate=float:1e-5:1e-1:log")
    arguments = ("sweep", recipe, *ranges, "--trials", "3", "--output", folder)
    with in_this_process(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftkit.commands.sweep.tell", _stop_at_second(2))
        assert run_cli(*arguments).code == 130
        patch.undo()
    with in_this_process():
        result = run_cli("sweep", folder, "--resume")
    assert result.code == 0, result.err
    import optuna

    (study,) = optuna.get_all_study_summaries(f"sqlite:///{folder / 'study.db'}")
    assert study.n_trials == len(compared(folder)["variants"]) == 3
    assert [variant["trials"][0]["state"] for variant in compared(folder)["variants"]] == ["done"] * 3


def _stop_at_second(number: int):  # type: ignore[no-untyped-def]
    from peftkit.comparison.search import tell

    calls = []

    def stop(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        tell(*arguments)  # type: ignore[arg-type]

    return stop


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either a grid"),
        (("--grid", "adapter.r=2", "--search", "adapter.r=int:1:2"), "either a grid"),
        (("--grid", "adapter.rr=2"), "variant `000_rr-2`: adapter.rr: no such key"),
        (("--grid", "adapter.r"), "takes KEY=VALUES"),
        (("--search", "adapter.r=whole:1:2"), "a range is int:LOW:HIGH"),
        (("--search", "adapter.r=int:8:2"), "`int:8:2` is no range"),
        (("--grid", "adapter.r=2,4", "--trials", "3"), "has no effect on a grid"),
        (("--search", "adapter.r=int:1:2", "--budget", "tokens", "9"), "a search is given steps"),
        (("--grid", "training.max_steps=2,4", "--budget", "steps", "9"), "has no effect beside the budget"),
        (("--search", "adapter.rr=int:1:2"), "variant `lowest`: adapter.rr: no such key"),
        (("--grid", "training.seed=2,4"), "`training.seed` is decided by seeds"),
    ],
)
def test_what_cannot_be_swept_is_refused(recipe: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run_cli("sweep", recipe, *arguments, "--output", tmp_path / "out")
    assert (result.code, words in result.err) == (2, True), result.err


def test_a_sweep_without_validation_rows_is_refused(recipe: Path) -> None:
    result = run_cli("sweep", recipe, "--grid", "adapter.r=2,4", "--set", "data.validation=null")
    assert (result.code, "a sweep chooses by validation rows" in result.err) == (2, True), result.err
