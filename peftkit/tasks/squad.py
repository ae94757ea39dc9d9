"""How answers are compared: the normalisation, exact match and F1 of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(guess: str, answers: Sequence[str]) -> float:
    """1 where the guess is one of the answers (or empty, where there are none), else 0."""
    return max(float(normalise(guess) == normalise(answer)) for answer in answers or [""])


def f1(guess: str, answers: Sequence[str]) -> float:
    """The best F1 of the guess's words with those of any answer, 0 to 1."""
    return max(_word_f1(normalise(guess).split(), normalise(answer).split()) for answer in answers or [""])


def _word_f1(guess: list[str], answer: list[str]) -> float:
    if not guess or not answer:
        return float(guess == answer)
    common = sum((Counter(guess) & Counter(answer)).values())
    return 2 * common / (len(guess) + len(answer))


def best_threshold(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """The best mean figure that a threshold of "no answer" gives, and the lowest threshold that gives it.

    Searched as SQuAD 2.0's own grader does (Rajpurkar et al. 2018, arXiv:1806.03822), over the rows' scores.

    Args:
        rows: of each row how much higher the score of "no answer" is than that of its best answer, and its figure (exact match
            or F1) with that answer and without one.
    """
    ordered = sorted(rows)
    total = sum(without for _, _, without in ordered)
    best, threshold = total, ordered[0][0] - 1.0
    for place, (score, answered, without) in enumerate(ordered):
        total += answered - without
        is_last = place + 1 == len(ordered) or ordered[place + 1][0] > score
        if is_last and total > best:
            best, threshold = total, score
    return best / len(ordered), threshold
