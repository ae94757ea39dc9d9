"""EleutherAI's lm-evaluation-harness on a loaded adapter and on its base."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.engine.loaded import LoadedAdapter, without_adapter
from peftkit.errors import DataError, RecipeError

NUM_RESAMPLES = 1000  # of the harness's own bootstrap, for metrics whose error has no formula


def require_harness(tasks: Sequence[str], include: Path | None) -> None:
    """Refuse tasks that the harness does not know, before a model is loaded.

    Raises:
        RecipeError: it is not installed, or does not know a task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("--harness: lm-eval is not installed; `pip install 'peftkit[harness]'` adds it")
    if include is not None and not include.is_dir():
        raise RecipeError(f"--harness-include {include}: there is no such folder")
    manager = _task_manager(include)
    for name in tasks:
        if not manager.match_tasks([name]):
            close = [known for known in manager.all_tasks if name.lower() in known.lower()][:5]
            near = f"; those with this in their name: {', '.join(close)}" if close else ""
            raise RecipeError(f"--harness: the harness knows no task `{name}`{near}; --harness-include names a folder of more")


def run_harness(loaded: LoadedAdapter, tasks: Sequence[str], include: Path | None, batch_size: int) -> dict[str, Any]:
    """The harness's figures: task -> metric -> `adapter`, `base` and the standard error of the adapter's.

    Raises:
        DataError: the rows of a task cannot be had.
    """
    adapter = _figures(loaded, tasks, include, batch_size)
    with without_adapter(loaded) as bare:
        base = _figures(bare, tasks, include, batch_size)
    return {
        task: {
            name: {"adapter": value, "base": base[task][name], "stderr": figures.get(f"{name}_stderr")}
            for name, value in figures.items()
            if not name.endswith("_stderr")
        }
        for task, figures in adapter.items()
    }


def _figures(loaded: LoadedAdapter, tasks: Sequence[str], include: Path | None, batch_size: int) -> dict[str, dict[str, float]]:
    """Task -> metric (with the filter that it is taken behind, where there are several) -> number."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    backend = "seq2seq" if loaded.model.config.is_encoder_decoder else "causal"  # type: ignore[union-attr]
    model: Any = HFLM(pretrained=loaded.model, tokenizer=loaded.runtime.tokenizer, backend=backend, batch_size=batch_size)
    try:
        with loaded.inference(), contextlib.redirect_stdout(None):
            found = simple_evaluate(
                model, tasks=list(tasks), task_manager=_task_manager(include), bootstrap_iters=NUM_RESAMPLES, log_samples=False
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--harness {','.join(tasks)}: the harness could not run: {type(error).__name__}: {error}") from error
    return {task: _numbers(figures) for task, figures in found["results"].items()}


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in figures.items() if "," in name and isinstance(value, int | float)}
    return {name.replace(",none", "").replace(",", "/"): float(value) for name, value in numbers.items()}


def _task_manager(include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include))
