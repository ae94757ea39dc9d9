"""Comparisons whose trials run in this process: starting one costs more than all of its steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.conftest import rows_of, write_jsonl
from tests.runs import run_cli, tiny_recipe


class Here:
    """A trial's process that runs when it is asked whether it has ended."""

    def __init__(self, arguments: Sequence[str], log_path: Path, slot: int, jobs: int) -> None:
        self.arguments, self.log_path = arguments, log_path

    def poll(self) -> int:
        """Train; the exit code."""
        _, *arguments = self.arguments
        result = run_cli(*arguments)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path.write_text(result.out + result.err, encoding="utf-8")
        return result.code


def ask_here(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of `peftkit.commands.survey_variants`, given in this process."""
    from peftkit.commands.survey_variants import answer

    answers: list[dict[str, Any]] = []
    for request in json.loads(json.dumps(requests)):
        answers.append(answer(request, answers))
    return answers


@contextmanager
def in_this_process() -> Iterator[None]:
    """Trials and surveys run here meanwhile."""
    with (
        patch("peftkit.comparison.trials.start_trial", Here),
        patch("peftkit.commands.experiment.ask", ask_here),
        patch("peftkit.comparison.trials.POLL_SECONDS", 0.0),
        patch("peftkit.commands.train.plan_memory", lambda *arguments: type("Plan", (), {"total": 1})),
    ):
        yield


def recipe_to_vary(models_dir: Path, folder: Path) -> Path:
    """A SEQ_CLS recipe of three steps on the tiny BERT, with validation and test rows."""
    held_out = {name: str(write_jsonl(folder / f"{name}.jsonl", rows_of("SEQ_CLS", 9))) for name in ("validation", "test")}
    adapter = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    training = {"max_steps": 3, "micro_batch_size": 8}
    return tiny_recipe("SEQ_CLS", models_dir, folder, adapter=adapter, data=held_out, training=training)


def compared(folder: Path) -> dict[str, Any]:
    """compare.json of a directory."""
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    return found
