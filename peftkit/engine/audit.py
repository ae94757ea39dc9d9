"""The audit of the rows: what was found wrong or odd, row by row, and what the rows are like as a whole."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from peftkit.engine.examples import Examples
from peftkit.errors import DataError
from peftkit.formats.base import CanonicalRow
from peftkit.guides import AUDIT, LENGTH

Rows = Sequence[tuple[str, CanonicalRow]]

MAX_SHOWN = 5  # bad rows named in one message; the count is always given
NUM_BINS = 20
# Columns that hold what is to be learned; all others are what a model is asked with.
_TARGETS = {"label", "tags", "answers", "completion", "score", "negative", "rejected", "labels"}


@dataclass
class Audit:
    """Collects findings in a file, one JSON object a line, and counts them.

    Attributes:
        path: the file.
        counts: by split and kind.
    """

    path: Path
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file = self.path.open("w", encoding="utf-8")

    def add(self, split: str, kind: str, where: str, reason: str) -> None:
        """Note one finding about the row at `where` (`file:row`)."""
        self.counts.setdefault(split, Counter())[kind] += 1
        line = {"split": split, "kind": kind, "row": where, "reason": reason}
        self._file.write(json.dumps(line, ensure_ascii=True) + "\n")

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()


@dataclass
class BadRows:
    """Rows of one split that cannot be used, for one message about all of them; `remedy` says where the rest is to be seen."""

    heading: str
    remedy: str = ""
    lines: list[str] = field(default_factory=list)
    count: int = 0
    longest: int = 0

    def add(self, line: str, num_tokens: int = 0) -> None:
        """Count one row; the first few are named."""
        self.count += 1
        self.longest = max(self.longest, num_tokens)
        if len(self.lines) < MAX_SHOWN:
            self.lines.append(line)

    def fail(self, more: str = "") -> NoReturn:
        """Raise the DataError that names them."""
        rest = f"\n  ... and {self.count - len(self.lines)} more" if self.count > len(self.lines) else ""
        rest += f" ({self.remedy})" if rest and self.remedy else ""
        text = f"{self.count} {self.heading}{more}:\n  " + "\n  ".join(self.lines) + rest
        raise DataError(text, guide=LENGTH if self.longest else AUDIT)


class Identity(NamedTuple):
    """52-bit hashes of a row: equal rows have equal ones.

    Attributes:
        whole: of the row.
        asked: of what a model is asked with; of the row, where that is nothing.
    """

    whole: int
    asked: int


def identify(row: CanonicalRow) -> Identity:
    """The hashes of a row."""
    asked = {name: value for name, value in row.items() if name not in _TARGETS}
    for name in ("messages", "chosen"):
        if name in asked and asked[name][-1]["role"] == "assistant":
            asked[name] = asked[name][:-1]
    whole = _hash(row)
    return Identity(whole, _hash(asked) if any(asked.values()) else whole)


def _hash(value: Any) -> int:
    data = json.dumps(value, sort_keys=True, ensure_ascii=True).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 12  # exact in float64


def find_duplicates(audit: Audit, split: str, rows: Rows, whole: np.ndarray, asked: np.ndarray) -> None:
    """Rows that stand in a split more than once, by their later places; and equal texts with different labels.

    Args:
        audit: takes the findings.
        split: its name.
        rows: its rows with their places.
        whole: hashes of them (N,).
        asked: hashes of what a model is asked with (N,).
    """
    first = _first_places(whole)
    for place in np.flatnonzero(first != np.arange(len(first))).tolist():
        where, other = rows[place][0], rows[int(first[place])][0]
        if where != other:  # a mixture repeats rows
            audit.add(split, "duplicate", where, f"is the same as {other}")
    if not {"label", "tags"} & rows[0][1].keys():
        return
    first = _first_places(asked)
    for place in np.flatnonzero(whole != whole[first]).tolist():
        where, other = rows[place][0], rows[int(first[place])][0]
        audit.add(split, "contradiction", where, f"has the same text as {other} and another label")


def _first_places(values: np.ndarray) -> np.ndarray:
    """For every value (N,) the place where it occurs first (N,)."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def find_leaks(audit: Audit, split: str, rows: Rows, leaked: np.ndarray) -> None:
    """Rows of a split whose input is in train (N,): a metric on them says nothing about new rows."""
    for place in np.flatnonzero(leaked).tolist():
        audit.add(split, "leakage", rows[place][0], "its input is in train too")


def length_statistics(examples: Examples) -> dict[str, Any]:
    """Token lengths of a split's examples as read by the model: quantiles, and a histogram of up to 20 bins."""
    lengths = examples.lengths
    if not len(lengths):
        return {}
    low, high = int(lengths.min()), int(lengths.max())
    counts, edges = np.histogram(lengths, bins=min(NUM_BINS, high - low + 1), range=(low, high + 1))
    quantiles = {f"p{percent}": float(np.percentile(lengths, percent)) for percent in (50, 90, 99)}
    return {
        "min": low,
        "mean": round(float(lengths.mean()), 2),
        **quantiles,
        "max": high,
        "histogram": {"edges": [round(float(edge), 2) for edge in edges], "counts": counts.tolist()},
    }


def split_report(examples: Examples, num_rows: int, counts: Mapping[str, int], learns_tokens: bool) -> dict[str, Any]:
    """What a split is like: rows read, examples made of them, tokens, the share of labels that is learned, findings by kind."""
    num_tokens, num_targets, num_labels = map(examples.total, ("num_input_tokens", "num_target_tokens", "num_labels"))
    return {
        "rows": num_rows,
        "examples": len(examples),
        "tokens": num_tokens,
        "targets": num_targets,
        "supervised_share": round(num_targets / num_labels, 4) if learns_tokens and num_labels else None,
        "lengths": length_statistics(examples),
        "findings": dict(sorted(counts.items())),
    }
