"""How rows become token ids: what the recipe says, settled by what its training rows and its model are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from peftkit.errors import DataError, Problem, RecipeError
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.plan import Plan
from peftkit.recipe.rules import stated_encoding, states
from peftkit.recipe.schema import DataSection
from peftkit.tasks.base import labels_of
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.generations import metrics_of


class _Rows(Sequence[CanonicalRow]):
    """Rows without their places; none is held in memory."""

    def __init__(self, numbered: Sequence[tuple[str, CanonicalRow]]) -> None:
        self._numbered = numbered

    def __len__(self) -> int:
        return len(self._numbered)

    def __getitem__(self, place: Any) -> Any:
        found = self._numbered[place]
        return [row for _, row in found] if isinstance(place, slice) else found[1]


def settle_encoding(
    plan: Plan, rows: Sequence[tuple[str, CanonicalRow]], max_positions: int | None = None, model_kind: str | None = None
) -> Encoding:
    """How rows become token ids: what the recipe states, and what its training rows decide.

    Raises:
        RecipeError: a setting that the rows leave without effect, or that they do not fit.
        DataError: the rows do not go together.
    """
    recipe, task = plan.recipe, plan.task
    assert recipe.data is not None
    stated = stated_encoding(recipe, _max_length(recipe.data, max_positions))
    try:
        settled = task.settle(stated, _Rows(rows), model_kind)
    except RowError as error:
        raise DataError(str(error)) from error
    check_settled(plan, settled)
    return dataclasses.replace(settled, task_names=_task_names(plan, rows))


def check_settled(plan: Plan, settled: Encoding) -> None:
    """Refuse what the rows leave without effect.

    Raises:
        RecipeError: a setting that does not go with these rows.
    """
    recipe, task = plan.recipe, plan.task
    problems = [(key, why) for key, why in task.idle_keys(settled).items() if states(recipe, key)]
    metric, metrics = (
        recipe.training.metric_for_best_model,
        (
            *task.metrics_for(settled),
            *metrics_of(recipe.evaluation.generation_metrics),
        ),
    )
    if metric is not None and metric not in metrics:
        problems.append(
            ("training.metric_for_best_model", f"`{metric}` does not go with these rows; there are {', '.join(metrics)}")
        )
    if problems:
        raise RecipeError([Problem("", key, why) for key, why in problems])


def _task_names(plan: Plan, rows: Sequence[tuple[str, CanonicalRow]]) -> tuple[str, ...]:
    field = plan.method.num_tasks_field
    if not field:
        return ()
    names, limit = labels_of({row["task_id"] for _, row in rows}), getattr(plan.recipe.adapter, field)
    if len(names) > limit:
        what = f"is {limit}, but the training rows have {len(names)} tasks in `task_id`: {', '.join(names[:5])}"
        raise RecipeError([Problem("", f"adapter.{field}", what)])
    return names


def _max_length(data: DataSection, max_positions: int | None) -> int:
    if max_positions is None or data.max_length <= max_positions:
        return data.max_length
    if "max_length" in data.model_fields_set:
        what = f"is {data.max_length}, but the model takes at most {max_positions} tokens"
        raise RecipeError([Problem("", "data.max_length", what)])
    return max_positions
