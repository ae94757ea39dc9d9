"""Metrics of many resamples of the same rows at once: sums of what is known of each row, weighted by how often it was drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# How often each of N rows occurs in each of R resamples (R, N), float64 -> each metric's value in every resample (R,).
Resampler = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def column(values: Sequence[Any]) -> torch.Tensor:
    """A number (N,), or several (N, K), of every row, in float64."""
    return torch.tensor(values, dtype=torch.float64)


def ratio(top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    """A quotient; 0 where it has no value."""
    return torch.where(bottom > 0, top / bottom.clamp(min=1e-300), 0.0)


def share(counts: torch.Tensor, top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    """The sum of one column over that of another (R,); NaN in resamples that have nothing of it."""
    return (counts @ top) / (counts @ bottom)


def means_of(figures: Mapping[str, Sequence[float]]) -> Resampler:
    """Metrics that are means of a number of every row."""
    columns = {name: column(values) for name, values in figures.items()}
    return lambda counts: {name: share(counts, values, torch.ones_like(values)) for name, values in columns.items()}


def tallies(counts: torch.Tensor, classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """How many rows of each class there are (R, C); `classes` (N,) are numbers."""
    return counts.new_zeros(len(counts), num_classes).index_add_(1, classes, counts)


def f1_of(right: torch.Tensor, guessed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """F1 from the numbers of right guesses, of guesses and of targets; 0 where there are neither."""
    return ratio(2 * right, guessed + wanted)


def weighted_f1(right: torch.Tensor, guessed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean F1 (R,) of classes (R, C), weighted by how many targets each has."""
    return ratio((f1_of(right, guessed, wanted) * wanted).sum(1), wanted.sum(1))


def macro_f1(right: torch.Tensor, guessed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The plain mean F1 (R,) of the classes (R, C) that occur."""
    return ratio(f1_of(right, guessed, wanted).sum(1), (guessed + wanted > 0).sum(1))


def correlation(counts: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation (R,) of numbers (N,) or (R, N); 0 where it is not defined."""
    total = counts.sum(1, keepdim=True)
    left, right = (values - (counts * values).sum(1, keepdim=True) / total for values in (left, right))
    covariance, *variances = ((counts * a * b).sum(1) for a, b in ((left, right), (left, left), (right, right)))
    return ratio(covariance, (variances[0] * variances[1]).sqrt())


def correlations_of(truth: Sequence[float], guess: Sequence[float]) -> Resampler:
    """Pearson's and Spearman's correlation."""
    pair = column(truth), column(guess)
    groups = [torch.unique(values, return_inverse=True)[1] for values in pair]
    return lambda counts: {
        "pearson": correlation(counts, *pair),
        "spearman": correlation(counts, *(_ranks(counts, group) for group in groups)),
    }


def _ranks(counts: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The rank of every row in each resample (R, N), the mean one among equals; `groups` (N,) numbers values in their order."""
    sizes = tallies(counts, groups, int(groups.max()) + 1)
    return (sizes.cumsum(1) - sizes + (sizes + 1) / 2)[:, groups]
