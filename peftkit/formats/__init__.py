"""The data formats. One function per format, and this table: grep finds every one of them here."""

from collections.abc import Callable, Sequence

from peftkit.formats.base import Format
from peftkit.formats.classification import CLASSIFICATION
from peftkit.formats.language import CHAT, INSTRUCTION, PROMPT_COMPLETION, SEQ2SEQ, TEXT
from peftkit.formats.pairs import PAIRS
from peftkit.formats.question_answering import QUESTION_ANSWERING
from peftkit.formats.tokens import TOKENS

# The order is the order in which `format: auto` tries them: the most specific columns first.
FORMATS: dict[str, Format] = {
    item.name: item
    for item in (CHAT, TOKENS, QUESTION_ANSWERING, CLASSIFICATION, PAIRS, PROMPT_COMPLETION, INSTRUCTION, SEQ2SEQ, TEXT)
}


def detect_format(columns: frozenset[str], fits: Callable[[Sequence[str]], bool] = lambda yields: True) -> Format | None:
    """The first format that rows with these columns are in and whose canonical columns fit; None where there is none."""
    return next((item for item in FORMATS.values() if item.matches(columns) and fits(item.yields)), None)
