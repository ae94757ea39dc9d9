"""`peftkit evaluate`: metrics and predictions of a trained adapter, alone or beside its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftkit import console
from peftkit.adapters import adapter_folder
from peftkit.engine.audit import identify
from peftkit.engine.data import encode_rows
from peftkit.engine.evaluate import evaluation_lines, write_evaluation
from peftkit.engine.facts import AdapterFacts, read_facts
from peftkit.engine.forgetting import Texts, measure_forgetting, read_texts
from peftkit.engine.guard import answering_remedies, explain_exhaustion, memory_text
from peftkit.engine.harness import require_harness, run_harness
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.measure import Measured, Rows, compare_with_base, measure
from peftkit.engine.prepare import same_row, split_rows
from peftkit.engine.questions import questions_of
from peftkit.engine.rows import Row, RowReader
from peftkit.engine.scoring import rows_of_file
from peftkit.errors import RecipeError
from peftkit.recipe.generation_rules import answer_settings, check_answer_settings
from peftkit.recipe.schema import Recipe, SourceSection
from peftkit.run import Run, require_place, write_json, write_text
from peftkit.tasks import TASKS
from peftkit.tasks.chat import freeze_date
from peftkit.tasks.generations import GENERATION_METRICS, AnswerSettings
from peftkit.tasks.generations_torch import AnswerScorer

SPLITS = ("test", "validation")
_SAID = ("label", "base_prediction", "prediction")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        path: run directory or adapter folder.
        data: rows to evaluate on; None: the run's own.
        base: base model, where the one that the adapter names cannot be found.
        predictions: one more file for the predictions.
        batch_size: rows per pass.
        max_rows: use only the first rows.
        generation_metrics: names of metrics of generated answers; None: those of the run's recipe.
        answer_pattern: for the metric `answer`; None: that of the run's recipe.
        compare_base: whether the base is measured too.
        forgetting: texts to measure forgetting on.
        harness: tasks of lm-evaluation-harness.
        harness_include: folder of further ones.
    """

    path: Path
    data: Path | None = None
    base: str | None = None
    predictions: Path | None = None
    batch_size: int = 16
    max_rows: int | None = None
    generation_metrics: tuple[str, ...] | None = None
    answer_pattern: str | None = None
    compare_base: bool = False
    forgetting: Path | None = None
    harness: tuple[str, ...] = ()
    harness_include: Path | None = None


@dataclass(frozen=True)
class _Checked:
    """What is known of a request before a weight is loaded.

    Attributes:
        own: the run's own split, where no rows are named.
        answers: what of generated answers is measured.
        generation_rows: how many prompts are answered; None: all.
        texts: what forgetting is measured on.
        wants_rows: whether metrics are asked for: not where an adapter folder is only given to the harness or for forgetting.
    """

    own: _OwnSplit | None
    answers: AnswerSettings
    generation_rows: int | None
    texts: Texts
    wants_rows: bool


def evaluate(asked: Request) -> dict[str, Any]:
    """Evaluate on the rows that are named, or on the run's own test (or validation) rows; returns what `--json` prints."""
    if asked.predictions is not None:
        require_place(asked.predictions, "--predictions")
    told = f"with --batch-size {asked.batch_size}"
    with explain_exhaustion(lambda: memory_text(told, answering_remedies(asked.batch_size))):
        checked = _check(asked)
        loaded = load_adapter(asked.path, asked.base)
        result = _evaluate_rows(asked, checked, loaded) if checked.wants_rows else {"metrics": {}, "num_rows": 0}
        if checked.texts:
            result["forgetting"] = measure_forgetting(loaded, checked.texts, asked.batch_size)
        if asked.harness:
            result["harness"] = run_harness(loaded, asked.harness, asked.harness_include, asked.batch_size)
        return result


def _check(asked: Request) -> _Checked:
    """Find what is wrong with a request before its model is loaded.

    Raises:
        RecipeError, DataError, LoadError: what would stop it later.
    """
    facts = read_facts(adapter_folder(asked.path), asked.base)
    _require_text(asked, facts)
    settings, generation_rows = _answer_settings(asked)
    if problems := list(check_answer_settings(settings)):
        raise RecipeError("\n".join(f"--{key.replace('_', '-')}: {what}" for key, what in problems))
    if asked.harness:
        require_harness(asked.harness, asked.harness_include)
    elif asked.harness_include is not None:
        raise RecipeError("--harness-include: has no effect without --harness")
    texts = read_texts(asked.forgetting) if asked.forgetting is not None else ()
    is_run = (asked.path / "resolved.yaml").is_file()
    wants_rows = is_run or asked.data is not None or asked.compare_base or not (texts or asked.harness)
    own = _own_split(asked.path) if asked.data is None and wants_rows else None
    return _Checked(own, settings, generation_rows, texts, wants_rows)


def _require_text(asked: Request, facts: AdapterFacts) -> None:
    """Refuse options about text that is written, for a task that writes none."""
    if facts.task not in TASKS or TASKS[facts.task].generates:
        return
    stated = {
        "--generation-metrics": asked.generation_metrics,
        "--answer-pattern": asked.answer_pattern,
        "--harness": asked.harness,
    }
    writing = ", ".join(name for name, task in TASKS.items() if task.generates)
    for option, value in stated.items():
        if value:
            raise RecipeError(f"{option}: no effect: this adapter is for {facts.task}, and only {writing} write text")


def _answer_settings(asked: Request) -> tuple[AnswerSettings, int | None]:
    """What of generated answers is measured, and how many prompts are answered: as asked, else as the run's recipe says."""
    stated, rows = AnswerSettings(), None
    if (asked.path / "resolved.yaml").is_file():
        recipe = _recipe_of(asked.path)
        stated, rows = answer_settings(recipe), recipe.evaluation.generation_rows
    metrics = stated.metrics if asked.generation_metrics is None else asked.generation_metrics
    if unknown := [name for name in metrics if name not in GENERATION_METRICS]:
        raise RecipeError(f"--generation-metrics: there is no `{unknown[0]}`; there are {', '.join(GENERATION_METRICS)}")
    pattern = asked.answer_pattern or (stated.answer_pattern if "answer" in metrics else None)
    tokenize = stated.bleu_tokenize if "bleu" in metrics else "13a"
    triples = (stated.triple_format, stated.triple_keys) if "triples" in metrics else ()
    return AnswerSettings(metrics, pattern, tokenize, *triples), rows


def _recipe_of(path: Path) -> Recipe:
    return Recipe.model_validate(yaml.safe_load((path / "resolved.yaml").read_text(encoding="utf-8")))


def _evaluate_rows(asked: Request, checked: _Checked, loaded: LoadedAdapter) -> dict[str, Any]:
    """Metrics on the rows, written down; with `--compare-base` beside those of the base."""
    if asked.data is not None:
        split, rows = "data", rows_of_file(loaded.facts, asked.data)
    else:
        assert checked.own is not None
        split, rows = checked.own.rows(loaded)
    prepared = _prepare(asked, checked, loaded, split, rows[: asked.max_rows])
    with console.progress(len(prepared) * (1 + asked.compare_base), "evaluating") as advance:
        told = Rows(prepared.examples, prepared.questions, prepared.scorer, asked.batch_size, advance)
        found = measure(loaded, told)
        compared, lines = compare_with_base(loaded, told, found) if asked.compare_base else ({}, [])
    result = {"metrics": found.metrics, "num_rows": len(found.results), "split": split}
    if found.answers:
        result["num_generated"] = len(found.answers)
    _write(asked, found, split if asked.data is None else asked.data.stem, prepared.scorer, result | compared, lines)
    return result | compared


def _prepare(asked: Request, checked: _Checked, loaded: LoadedAdapter, split: str, rows: list[Row]) -> Rows:
    """Rows as examples and, where answers are measured, as questions."""
    freeze_date(loaded.runtime.tokenizer, loaded.runtime.settings.template_date)
    examples = encode_rows(loaded.runtime, rows, split, drops=checked.own is not None and checked.own.drops)
    scorer, questions = AnswerScorer(checked.answers), []
    if checked.answers.metrics:
        kept = {example.origin for example in examples}
        asked_rows = [row for row in rows if row[0] in kept][: checked.generation_rows]
        questions = questions_of(asked_rows, loaded.prompts, split, scorer)
    return Rows(examples, questions, scorer, asked.batch_size)


def _write(
    asked: Request, found: Measured, name: str, scorer: AnswerScorer, result: Mapping[str, Any], lines: list[dict[str, Any]]
) -> None:
    """Into the run directory, where there is one, and where `--predictions` says."""
    if (asked.path / "resolved.yaml").is_file():
        run = Run(asked.path)
        write_evaluation(run, name, found.metrics, found.results, found.answers, scorer.signatures)
        written = [*run.evaluation_paths(name), *([run.generations_path(name)] if found.answers else [])]
        if lines:
            whole, by_row = run.comparison_paths(name)
            write_json(whole, dict(result))
            write_text(by_row, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            written += [whole, by_row]
        console.print_note(f"written: {', '.join(map(str, written))}")
    if asked.predictions is not None:
        write_text(asked.predictions, evaluation_lines(found.results))


@dataclass(frozen=True)
class _OwnSplit:
    """The split that a run keeps for evaluation: drawn from its training rows where `fraction` is given."""

    name: str
    recipe: Recipe
    sources: tuple[SourceSection, ...]
    fraction: float | None

    @property
    def drops(self) -> bool:
        """Whether rows that cannot be used are left out, as in training."""
        return self.recipe.data is not None and self.recipe.data.on_bad_row == "drop"

    def rows(self, loaded: LoadedAdapter) -> tuple[str, list[Row]]:
        """Its name and its rows, read as in training."""
        data, seed = self.recipe.data, self.recipe.training.seed
        assert data is not None
        with_tasks = bool(loaded.runtime.settings.task_names)
        reader = RowReader(loaded.task, Path(), data.system_prompt, with_tasks, data.stopping_strategy, seed)
        rows = reader.open(self.sources).sound_rows(drops=self.drops)
        if self.fraction is not None:
            hashes = [getattr(identify(row), same_row(loaded.task)) for _, row in rows]
            rows = [rows[place] for place in split_rows(rows, hashes, self.fraction, seed)[1]]
        return self.name, rows


def _own_split(path: Path) -> _OwnSplit:
    """The split that the run keeps for evaluation.

    Raises:
        RecipeError: there is none.
    """
    if not (path / "resolved.yaml").is_file():
        raise RecipeError("--data is needed: an adapter folder has no rows of its own")
    recipe = _recipe_of(path)
    for split in SPLITS if recipe.data is not None else ():
        sources = getattr(recipe.data, split)
        if isinstance(sources, tuple):
            return _OwnSplit(split, recipe, sources, None)
        if recipe.data is not None and sources is not None:
            return _OwnSplit(split, recipe, recipe.data.train, sources)
    raise RecipeError("--data is needed: the run has no test or validation rows of its own")


def print_evaluation(result: dict[str, Any]) -> None:
    """Tables for people."""
    metrics = result["metrics"]
    single = {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
    if "base_metrics" in result:
        _print_comparison(result, single)
    elif single:
        console.print_table(f"{result['num_rows']} rows", ["metric", "value"], single.items())
    if "by_class" in metrics:
        rows = [
            (name, row["precision"], row["recall"], row["f1"], row["num_rows"]) for name, row in metrics["by_class"].items()
        ]
        console.print_table("by class", ["class", "precision", "recall", "f1", "rows"], rows)
    if forgetting := result.get("forgetting"):
        console.print_table(
            f"forgetting: {forgetting['measure']}", ["", "value"], [item for item in forgetting.items() if item[0] != "measure"]
        )
    for task, figures in result.get("harness", {}).items():
        cells = [(name, row["base"], row["adapter"], row["stderr"]) for name, row in figures.items()]
        console.print_table(task, ["metric", "base", "adapter", "standard error"], cells)


def _print_comparison(result: dict[str, Any], single: dict[str, Any]) -> None:
    """Adapter beside base, what is sure of the difference, and the rows that changed most."""
    if head := result.get("untrained_base_head"):
        console.print_note(f"note: the base model's head was never trained ({', '.join(head)}): its answers are chance")
    rows = []
    for name, value in single.items():
        found = result["differences"].get(name, {})
        cells = [found.get(part) for part in ("difference", "low", "high")]
        rows.append((name, result["base_metrics"].get(name, ""), value, *("" if cell is None else cell for cell in cells)))
    columns = ["metric", "base", "adapter", "difference", "95% from", "to"]
    console.print_table(f"{result['num_rows']} rows", columns, rows)
    console.print_text(f"by {result['row_figure']}, {result['better']} rows got better and {result['worse']} got worse")
    for name in ("most_worse", "most_better"):
        # What both say is shown where it is short: a class or an answer.
        said = [part for part in _SAID if all(isinstance(line.get(part), str) for line in result[name])]
        numbers = ("base", "adapter")
        lines = [(Path(line["row"]).name, *(line[part] for part in (*numbers, *said))) for line in result[name]]
        if lines:
            columns = ["row", *numbers, *(part.replace("_", " ") for part in said)]
            console.print_table(name.replace("most_", "got "), columns, lines)
