"""`peftkit evaluate`: metrics and predictions of a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftkit import console
from peftkit.engine.data import choose_format, encode_rows, to_canonical
from peftkit.engine.evaluate import evaluation_lines, score_examples, write_evaluation
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.sources import read_rows
from peftkit.errors import LoadError, RecipeError
from peftkit.recipe.schema import Recipe, SourceSection
from peftkit.run import Run, write_text

SPLITS = ("test", "validation")


def evaluate(path: Path, data: Path | None, base: str | None, predictions: Path | None, batch_size: int) -> dict[str, Any]:
    """Evaluate on `data`, or on the run's own test (or validation) rows; returns what `--json` prints."""
    split, source = ("data", SourceSection(path=str(data.absolute()))) if data is not None else _own_split(path)
    raw = read_rows(source, Path())
    loaded = load_adapter(path, base)
    examples = _encode(loaded, source, raw)
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


def _own_split(path: Path) -> tuple[str, SourceSection]:
    """The rows that the run keeps for evaluation."""
    if not (path / "resolved.yaml").is_file():
        raise RecipeError("--data is needed: an adapter folder has no rows of its own")
    recipe = Recipe.model_validate(yaml.safe_load((path / "resolved.yaml").read_text(encoding="utf-8")))
    for split in SPLITS:
        source = getattr(recipe.data, split, None)
        if isinstance(source, SourceSection):
            return split, source
    raise RecipeError("--data is needed: the run has no test or validation source of its own (a fraction is not one)")


def _encode(loaded: LoadedAdapter, source: SourceSection, raw: list[tuple[str, dict[str, Any]]]) -> Any:
    facts = loaded.facts
    if facts.encoding is None:
        raise LoadError(f"{loaded.folder} does not say how rows become tokens")
    renamed = [(origin, row | {ours: row[theirs] for ours, theirs in facts.columns.items() if theirs in row}) for origin, row in raw]
    wanted = source if source.format != "auto" else source.model_copy(update={"format": facts.format})
    item = choose_format(wanted, renamed, loaded.task)
    return encode_rows(loaded.runtime, to_canonical(renamed, item, system_prompt=facts.system_prompt), source.path)


def print_evaluation(result: dict[str, Any]) -> None:
    """Tables for people."""
    metrics = result["metrics"]
    single = [(name, value) for name, value in metrics.items() if not isinstance(value, dict | list)]
    console.print_table(f"{result['num_rows']} rows", ["metric", "value"], single)
    if "by_class" in metrics:
        rows = [(name, row["precision"], row["recall"], row["f1"], row["num_rows"]) for name, row in metrics["by_class"].items()]
        console.print_table("by class", ["class", "precision", "recall", "f1", "rows"], rows)

