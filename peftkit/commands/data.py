"""`peftkit data`: rows as the model will see them, what the audit found, and how long they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.engine.data import Data, load_data
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.survey import find_model_facts
from peftkit.errors import RecipeError
from peftkit.plan import Plan, make_plan
from peftkit.recipe import LoadedRecipe
from peftkit.tasks.example import Example, Runtime, View

LENGTHS = ("min", "mean", "p50", "p90", "p99", "max")
FINDINGS_SHOWN = 5  # of each kind and split, for people; `--json` has all


def data(loaded: LoadedRecipe, num_rows: int, row: int | None, plot: bool) -> dict[str, Any]:
    """Read, encode and audit the rows; returns what `--json` prints.

    Args:
        loaded: the recipe.
        num_rows: training examples to show, from the first one on.
        row: the one to show instead, counted from 1.
        plot: whether to draw the lengths into a file.
    """
    decided = make_plan(loaded, detect_hardware())
    model = find_model_facts(decided)
    with console.progress(None, "reading rows") as advance:
        found = load_data(decided, model, on_row=lambda: advance(1))
    runtime = decided.task.runtime(model.tokenizer, found.encoding)
    result = {
        "splits": found.report,
        "classes": found.classes,
        "formats": found.formats,
        "max_length": found.encoding.max_length,
        "cached": found.is_cached,
        "findings": list(_findings(found)),
        "rows": [_shown(example, runtime) for example in _chosen(found, num_rows, row)],
    }
    return result | ({"plot": str(_plot(decided, found))} if plot else {})


def _chosen(found: Data, num_rows: int, row: int | None) -> list[Example]:
    if row is None:
        return found.sample[:num_rows]
    if not 1 <= row <= len(found.sample):
        raise RecipeError(f"--row {row}: train has the examples 1 to {len(found.sample)}")
    return [found.sample[row - 1]]


def _findings(found: Data) -> Iterator[dict[str, Any]]:
    with found.findings_path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _shown(example: Example, runtime: Runtime) -> dict[str, Any]:
    """An example with every token, its weight, and the text that is learned."""
    tokenizer = runtime.tokenizer
    views = runtime.views(example)
    return {
        "row": example.origin,
        "num_tokens": example.num_tokens,
        "num_targets": example.num_targets,
        "sequences": [
            {
                "title": view.title,
                "input_ids": view.ids,
                "tokens": tokenizer.convert_ids_to_tokens(view.ids),
                "weights": view.weights,
                "supervised": list(_supervised(view, tokenizer)),
                "parts": list(_parts(view, tokenizer)),
            }
            for view in views
        ],
    }


def _supervised(view: View, tokenizer: Any) -> Iterator[str]:
    """The texts that are learned, each as long as it goes."""
    for learned, places in groupby(range(len(view.ids)), key=lambda place: view.weights[place] > 0):
        part = list(places)
        if learned:
            yield _text(view.ids, part[0], part[-1] + 1, tokenizer)


def _parts(view: View, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Pieces of the text with their kind: `learned`, `special` or `plain`; special tokens stand alone."""
    special = set(tokenizer.all_special_ids)

    def kind(place: int) -> tuple[str, int]:
        learned = view.weights[place] > 0
        is_special = view.ids[place] in special
        name = "learned" if learned else "special" if is_special else "plain"
        return name, place if is_special else -1

    for (name, _), places in groupby(range(len(view.ids)), key=kind):
        part = list(places)
        yield name, _text(view.ids, part[0], part[-1] + 1, tokenizer)


def _text(ids: list[int], start: int, end: int, tokenizer: Any) -> str:
    """The text of the tokens from `start` to `end` as it is behind those before them: with its spaces."""
    before, through = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:end])
    return str(through[len(before) :] if through.startswith(before) else tokenizer.decode(ids[start:end]))


def _plot(plan: Plan, found: Data) -> Path:
    """A histogram of the lengths as a PNG file in the current folder.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError("--plot needs matplotlib; `pip install matplotlib` (or peftkit's extra `plot`) adds it") from error
    path = Path(f"{plan.recipe.name}-lengths.png")
    figure = Figure(figsize=(8, 3 * len(found.report)))
    for number, (split, report) in enumerate(found.report.items(), 1):
        axes = figure.add_subplot(len(found.report), 1, number)
        histogram = report["lengths"]["histogram"]
        axes.stairs(histogram["counts"], histogram["edges"], fill=True)
        axes.axvline(found.encoding.max_length, color="black", linestyle="--", linewidth=1)
        axes.set(title=f"{split}: {report['examples']:,} examples", xlabel="tokens", ylabel="examples")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path


def print_data(result: dict[str, Any]) -> None:
    """Tables and rows for people."""
    stream = ", the first rows of a stream" if result["splits"]["train"]["is_sample"] else ""
    title = f"rows (format {', '.join(dict.fromkeys(result['formats']))}{stream})"
    splits = result["splits"].items()
    names = ["rows", "examples", "tokens", "targets"]
    shares = {split: report["supervised_share"] for split, report in splits if report["supervised_share"] is not None}
    counts = [
        (split, *(report[name] for name in names), *([f"{shares[split]:.1%}"] if shares else [])) for split, report in splits
    ]
    console.print_table(title, ["", *names, *(["learned"] if shares else [])], counts)
    lengths = [(split, *(report["lengths"].get(name, "") for name in LENGTHS)) for split, report in splits]
    console.print_table("tokens of an example", ["", *LENGTHS], lengths)
    console.print_bars(f"in train (max_length {result['max_length']:,})", _bars(result["splits"]["train"]["lengths"]))
    if result["classes"]["train"]:
        splits = list(result["classes"])
        table = [(label, *(result["classes"][split][label] for split in splits)) for label in result["classes"]["train"]]
        console.print_table("classes", ["class", *splits], table)
    print_findings(result["findings"], result["splits"])
    for shown in result["rows"]:
        console.print_text(f"\n{shown['row']}: {shown['num_tokens']:,} tokens, {console.show(shown['num_targets'])} learned")
        for sequence in shown["sequences"]:
            console.print_tokens(sequence["title"], sequence["parts"])
    if "plot" in result:
        console.print_note(f"written: {result['plot']}")


def _bars(lengths: dict[str, Any]) -> list[tuple[str, int]]:
    histogram = lengths.get("histogram", {"edges": [], "counts": []})
    edges = histogram["edges"]
    return [(f"{edges[n]:.0f}-{edges[n + 1]:.0f}", count) for n, count in enumerate(histogram["counts"])]


def print_findings(findings: Iterable[dict[str, Any]], report: dict[str, Any]) -> None:
    """How many findings of each kind there are, and the first ones of each."""
    counted = [(split, kind, count) for split, part in report.items() for kind, count in part["findings"].items()]
    if not counted:
        console.print_text("the audit found nothing")
        return
    console.print_table("findings", ["split", "kind", "rows"], counted)
    by_kind = sorted(findings, key=lambda line: (line["split"], line["kind"]))
    for (split, kind), lines in groupby(by_kind, key=lambda line: (line["split"], line["kind"])):
        for line in islice(lines, FINDINGS_SHOWN):
            console.print_text(f"  {split} {kind}: {line['row']}: {line['reason']}")
