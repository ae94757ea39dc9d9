"""`peftkit evaluate`: metrics and predictions of a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftkit import console
from peftkit.engine.data import choose_format, encode_rows, split_rows, to_canonical
from peftkit.engine.evaluate import evaluation_lines, score_examples, write_evaluation
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.sources import Numbered, read_rows
from peftkit.errors import RecipeError
from peftkit.recipe.schema import Recipe, SourceSection
from peftkit.run import Run, write_text

SPLITS = ("test", "validation")


def evaluate(path: Path, data: Path | None, base: str | None, predictions: Path | None, batch_size: int) -> dict[str, Any]:
    """Evaluate on `data`, or on the run's own test (or validation) rows; returns what `--json` prints."""
    own = None if data is not None else _own_split(path)
    loaded = load_adapter(path, base)
    split, rows = _own_rows(loaded, *own) if own else ("data", _rows(loaded, SourceSection(path=str(data.absolute()))))  # type: ignore[union-attr]
    examples = encode_rows(loaded.runtime, rows, split)
    with loaded.inference(), console.progress(len(examples), "evaluating") as advance:
        results = score_examples(
            loaded.model, loaded.runtime, examples, batch_size=batch_size, device=loaded.device, on_batch=advance
        )
    metrics = loaded.runtime.summarise(results)
    if (path / "resolved.yaml").is_file():
        name = split if data is None else data.stem
        write_evaluation(Run(path), name, metrics, results)
        console.print_note(f"written: {', '.join(map(str, Run(path).evaluation_paths(name)))}")
    if predictions is not None:
        write_text(predictions, evaluation_lines(results))
    return {"metrics": metrics, "num_rows": len(results), "split": split}


def _own_split(path: Path) -> tuple[str, Recipe]:
    """The split that the run keeps for evaluation, and its recipe."""
    if not (path / "resolved.yaml").is_file():
        raise RecipeError("--data is needed: an adapter folder has no rows of its own")
    recipe = Recipe.model_validate(yaml.safe_load((path / "resolved.yaml").read_text(encoding="utf-8")))
    split = next((name for name in SPLITS if getattr(recipe.data, name, None) is not None), None)
    if split is None:
        raise RecipeError("--data is needed: the run has no test or validation rows of its own")
    return split, recipe


def _own_rows(loaded: LoadedAdapter, split: str, recipe: Recipe) -> tuple[str, list[Numbered]]:
    """The rows of a run's own split; a fraction of the training rows is drawn again by the seed of the run."""
    assert recipe.data is not None, "a run has rows"
    source = getattr(recipe.data, split)
    if isinstance(source, SourceSection):
        return split, _rows(loaded, source)
    return split, split_rows(_rows(loaded, recipe.data.train), source, recipe.training.seed)[1]


def _rows(loaded: LoadedAdapter, source: SourceSection) -> list[Numbered]:
    """Canonical rows of a source, read as the training rows were."""
    facts, raw = loaded.facts, read_rows(source, Path())
    renamed = [
        (origin, row | {ours: row[theirs] for ours, theirs in facts.columns.items() if theirs in row}) for origin, row in raw
    ]
    wanted = source if source.format != "auto" else source.model_copy(update={"format": facts.format})
    item = choose_format(wanted, renamed, loaded.task)
    return to_canonical(renamed, item, system_prompt=facts.system_prompt)


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
