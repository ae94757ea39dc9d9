"""How good a combination of adapters is on the rows of each of them, and the search for weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.combination import COMBINATION, Combination
from peftkit.engine.combinable import Source
from peftkit.engine.combined import Combined, combined_state, view_of
from peftkit.engine.data import encode_rows
from peftkit.engine.evaluate import flat_metrics
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.measure import Rows, measure
from peftkit.formats.base import CanonicalRow
from peftkit.tasks.chat import freeze_date
from peftkit.tasks.generations import AnswerSettings
from peftkit.tasks.generations_torch import AnswerScorer

Metrics = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """The rows of one adapter's task.

    Attributes:
        source: the adapter.
        view: the model as these rows are encoded for it.
        rows: the rows.
        metric: what counts of its metrics.
        more_is_better: whether more of that is better.
    """

    source: Source
    view: LoadedAdapter
    rows: Rows
    metric: str
    more_is_better: bool

    def share(self, metrics: Metrics, alone: Metrics) -> float:
        """The metric over the adapter's alone (Ilharco et al. 2023, arXiv:2212.04089), inverted where less is better."""
        pair = (metrics[self.metric], alone[self.metric])
        better, worse = pair if self.more_is_better else pair[::-1]
        return better / worse if worse else float(better == worse)


def trial_of(combined: Combined, source: Source, rows: Sequence[tuple[str, CanonicalRow]], batch_size: int) -> Trial:
    """An adapter's rows, encoded as it has learned from them.

    Raises:
        DataError: rows that cannot be encoded.
    """
    view = view_of(combined, source)
    freeze_date(view.runtime.tokenizer, view.runtime.settings.template_date)
    examples = encode_rows(view.runtime, rows, source.name)
    metric = view.task.default_metric_for(view.runtime.settings)
    rows_of = Rows(examples, [], AnswerScorer(AnswerSettings()), batch_size)
    return Trial(source, view, rows_of, metric, view.task.metrics[metric])


def metrics_of(
    combined: Combined, trials: Sequence[Trial], name: str, advance: Callable[[int], None] = lambda done: None
) -> dict[str, Metrics]:
    """By the name of each adapter's rows, the metrics of one of the model's adapters (see `Combined.active`) on them."""
    found = {}
    with combined.active(name):
        for trial in trials:
            rows = dataclasses.replace(trial.rows, on_batch=advance)
            found[trial.source.name] = flat_metrics(measure(trial.view, rows).metrics)
    return found


def normalized(trials: Sequence[Trial], found: Mapping[str, Metrics], alone: Mapping[str, Metrics]) -> float:
    """The mean share of what each adapter alone reaches on its own rows; 1: as good as all of them.

    Args:
        trials: the rows.
        found: metrics on each.
        alone: metrics of each adapter alone on its own.
    """
    shares = [trial.share(found[trial.source.name], alone[trial.source.name]) for trial in trials]
    return sum(shares) / len(shares)


def search(
    combined: Combined,
    trials: Sequence[Trial],
    tried: Sequence[Combination],
    alone: Mapping[str, Metrics],
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Try combinations in place, one after the other; what came of each, in their order.

    Args:
        combined: the model.
        trials: the rows.
        tried: the combinations.
        alone: metrics of each adapter alone on its own rows.
        advance: told how many rows are done.
    """
    lines = []
    for how in tried:
        state, error = combined_state(combined.sources, how, combined.originals)
        combined.put(state)
        found = metrics_of(combined, trials, COMBINATION, advance)
        line: dict[str, Any] = {"weights": list(how.weights)} | ({} if how.density is None else {"density": how.density})
        metrics = {trial.source.name: found[trial.source.name][trial.metric] for trial in trials}
        lines.append(line | {"relative_error": error, "normalized": normalized(trials, found, alone), "metrics": metrics})
    return lines
