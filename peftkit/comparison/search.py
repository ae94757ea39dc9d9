"""Optuna as the one who proposes settings: ranges from text, a study in SQLite that goes on where it was."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.comparison.file import parse_value
from peftkit.errors import Problem, RecipeError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

_SHAPES = "int:LOW:HIGH, float:LOW:HIGH (both with :log at the end where sizes matter more than steps) or choice:A|B|C"


def require_optuna() -> None:
    """Refuse a search where Optuna is not installed.

    Raises:
        RecipeError: it is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise RecipeError("--search: needs Optuna; `pip install optuna` (the extra `sweep`) adds it")


def ranges_of(search: Mapping[str, str]) -> dict[str, BaseDistribution]:
    """Key -> distribution.

    Raises:
        RecipeError: with every range that is none.
    """
    found, problems = {}, []
    for key, text in search.items():
        try:
            found[key] = _range(text)
        except ValueError as error:
            problems.append(Problem("--search", key, f"`{text}` is no range ({error}); a range is {_SHAPES}"))
    if problems:
        raise RecipeError(problems)
    return found


def example_of(search: Mapping[str, str]) -> dict[str, Any]:
    """The lowest (or first) value of every range."""
    from optuna.distributions import CategoricalDistribution

    ranges: dict[str, Any] = ranges_of(search)
    return {key: found.choices[0] if isinstance(found, CategoricalDistribution) else found.low for key, found in ranges.items()}


def _range(text: str) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind, _, rest = text.partition(":")
    if kind == "choice":
        return CategoricalDistribution([parse_value(part, "--search") for part in rest.split("|")])
    low, high, *log = rest.split(":")
    if log not in ([], ["log"]) or kind not in ("int", "float"):
        raise ValueError("unknown shape")
    if kind == "int":
        return IntDistribution(int(low), int(high), log=bool(log))
    return FloatDistribution(float(low), float(high), log=bool(log))


def open_study(root: Path, name: str, *, seed: int, greater_is_better: bool) -> Study:
    """The study of a directory, begun or gone on with: tree-structured Parzen estimator (Bergstra et al. 2011)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=f"sqlite:///{root.absolute() / 'study.db'}",
        study_name=name,
        sampler=optuna.samplers.TPESampler(seed=seed),
        direction="maximize" if greater_is_better else "minimize",
        load_if_exists=True,
    )


def unfinished(study: Study) -> list[Any]:
    """Trials that were proposed and have no outcome."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def tell(study: Study, number: int, value: float | None) -> None:
    """The outcome of a trial; None: it failed."""
    from optuna.trial import TrialState

    study.tell(number, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)


def propose(study: Study, ranges: dict[str, BaseDistribution]) -> Trial:
    """The next settings to try."""
    return study.ask(ranges)
