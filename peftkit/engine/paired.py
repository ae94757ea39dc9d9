"""Two models on the same rows: how much their metrics differ, how sure that is, and which rows got better or worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkit.tasks.resampling_torch import Resampler

NUM_RESAMPLES, CONFIDENCE = 1000, 0.95
NUM_SHOWN = 5  # rows that got better, and as many that got worse
_TOGETHER = 50  # resamples in memory at once


def differences(adapter: Resampler, base: Resampler, num_rows: int, seed: int) -> dict[str, dict[str, float | None]]:
    """By how much each metric of the adapter is above the base's, with a paired bootstrap interval.

    In every resample both models have the same rows (Efron & Tibshirani 1993, chapter 13, percentile interval; Koehn 2004,
    EMNLP, for BLEU). An end is None where the metric has no value in any resample.

    Args:
        adapter: metrics of resamples of its rows.
        base: likewise, of the same rows.
        num_rows: how many there are.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.ones(1, num_rows, dtype=torch.float64)
    measured = {name: values[0] for name, values in _difference(adapter, base, whole).items()}
    parts = [_difference(adapter, base, _draw(num_rows, generator)) for _ in range(NUM_RESAMPLES // _TOGETHER)]
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    found = {}
    for name, value in measured.items():
        low, high = torch.nanquantile(torch.cat([part[name] for part in parts]), ends)
        found[name] = {"difference": _number(value), "low": _number(low), "high": _number(high)}
    return found


def _draw(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """How often each row occurs in each of some resamples (_TOGETHER, rows)."""
    places = torch.randint(num_rows, (_TOGETHER, num_rows), generator=generator)
    counts = torch.zeros(_TOGETHER, num_rows, dtype=torch.float64)
    return counts.scatter_add_(1, places, torch.ones_like(counts))


def _difference(adapter: Resampler, base: Resampler, counts: torch.Tensor) -> dict[str, torch.Tensor]:
    mine, theirs = adapter(counts), base(counts)
    return {name: mine[name] - theirs[name] for name in mine}


def _number(value: torch.Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def changes(
    rows: Sequence[str], adapter: Sequence[float], base: Sequence[float], *, more_is_better: bool
) -> list[dict[str, Any]]:
    """Each row's figure under both models, and by how much it is better under the adapter (below 0: worse)."""
    sign = 1 if more_is_better else -1
    pairs = zip(rows, adapter, base, strict=True)
    return [{"row": row, "adapter": mine, "base": theirs, "change": sign * (mine - theirs)} for row, mine, theirs in pairs]


def summary_of(changed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many rows got better and worse, and those that did so most; among equals by their loss, where they have one."""
    ordered = sorted(changed, key=lambda line: (line["change"], line.get("loss_change", 0.0)))
    worse, better = [line for line in ordered if line["change"] < 0], [line for line in ordered if line["change"] > 0]
    return {
        "better": len(better),
        "worse": len(worse),
        "most_better": better[: -NUM_SHOWN - 1 : -1],
        "most_worse": worse[:NUM_SHOWN],
    }
