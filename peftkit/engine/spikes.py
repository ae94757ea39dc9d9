"""Steps whose loss or gradient lies far outside what the last steps showed, and the rows that may be why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from peftkit.engine.checkpoint import Progress
from peftkit.tasks.example import Example

WINDOW, WARM_UP = 50, 20  # steps that are looked back on, and those that must be there before anything counts as odd
_MOST_ROWS = 8
# (how many MADs above the median, how many medians, at least so much above). The median absolute deviation of normal numbers
# is 0.67 of their standard deviation, so that 10 of them are 6.7 of these; median and MAD do not follow what they judge
# (Leys et al. 2013, "Detecting outliers", J. Exp. Soc. Psychol. 49). Norms of gradients have long tails: with a deviation of a
# half in their logarithm one in 50,000 is called odd. A loss that has all but vanished may be ten times as much and no spike.
_LOSS, _NORM = (10.0, 1.5, 0.1), (20.0, 3.0, 0.0)


def note_spike(progress: Progress, loss: float, grad_norm: float, rows: Sequence[Example], batch_size: int) -> str:
    """Look at a step, and remember it; what to say where it is the first odd one of a series, else an empty text.

    Args:
        progress: of the run, the step counted; holds the last steps, so that a resumed run says the same.
        loss: of the step, over all processes.
        grad_norm: before clipping; a step that was skipped has none that is finite, and is left out.
        rows: of the step.
        batch_size: rows of a whole step. The last one of an epoch may have a few alone, whose loss and norm scatter more: it is
            left out below half of them.
    """
    if not math.isfinite(grad_norm) or 2 * len(rows) < batch_size:
        return ""
    losses, norms = [step[0] for step in progress.recent], [step[1] for step in progress.recent]
    odd = _is_odd(loss, losses, _LOSS), _is_odd(grad_norm, norms, _NORM)
    is_first = any(odd) and not (progress.recent and progress.recent[-1][2])
    progress.recent = [*progress.recent[1 - WINDOW :], (loss, grad_norm, any(odd))]
    progress.spikes += any(odd)
    if not is_first:
        return ""
    usual = f"loss {loss:.4f} (usually {_median(losses):.4f}), grad norm {grad_norm:.3f} (usually {_median(norms):.3f})"
    return f"note: step {progress.step} is unlike the last {len(losses)}: {usual}. Its rows, the longest first: {_named(rows)}"


def _is_odd(value: float, last: Sequence[float], limits: tuple[float, float, float]) -> bool:
    """Whether a number lies far above the last ones."""
    if len(last) < WARM_UP:
        return False
    deviations, factor, least = limits
    middle = _median(last)
    excess = value - middle
    if excess <= least or value <= factor * middle:  # most steps go no further
        return False
    return excess > deviations * _median(abs(other - middle) for other in last)


def _median(values: Iterable[float]) -> float:
    """The middle one, the upper of two: `statistics.median` takes several times as long, at every step."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _named(rows: Sequence[Example]) -> str:
    learned = sorted((row for row in rows if row.num_targets), key=lambda row: -row.length)
    more = len(learned) - _MOST_ROWS
    return ", ".join(row.origin for row in learned[:_MOST_ROWS]) + (f" and {more} more" if more > 0 else "")
