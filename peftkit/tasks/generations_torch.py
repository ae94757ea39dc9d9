"""Generated answers, scored by sacrebleu, rouge-score, an answer extractor, triples; numbers of each row make the metrics."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from peftkit.formats.base import RowError
from peftkit.tasks.generations import GENERATION_METRICS, AnswerSettings, extract_answer, is_same_answer
from peftkit.tasks.resampling_torch import Resampler, column, f1_of, means_of, ratio
from peftkit.tasks.triples import EXPECTED, Parsed, parse_triples

Result = Mapping[str, Any]


class AnswerScorer:
    """Compares generated answers with those of the rows.

    BLEU and chrF are those of the corpus (Papineni et al. 2002, ACL; Popović 2015, WMT), 0 to 100, from the counts that
    sacrebleu takes of every row; ROUGE (Lin 2004) is the mean F-measure of the rows; it and the shares are 0 to 1. Precision,
    recall and F1 of triples are micro averages: of all triples of all rows.
    """

    def __init__(self, settings: AnswerSettings) -> None:
        self.settings = settings
        self._corpus: dict[str, Any] = {}  # sacrebleu's metrics
        if {"bleu", "chrf"} & set(settings.metrics):
            from sacrebleu.metrics import BLEU, CHRF

            made = {"bleu": lambda: BLEU(tokenize=settings.bleu_tokenize, force=True), "chrf": CHRF}
            self._corpus = {name: make() for name, make in made.items() if name in settings.metrics}
        self._rouge: Any = None
        if "rouge" in settings.metrics:
            from rouge_score.rouge_scorer import RougeScorer

            self._rouge = RougeScorer(list(GENERATION_METRICS["rouge"]))

    def check(self, reference: str) -> None:
        """Refuse a row's answer that cannot be compared.

        Raises:
            RowError: it does not match the pattern, has nothing that ROUGE looks at, or something that is no triple.
        """
        pattern = self.settings.answer_pattern
        if pattern is not None and extract_answer(reference, pattern) is None:
            raise RowError(f"the row's answer does not match evaluation.answer_pattern {pattern!r}: {reference[-60:]!r}")
        if self._rouge is not None and not re.search("[a-z0-9]", reference.lower()):
            raise RowError("rouge-score sees the letters a-z and digits alone, of which the row's answer has none: use chrf")
        if "triples" in self.settings.metrics and (malformed := self._triples(reference).malformed):
            raise RowError(f"the row's answer has something that is no triple: {malformed[0][:60]!r}; they are {EXPECTED}")

    def _triples(self, text: str) -> Parsed:
        return parse_triples(text, self.settings.triple_format, self.settings.triple_keys)

    def score(self, prediction: str, reference: str) -> dict[str, Any]:
        """What the metrics are made of, for one row; keys that begin with an underscore are for `summarise` alone."""
        found: dict[str, Any] = {"reference": reference, "prediction": prediction}
        if self._rouge is not None:
            found |= {name: float(score.fmeasure) for name, score in self._rouge.score(reference, prediction).items()}
        if "exact_match" in self.settings.metrics:
            found["exact_match"] = float(prediction.strip() == reference.strip())
        if (pattern := self.settings.answer_pattern) is not None:
            answer, wanted = extract_answer(prediction, pattern), extract_answer(reference, pattern)
            is_right = answer is not None and wanted is not None and is_same_answer(answer, wanted)
            found |= {"answer": answer, "answer_accuracy": float(is_right), "answer_missing": float(answer is None)}
        if "triples" in self.settings.metrics:
            found |= _compared(self._triples(prediction), self._triples(reference))
        return found | {f"_{name}": _counts(metric, prediction, reference) for name, metric in self._corpus.items()}

    def summarise(self, results: Sequence[Result]) -> dict[str, float]:
        """Metrics over all rows."""
        means = {name: math.fsum(result[name] for result in results) / len(results) for name in self._means}
        corpus = {
            name: float(metric._aggregate_and_compute([result[f"_{name}"] for result in results]).score)
            for name, metric in self._corpus.items()
        }
        return means | corpus | {name: float(value) for name, value in self._of_triples(results)(None).items()}

    def _of_triples(self, results: Sequence[Result]) -> Callable[[torch.Tensor | None], dict[str, torch.Tensor]]:
        """Metrics of triples, once (None) or in resamples (R, N)."""
        if "triples" not in self.settings.metrics:
            return lambda counts: {}
        values = column([result["_triples"] for result in results])

        def measured(counts: torch.Tensor | None) -> dict[str, torch.Tensor]:
            right, guessed, wanted, malformed, rows = (values.sum(0) if counts is None else counts @ values).unbind(-1)
            scores = (ratio(right, guessed), ratio(right, wanted), f1_of(right, guessed, wanted), ratio(malformed, rows))
            return dict(zip(GENERATION_METRICS["triples"], scores, strict=True))

        return measured

    def resampler(self, results: Sequence[Result]) -> Resampler:
        """The metrics of many resamples; BLEU and chrF from resampled counts (Koehn 2004, EMNLP, section 4)."""
        means = means_of({name: [result[name] for result in results] for name in self._means})
        counted = {name: column([result[f"_{name}"] for result in results]) for name in self._corpus}
        of_triples = self._of_triples(results)

        def resampled(counts: torch.Tensor) -> dict[str, torch.Tensor]:
            sums = {name: (counts @ values).tolist() for name, values in counted.items()}
            corpus = {
                name: column([self._corpus[name]._compute_score_from_stats(line).score for line in lines])
                for name, lines in sums.items()
            }
            return means(counts) | corpus | of_triples(counts)

        return resampled

    @property
    def signatures(self) -> dict[str, str]:
        """How each figure was made, in the libraries' own words; once a row was scored."""
        found = {name: str(metric.get_signature()) for name, metric in self._corpus.items()}
        return found | ({"rouge": f"rouge-score {importlib.metadata.version('rouge-score')}"} if self._rouge else {})

    @property
    def _means(self) -> list[str]:
        names = [name for name in self.settings.metrics if name not in self._corpus and name != "triples"]
        return [metric for name in names for metric in GENERATION_METRICS[name]]


def _compared(guess: Parsed, truth: Parsed) -> dict[str, Any]:
    """The triples of an answer and of its row; `_triples`: how many are right, guessed, wanted; 1 for malformed; 1 a row."""
    right = len(guess.triples & truth.triples)
    counts = [right, len(guess.triples), len(truth.triples), int(bool(guess.malformed)), 1]
    listed = {"triples": sorted(guess.triples), "reference_triples": sorted(truth.triples), "malformed": guess.malformed}
    return listed | {"_triples": [float(count) for count in counts]}


def _counts(metric: Any, prediction: str, reference: str) -> list[float]:
    """What sacrebleu counts of a row: lengths, matches, n-grams."""
    (counts,) = metric._extract_corpus_statistics([prediction], [[reference]])
    return [float(count) for count in counts]
