"""`peftkit evaluate`: metrics and predictions of a trained adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftkit import console
from peftkit.engine.audit import identify
from peftkit.engine.data import encode_rows
from peftkit.engine.evaluate import evaluation_lines, score_examples, write_evaluation
from peftkit.engine.fast import proven_head
from peftkit.engine.guard import answering_remedies, explain_exhaustion, memory_text
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.prepare import same_row, split_rows
from peftkit.engine.rows import OpenedSplit, RowReader
from peftkit.engine.sources import sound_rows
from peftkit.engine.step import Step
from peftkit.errors import RecipeError
from peftkit.formats.base import CanonicalRow
from peftkit.recipe.schema import Recipe, SourceSection
from peftkit.run import Run, require_place, write_text
from peftkit.tasks.chat import freeze_date

SPLITS = ("test", "validation")
Row = tuple[str, CanonicalRow]


def evaluate(path: Path, data: Path | None, base: str | None, predictions: Path | None, batch_size: int) -> dict[str, Any]:
    """Evaluate on `data`, or on the run's own test (or validation) rows; returns what `--json` prints."""
    if predictions is not None:
        require_place(predictions, "--predictions")
    with explain_exhaustion(lambda: memory_text(f"with --batch-size {batch_size}", answering_remedies(batch_size))):
        return _evaluate(path, data, base, predictions, batch_size)


def _evaluate(path: Path, data: Path | None, base: str | None, predictions: Path | None, batch_size: int) -> dict[str, Any]:
    own = _own_split(path) if data is None else None
    loaded = load_adapter(path, base)
    split, rows = own.rows(loaded) if own is not None else _rows_of_file(loaded, data)
    freeze_date(loaded.runtime.tokenizer, loaded.runtime.settings.template_date)
    examples = encode_rows(loaded.runtime, rows, split, drops=own is not None and own.drops)
    with loaded.inference(), console.progress(len(examples), "evaluating") as advance:
        facts = loaded.facts
        learns = loaded.task.learns_tokens
        head = proven_head(loaded.model, loaded.runtime, examples, facts.mixed_precision, facts.dtype) if learns else None
        results = score_examples(
            Step(loaded.model, loaded.runtime, head),
            examples,
            batch_size=batch_size,
            device=loaded.device,
            on_batch=advance,
        )
    metrics = loaded.runtime.summarise(results)
    if (path / "resolved.yaml").is_file():
        name = split if data is None else data.stem
        write_evaluation(Run(path), name, metrics, results)
        console.print_note(f"written: {', '.join(map(str, Run(path).evaluation_paths(name)))}")
    if predictions is not None:
        write_text(predictions, evaluation_lines(results))
    return {"metrics": metrics, "num_rows": len(results), "split": split}


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
        rows = _sound(reader.open(self.sources), drops=self.drops)
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
    recipe = Recipe.model_validate(yaml.safe_load((path / "resolved.yaml").read_text(encoding="utf-8")))
    for split in SPLITS if recipe.data is not None else ():
        sources = getattr(recipe.data, split)
        if isinstance(sources, tuple):
            return _OwnSplit(split, recipe, sources, None)
        if recipe.data is not None and sources is not None:
            return _OwnSplit(split, recipe, recipe.data.train, sources)
    raise RecipeError("--data is needed: the run has no test or validation rows of its own")


def _rows_of_file(loaded: LoadedAdapter, path: Path | None) -> tuple[str, list[Row]]:
    """Rows of a file in the format of the training rows, their columns renamed alike."""
    facts = loaded.facts
    assert path is not None
    source = SourceSection(path=str(path.absolute()), format=facts.format)
    with_tasks = bool(loaded.runtime.settings.task_names)
    reader = RowReader(loaded.task, Path(), facts.system_prompt, with_tasks, rename=facts.rename)
    return "data", _sound(reader.open([source]))


def _sound(opened: OpenedSplit, *, drops: bool = False) -> list[Row]:
    """The rows of a split; those that cannot be read are left out where training left them out."""
    described = "; ".join(f"format `{source.format.name}`: {source.format.summary}" for source in opened.sources)
    return sound_rows(opened.rows(), f" ({described})", drops=drops)


def print_evaluation(result: dict[str, Any]) -> None:
    """Tables for people."""
    metrics = result["metrics"]
    single = [(name, value) for name, value in metrics.items() if not isinstance(value, dict | list)]
    console.print_table(f"{result['num_rows']} rows", ["metric", "value"], single)
    if "by_class" in metrics:
        rows = [
            (name, row["precision"], row["recall"], row["f1"], row["num_rows"]) for name, row in metrics["by_class"].items()
        ]
        console.print_table("by class", ["class", "precision", "recall", "f1", "rows"], rows)
