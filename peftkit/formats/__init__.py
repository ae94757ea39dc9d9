"""The data formats. One function per format, and this table: grep finds every one of them here."""

from collections.abc import Callable, Mapping, Sequence

from peftkit.formats.base import Format
from peftkit.table import Table

# The order is the order in which `format: auto` tries them: the most specific columns first.
_MODULES = {
    "pretokenized": "pretokenized",
    "preference": "preference",
    "chat": "chat",
    "tokens": "tokens",
    "question_answering": "question_answering",
    "classification": "classification",
    "pairs": "pairs",
    "prompt_completion": "language",
    "instruction": "instruction",
    "seq2seq": "language",
    "text": "language",
}
FORMATS: Mapping[str, Format] = Table({name: f"peftkit.formats.{module}:{name.upper()}" for name, module in _MODULES.items()})


def detect_format(columns: frozenset[str], fits: Callable[[Sequence[str]], bool] = lambda yields: True) -> Format | None:
    """The first format that rows with these columns are in and whose canonical columns fit; None where there is none."""
    return next((item for item in FORMATS.values() if item.matches(columns) and fits(item.yields)), None)
