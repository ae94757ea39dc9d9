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
