"""A loaded model measured on rows: alone, or an adapter beside its base on the same ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.evaluate import score_examples
from peftkit.engine.fast import proven_head
from peftkit.engine.loaded import LoadedAdapter, is_switchable, without_adapter
from peftkit.engine.modules import head_modules
from peftkit.engine.paired import changes, differences, summary_of
from peftkit.engine.questions import Question, answer_questions
from peftkit.engine.step import Step
from peftkit.tasks.example import Example
from peftkit.tasks.generations_torch import AnswerScorer

# What a task says of a row, where it is short enough to stand beside what another model says.
_SAID = ("label", "prediction", "answers", "similarity")


@dataclass(frozen=True)
class Rows:
    """What models are measured on.

    Attributes:
        examples: rows with their targets.
        questions: prompts to answer.
        scorer: compares the answers.
        batch_size: rows per pass.
        on_batch: told how many rows are done.
    """

    examples: Sequence[Example]
    questions: Sequence[Question]
    scorer: AnswerScorer
    batch_size: int
    on_batch: Callable[[int], None] = lambda done: None

    def __len__(self) -> int:
        return len(self.examples) + len(self.questions)


@dataclass(frozen=True)
class Measured:
    """What came of it: metrics, one result per example, and one per question."""

    metrics: dict[str, Any]
    results: list[dict[str, Any]]
    answers: list[dict[str, Any]]


def measure(loaded: LoadedAdapter, rows: Rows) -> Measured:
    """Metrics of a model on rows."""
    facts, examples = loaded.facts, rows.examples
    with loaded.inference():
        head = None
        if loaded.task.learns_tokens:
            head = proven_head(loaded.model, loaded.runtime, list(examples), facts.mixed_precision, facts.dtype)
        step = Step(loaded.model, loaded.runtime, head)
        results = score_examples(step, examples, batch_size=rows.batch_size, device=loaded.device, on_batch=rows.on_batch)
        answers = answer_questions(loaded, rows.questions, rows.scorer, rows.batch_size, rows.on_batch)
    metrics = loaded.runtime.summarise(results) | (rows.scorer.summarise(answers) if answers else {})
    return Measured(metrics, results, answers)


def compare_with_base(loaded: LoadedAdapter, rows: Rows, adapter: Measured) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The base model on the same rows: what `evaluate --compare-base` adds to its result, and a line for every row.

    Args:
        loaded: the adapter.
        rows: the rows.
        adapter: what it made of them.
    """
    if not is_switchable(loaded):  # a model that never heard of tasks
        rows = dataclasses.replace(rows, examples=_without_tasks(rows.examples), questions=_questions_without_tasks(rows))
    with without_adapter(loaded) as bare:
        base = measure(bare, rows)
        untrained = _untrained_head(bare)
    runtime, (name, more_is_better) = loaded.runtime, loaded.runtime.row_figure
    found = _differences(adapter.results, base.results, runtime, loaded.facts.seed)
    found |= _differences(adapter.answers, base.answers, rows.scorer, loaded.facts.seed) if base.answers else {}
    figures = (runtime.row_figures(results) for results in (adapter.results, base.results))
    origins = [result["row"] for result in adapter.results]
    lines = _lines(changes(origins, *figures, more_is_better=more_is_better), adapter, base)
    result = {"base_metrics": base.metrics, "differences": found, "row_figure": name, **summary_of(lines)}
    if untrained:
        result["untrained_base_head"] = untrained
    return result, lines


def _differences(adapter: list[Any], base: list[Any], source: Any, seed: int) -> dict[str, Any]:
    return differences(source.resampler(adapter), source.resampler(base), len(adapter), seed)


def _untrained_head(bare: LoadedAdapter) -> list[str]:
    """Modules of the base's head that its checkpoint has no weights for: its answers are those of random numbers."""
    base: Any = base_of_adapted(bare.model)
    heads = head_modules(base, bare.task) if bare.task.has_head else []
    return [head for head in heads if any(f".{head}." in f".{name}" for name in bare.missing)]


def _without_tasks(examples: Sequence[Example]) -> list[Example]:
    return [dataclasses.replace(example, task_id=None) for example in examples]


def _questions_without_tasks(rows: Rows) -> list[Question]:
    return [dataclasses.replace(asked, example=_without_tasks([asked.example])[0]) for asked in rows.questions]


def _lines(changed: list[dict[str, Any]], adapter: Measured, base: Measured) -> list[dict[str, Any]]:
    """Every row's change, with what both models say of it."""
    lines = []
    for line, mine, theirs in zip(changed, adapter.results, base.results, strict=True):
        said = {name: mine[name] for name in _SAID if name in mine}
        said |= {f"base_{name}": theirs[name] for name in ("prediction", "similarity") if name in theirs}
        said |= {"loss_change": theirs["loss_sum"] - mine["loss_sum"]} if "loss_sum" in mine else {}
        lines.append(line | said)
    generated = {answer["row"]: (answer, other) for answer, other in zip(adapter.answers, base.answers, strict=True)}
    for line in lines:
        if line["row"] in generated:
            mine, theirs = generated[line["row"]]
            line |= {"reference": mine["reference"], "generated": mine["prediction"], "base_generated": theirs["prediction"]}
    return lines
