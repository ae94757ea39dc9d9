"""Evaluating a split while training: metrics, answers to its prompts where they are asked for, and what is written of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from peftkit.engine.compiled import uncompiled
from peftkit.engine.data import Data
from peftkit.engine.evaluate import flat_metrics, score_examples, write_evaluation
from peftkit.engine.facts import facts_of
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.model import base_of
from peftkit.engine.prepare import Model
from peftkit.engine.questions import Question, answer_questions, questions_of
from peftkit.plan import Plan
from peftkit.recipe.generation_rules import answer_settings
from peftkit.tasks.generations_torch import AnswerScorer
from peftkit.worker import beat

if TYPE_CHECKING:
    from peftkit.engine.trainer import Trainer


def held_out_questions(plan: Plan, model: Model, data: Data) -> dict[str, list[Question]]:
    """The prompts of each split that are answered in training; none where the recipe asks for no answers.

    Raises:
        DataError: naming rows whose answers cannot be compared.
    """
    evaluation, settings = plan.recipe.evaluation, answer_settings(plan.recipe)
    if not settings.metrics and not evaluation.samples:
        return {}
    scorer, found = AnswerScorer(settings), {}
    most = min(evaluation.generation_rows or sys.maxsize, evaluation.max_rows or sys.maxsize) if settings.metrics else 0
    encoding = data.encoding.for_prompts(model.max_positions)
    for split in data.held_out:
        rows = data.held_out_rows(split)[: max(most, evaluation.samples)]
        found[split] = questions_of(rows, plan.task.runtime(model.tokenizer, encoding), split, scorer)
    return found


def evaluate_split(trainer: Trainer, split: str, *, generates: bool) -> dict[str, Any]:
    """Metrics of a split with the weights that are in the model, written down.

    Args:
        trainer: the run.
        split: its name.
        generates: whether the recipe's `generation_metrics` are wanted too.
    """
    settings, run = trainer.plan.recipe.evaluation, trainer.run
    beat(f"evaluation of {split} after step {trainer.weights_step}")
    with trainer.accelerator.autocast():
        results = score_examples(
            trainer.step,
            trainer.data.held_out[split][: settings.max_rows],
            batch_size=settings.batch_size,
            device=trainer.accelerator.device,
            call=trainer.wrapped,
        )
    metrics = trainer.runtime.summarise(results)
    scorer = AnswerScorer(answer_settings(trainer.plan.recipe))
    answers, num_measured = _answers(trainer, split, scorer, generates=generates)
    metrics |= scorer.summarise(answers[:num_measured]) if num_measured else {}
    numbers = flat_metrics(metrics)
    line = {"step": trainer.weights_step, "split": split, "metrics": numbers}
    if trainer.accelerator.is_main_process:
        run.append_metrics(line)
        samples = [{name: answer[name] for name in ("row", "prompt", "reference", "prediction")} for answer in answers]
        if settings.samples:
            run.append_metrics({"step": trainer.weights_step, "split": split, "samples": samples[: settings.samples]})
        write_evaluation(run, split, metrics, results, answers=answers[:num_measured], signatures=scorer.signatures)
    trainer.accelerator.log({f"{split}/{name}": value for name, value in numbers.items()}, step=trainer.progress.step)
    trainer.reporter.evaluation(line)
    return metrics


def _answers(trainer: Trainer, split: str, scorer: AnswerScorer, *, generates: bool) -> tuple[list[dict[str, Any]], int]:
    """Answers to a split's prompts, and how many of them are measured; the rest are samples."""
    settings, questions = trainer.plan.recipe.evaluation, trainer.questions.get(split, [])
    num_measured = len(questions[: settings.generation_rows]) if generates and scorer.settings.metrics else 0
    asked = questions[: max(num_measured, settings.samples)]
    if not asked:
        return [], 0
    was_training = trainer.step.training
    trainer.step.eval()
    with uncompiled(trainer.model):  # every length would be compiled anew
        place = f"answers to {split} after step {trainer.weights_step}"
        answers = answer_questions(_as_loaded(trainer), asked, scorer, settings.batch_size, lambda done: beat(place))
    trainer.step.train(was_training)
    return answers, num_measured


def _as_loaded(trainer: Trainer) -> LoadedAdapter:
    """The model in training as one that answers."""
    plan, data = trainer.plan, trainer.data
    facts = facts_of(plan, base_of(plan).path, data.encoding, data.formats[0])
    return LoadedAdapter(trainer.run.adapter_dir, facts, trainer.model, trainer.runtime, trainer.accelerator.device)
