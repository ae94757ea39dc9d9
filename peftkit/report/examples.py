"""Rows of an evaluation worth a look: those that went wrong, the worst and the best; and which classes are taken for which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peftkit.report.facts import Evaluation, Json, finite, mapping
from peftkit.report.show import label_of, show

MAX_CLASSES = 16  # of a confusion matrix that a page still shows whole
NUM_WORST, NUM_BEST, NUM_PAIRS = 12, 4, 20
MAX_TEXT = 600  # characters of a text that are shown
# What a row is judged by, or what the number of its targets is: in the columns of their own, or not for readers.
_NOT_SHOWN = {"row", "loss_sum", "num_targets", "probabilities", "num_tokens", "start", "end", "num_words_cut"}


@dataclass(frozen=True)
class Example:
    """One row of an evaluation.

    Attributes:
        row: where it stands (`file:row`).
        kind: wrong, worst or best.
        loss: per target; None where it is not known.
        parts: (name, text) of the row itself, where its file is still there, and of what was predicted.
    """

    row: str
    kind: str
    loss: float | None
    parts: list[tuple[str, str]]


@dataclass(frozen=True)
class Confusion:
    """Which classes are taken for which.

    Attributes:
        names: of the classes; empty where there are too many for a matrix.
        counts: rows of the true class by columns of the predicted one.
        pairs: (true, predicted, rows) of the mistakes, the most frequent first.
    """

    names: list[str]
    counts: list[list[int]]
    pairs: list[tuple[str, str, int]]

    def share(self, row: int, column: int) -> float:
        """How many of a class's rows are in a cell, 0 to 1."""
        return self.counts[row][column] / max(sum(self.counts[row]), 1)


def examples(evaluation: Evaluation) -> list[Example]:
    """The rows with the highest loss, wrong ones first, and those with the lowest."""
    rows = sorted(evaluation.predictions, key=lambda row: (not _is_wrong(row), -(_loss(row) or 0.0)))
    worst, best = rows[:NUM_WORST], [row for row in rows[NUM_WORST:][-NUM_BEST:][::-1] if not _is_wrong(row)]
    texts = _texts(worst + best)
    kinds = ["wrong" if _is_wrong(row) else "worst" for row in worst] + ["best"] * len(best)
    return [
        Example(str(row.get("row", "")), kind, _loss(row), _parts(row, texts))
        for row, kind in zip(worst + best, kinds, strict=True)
    ]


def confusion(evaluation: Evaluation) -> Confusion | None:
    """The confusion matrix of an evaluation, where it has one that can be read."""
    names, counts = list(mapping(evaluation.metrics.get("by_class"))), evaluation.metrics.get("confusion")
    if not isinstance(counts, list) or [len(row) for row in counts] != [len(names)] * len(names):
        return None
    pairs = [
        (names[truth], names[guess], count)
        for truth, row in enumerate(counts)
        for guess, count in enumerate(row)
        if truth != guess and count
    ]
    fits = len(names) <= MAX_CLASSES
    return Confusion(names if fits else [], counts if fits else [], sorted(pairs, key=lambda pair: -pair[2])[:NUM_PAIRS])


def _is_wrong(row: Json) -> bool:
    """A class, a list of tags or an answer that is not the right one; a number is never quite right."""
    if "exact_match" in row:
        return not row["exact_match"]
    return "label" in row and "prediction" in row and not isinstance(row["label"], float) and row["label"] != row["prediction"]


def _loss(row: Json) -> float | None:
    total, count = finite(row.get("loss_sum")), finite(row.get("num_targets"))
    return total / count if total is not None and count else None


def _parts(row: Json, texts: dict[str, Json]) -> list[tuple[str, str]]:
    """What the row says, then what was predicted, the likeliest other classes beside it."""
    shown = {**texts.get(str(row.get("row")), {}), **{key: row[key] for key in row if key not in _NOT_SHOWN}}
    likely = mapping(row.get("probabilities"))
    if likely and all(finite(value) is not None for value in likely.values()):
        first = sorted(likely.items(), key=lambda item: -item[1])[:3]
        shown["probabilities"] = ", ".join(f"{name} {value:.0%}" for name, value in first)
    return [(label_of(key), _cut(_text(value))) for key, value in shown.items() if value not in (None, "", [])]


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if isinstance(value, list) and all(isinstance(part, dict) and "content" in part for part in value):
        return "\n".join(f"{part.get('role', '')}: {part['content']}" for part in value)
    return show(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text):,} characters)"


def _texts(rows: Sequence[Json]) -> dict[str, Json]:
    """`file:row` -> the row, read from files of JSON lines that are still there; other kinds of files are left alone."""
    wanted: dict[Path, dict[int, str]] = {}
    for row in rows:
        file, _, number = str(row.get("row", "")).rpartition(":")
        if file.endswith((".jsonl", ".ndjson")) and number.isdigit():
            wanted.setdefault(Path(file), {})[int(number)] = str(row["row"])
    found: dict[str, Json] = {}
    for path, places in wanted.items():
        try:
            with path.open(encoding="utf-8", newline="\n") as lines:
                texts = {number: text for number, text in enumerate(islice(lines, max(places)), 1) if number in places}
            found |= {places[number]: mapping(json.loads(text)) for number, text in texts.items()}
        except (OSError, ValueError):
            continue  # the examples are shown without their texts
    return found
