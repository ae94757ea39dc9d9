"""Formats of plain text: prompt_completion, text, seq2seq."""

from __future__ import annotations

from typing import Any

from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, is_missing, kind_of, shown, text_of
from peftkit.formats.messages import as_prompt, check_answer, check_only_text, check_wanted, messages_of, tools_of, with_system

_COMPLETIONS = ("completion", "response")


def _prompt_completion(row: RawRow, target: bool) -> CanonicalRow:
    check_only_text(row)
    if target:
        check_wanted(row)
    if not is_missing(row.get("segments")):
        return {"segments": _segments(row["segments"], target)}
    if isinstance(row.get("prompt"), list):
        return _conversation(row, target)
    result = {"prompt": text_of(row, "prompt")}
    if text_of(row, "system", "system_prompt", required=False):
        raise RowError(
            "a text in `prompt` is used as it is, so that the system prompt would be lost; use `format: instruction` with "
            "`columns: {instruction: prompt}`"
        )
    return result | {"completion": text_of(row, *_COMPLETIONS)} if target else result


def _conversation(row: RawRow, target: bool) -> CanonicalRow:
    """Messages from a prompt and a completion that are lists of turns; of the prompt's turns none is learned."""
    prompt = as_prompt(with_system(messages_of(row["prompt"], "prompt", " of `prompt`"), row))
    if not target:
        return {"messages": prompt} | tools_of(row)
    column = next((name for name in _COMPLETIONS if not is_missing(row.get(name))), "completion")
    if isinstance(row.get(column), str):
        raise RowError(f"`prompt` is a list of turns and `{column}` is text; both must be lists, or both texts")
    completion = messages_of(row.get(column), column, f" of `{column}`")
    check_answer(completion)
    return {"messages": [*prompt, *completion]} | tools_of(row)


def _segments(segments: Any, target: bool) -> list[dict[str, Any]]:
    if not isinstance(segments, list) or not segments:
        raise RowError(f"column `segments` holds {shown(segments)}; it must be a list of segments with text and label")
    made = [_segment(segment, number) for number, segment in enumerate(segments, 1)]
    if target:
        if not any(segment["train"] and segment["text"].strip() for segment in made):
            raise RowError("no segment with text has `label: true`: there is nothing to learn")
        return made
    while made and made[-1]["train"]:
        made.pop()
    if not any(segment["text"].strip() for segment in made):
        raise RowError("no segment with text comes before those that are learned: there is nothing to continue")
    return made


def _segment(segment: Any, number: int) -> dict[str, Any]:
    if not isinstance(segment, dict):
        raise RowError(f"segment {number} is {kind_of(segment)}, not a mapping with text and label")
    train = segment.get("train") if is_missing(segment.get("label")) else segment["label"]
    if not isinstance(train, bool):
        raise RowError(f"segment {number} has the `label` {shown(train)}; it must be true (learned) or false")
    if not isinstance(segment.get("text"), str):
        raise RowError(f"segment {number} has no text in `text`")
    return {"text": segment["text"], "train": train}


def _text(row: RawRow, target: bool) -> CanonicalRow:
    return {"text": text_of(row, "text")}


def _seq2seq(row: RawRow, target: bool) -> CanonicalRow:
    if isinstance(row.get("translation"), dict) and not {"source", "target"} & row.keys():
        names = [str(name) for name in row["translation"]]
        first, second = names[:2] if len(names) > 1 else ("en", "de")
        raise RowError(
            f"`translation` has {', '.join(names) or 'no languages'} and does not say which is the source; set `columns: "
            f"{{source: translation.{first}, target: translation.{second}}}`, or the other way round"
        )
    result = {"prompt": text_of(row, "source")}
    return result | {"completion": text_of(row, "target")} if target else result


PROMPT_COMPLETION = Format(
    name="prompt_completion",
    summary="prompt and completion (or response): texts used as they are, without chat template, or lists of messages; "
    "or segments [{text, label: whether it is learned}]",
    yields=("prompt", "completion"),
    matches=lambda names: ("prompt" in names and bool(names & {*_COMPLETIONS})) or "segments" in names,
    read=_prompt_completion,
    example={"prompt": "2 + 3 =", "completion": " 5"},
    also_yields=(("messages",), ("segments",)),
)
TEXT = Format(
    name="text",
    summary="text, every token of which is learned (continued pretraining)",
    yields=("text",),
    matches=lambda names: "text" in names and not names & {"label", "labels"},
    read=_text,
    example={"text": "Two and three make five."},
)
SEQ2SEQ = Format(
    name="seq2seq",
    summary="source and target, used as they are",
    yields=("prompt", "completion"),
    matches=lambda names: {"source", "target"} <= names or "translation" in names,
    read=_seq2seq,
    example={"source": "two and three", "target": "zwei und drei"},
)
