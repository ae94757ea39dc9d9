"""The question_answering format: a question, a context, and where in it the answers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, flag_of, is_missing, shown, text_of


def _question_answering(row: RawRow, target: bool) -> CanonicalRow:
    result: CanonicalRow = {"question": text_of(row, "question"), "context": text_of(row, "context")}
    if not target:
        return result
    texts, starts = [], []
    for text, start in _checked_answers(row):
        texts.append(text.strip())
        starts.append(_checked_start(text, start, result["context"]))
    return result | {"answers": {"text": texts, "answer_start": starts}}


def _checked_answers(row: RawRow) -> list[tuple[str, Any]]:
    """The answers, of which there are some just where `is_impossible`, if it is there, says so."""
    impossible = flag_of(row, "is_impossible")
    if impossible and all(is_missing(row.get(name)) for name in ("answers", "answer")):
        return []
    answers = _answers(row)
    if impossible is not None and impossible == bool(answers):
        raise RowError(f"`is_impossible` says {str(impossible).lower()}, and there are {len(answers)} answers")
    return answers


def _answers(row: RawRow) -> list[tuple[str, Any]]:
    """Text and start of every answer: SQuAD's two lists, a list of mappings, or one answer in two columns."""
    answers = row.get("answers")
    if isinstance(answers, Mapping):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if (
            not (isinstance(texts, Sequence) and isinstance(starts, Sequence))
            or isinstance(texts, str)
            or len(texts) != len(starts)
        ):
            raise RowError("`answers` needs the lists `text` and `answer_start`, of equal length")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(answers, list):
        if not all(isinstance(answer, Mapping) for answer in answers):
            raise RowError("`answers` is a list of something else than mappings with `text` and `answer_start`")
        pairs = [(answer.get("text"), answer.get("answer_start")) for answer in answers]
    elif is_missing(answers) and "answer" in row:
        pairs = [(row["answer"], row.get("answer_start"))] if row["answer"] and not is_missing(row["answer"]) else []
    else:
        raise RowError("no `answers` ({text: [...], answer_start: [...]}; empty lists where there is none) nor `answer`")
    for text, _ in pairs:
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"an answer is {shown(text)}, not text; a question without answer has an empty list")
    return pairs


def _checked_start(text: str, start: Any, context: str) -> int:
    """The first character of the answer, white space left out."""
    if isinstance(start, str) and start.strip().isdigit():  # CSV
        start = int(start)
    if isinstance(start, bool) or not isinstance(start, int):
        raise RowError(f"the answer {shown(text)} has the `answer_start` {shown(start)}, not a whole number")
    found = context[start : start + len(text)] if start >= 0 else ""
    if found != text:
        raise RowError(f"the answer {shown(text)} is not in the context at `answer_start` {start}: there is {shown(found)}")
    return start + len(text) - len(text.lstrip())


QUESTION_ANSWERING = Format(
    name="question_answering",
    summary="question, context, answers {text: [...], answer_start: [...]} (or a list of {text, answer_start}, or answer and "
    "answer_start); no answer: empty lists, or is_impossible",
    yields=("question", "context", "answers"),
    matches=lambda names: {"question", "context"} <= names and bool(names & {"answers", "answer_start"}),
    read=_question_answering,
    example={"question": "Who left?", "context": "Ada left.", "answers": {"text": ["Ada"], "answer_start": [0]}},
)
