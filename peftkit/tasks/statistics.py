"""Statistics that several tasks report. Scikit-learn and scipy are loaded when a number is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def correlations(truth: Sequence[float], guess: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where all numbers of one side are equal and neither is defined."""
    from scipy import stats

    if len(set(truth)) < 2 or len(set(guess)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(truth, guess).statistic),
        "spearman": float(stats.spearmanr(truth, guess).statistic),
    }


def class_table(truth: Any, guess: Any, names: Sequence[str], labels: Sequence[Any]) -> dict[str, dict[str, float | int]]:
    """Precision, recall, F1 and number of rows of every class; 0 where one has no rows or no guesses.

    Args:
        truth: classes of the rows, or a matrix of 0 and 1 (rows, classes).
        guess: likewise.
        names: of the classes, in order.
        labels: what stands for them in `truth`: their names, or the columns' numbers.
    """
    from sklearn import metrics

    parts = metrics.precision_recall_fscore_support(truth, guess, labels=list(labels), zero_division=0)
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "num_rows": int(n)}
        for name, p, r, f, n in zip(names, *parts, strict=True)
    }
