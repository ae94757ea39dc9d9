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
    split, source, draw = _own_split(path) if data is None else ("data", SourceSection(path=str(data.absolute())), None)
    loaded = load_adapter(path, base)
    rows = _rows(loaded, source)
    if draw is not None:
        rows = split_rows(rows, *draw)[1]
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


def _own_split(path: Path) -> tuple[str, SourceSection, tuple[float, int] | None]:
    """The split that the run keeps for evaluation: name, source, and fraction and seed where it is drawn from that source."""
    if not (path / "resolved.yaml").is_file():
        raise RecipeError("--data is needed: an adapter folder has no rows of its own")
    recipe = Recipe.model_validate(yaml.safe_load((path / "resolved.yaml").read_text(encoding="utf-8")))
    for split in SPLITS if recipe.data is not None else ():
        source = getattr(recipe.data, split)
        if isinstance(source, SourceSection):
            return split, source, None
        if recipe.data is not None and source is not None:
            return split, recipe.data.train, (source, recipe.training.seed)
    raise RecipeError("--data is needed: the run has no test or validation rows of its own")


def _rows(loaded: LoadedAdapter, source: SourceSection) -> list[Numbered]:
    """Canonical rows of a source, read as the training rows were."""
    facts, raw = loaded.facts, read_rows(source, Path())
    renamed = [(origin, facts.rename(row)) for origin, row in raw]
    wanted = source if source.format != "auto" else source.model_copy(update={"format": facts.format})
    item = choose_format(wanted, renamed, loaded.task)
    with_tasks = bool(loaded.runtime.settings.task_names)
    return to_canonical(renamed, item, system_prompt=facts.system_prompt, with_tasks=with_tasks)


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
