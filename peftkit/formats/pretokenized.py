"""The pretokenized format: token ids that another program made."""

from __future__ import annotations

from typing import Any

from peftkit.formats.base import IGNORED, CanonicalRow, Format, RawRow, RowError, columns_text, is_missing, kind_of, shown


def _pretokenized(row: RawRow, target: bool) -> CanonicalRow:
    if is_missing(row.get("input_ids")):
        raise RowError(f"no column `input_ids`; the row has {columns_text(row)}")
    ids = _numbers(row["input_ids"], "input_ids")
    labels = list(ids) if is_missing(row.get("labels")) else _numbers(row["labels"], "labels", IGNORED)
    kept = _kept(row.get("attention_mask"), len(ids))
    if are_aligned(ids, labels):
        labels = labels[kept]
    else:  # a sequence of their own, for a decoder: padded at the end, if at all
        labels = labels[: max((place for place, label in enumerate(labels, 1) if label != IGNORED), default=0)]
    ids = ids[kept]
    if not target:
        return {"input_ids": ids[: _prompt_length(ids, labels)]}
    if all(label == IGNORED for label in labels):
        raise RowError(f"every label is {IGNORED}: there is nothing to learn")
    return {"input_ids": ids, "labels": labels}


def _numbers(value: Any, column: str, extra: int | None = None) -> list[int]:
    """A list of whole numbers from 0 on, or `extra`."""
    if not isinstance(value, list) or not value:
        raise RowError(f"column `{column}` holds {shown(value)}; it must be a list with at least one whole number")
    if set(map(type, value)) != {int} or min(set(value) - {extra}, default=0) < 0:
        place, bad = next(
            (place, number)
            for place, number in enumerate(value, 1)
            if type(number) is not int or (number < 0 and number != extra)
        )
        allowed = "a whole number from 0 on" if extra is None else f"a whole number from 0 on, or {extra}"
        raise RowError(f"column `{column}` holds {shown(bad)} at place {place}; it must be {allowed}")
    return list(value)


def are_aligned(ids: list[int], labels: list[int]) -> bool:
    """Whether every label is that of its own token: as many labels as tokens, each the token's id or IGNORED."""
    return ids == labels or (
        len(ids) == len(labels) and all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    )


def check_aligned(canonical: CanonicalRow) -> None:
    """Refuse labels that are not those of their own tokens: what a task that learns its own input must do.

    Raises:
        RowError: naming the first label that is none.
    """
    ids, labels = canonical["input_ids"], canonical["labels"]
    if are_aligned(ids, labels):
        return
    wrong = f"there are {len(labels)} labels for {len(ids)} tokens"
    for place, (token, label) in enumerate(zip(ids, labels, strict=False), 1):
        if label not in (token, IGNORED):
            wrong = f"label {place} is {label} and its token {token}"
            break
    raise RowError(f"{wrong}; every token has one label, its own id (labels are not shifted) or {IGNORED}")


def _kept(mask: Any, num_tokens: int) -> slice:
    """The tokens that are no padding."""
    if is_missing(mask):
        return slice(None)
    if not isinstance(mask, list) or len(mask) != num_tokens:
        size = f"has {len(mask)} numbers" if isinstance(mask, list) else f"holds {kind_of(mask)}"
        raise RowError(f"column `attention_mask` {size}; every token ({num_tokens}) needs one, 0 or 1")
    if not set(map(type, mask)) <= {int, bool} or not set(mask) <= {0, 1}:
        raise RowError("column `attention_mask` holds other numbers than 0 and 1")
    if 1 not in mask:
        raise RowError("column `attention_mask` is 0 everywhere: there are no tokens")
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[start:end]:
        place = mask.index(0, start) + 1
        raise RowError(f"column `attention_mask` is 0 at place {place}, between tokens; only the ends can be padding")
    return slice(start, end)


def _prompt_length(ids: list[int], labels: list[int]) -> int:
    """Tokens before the last ones that are learned; all of them where no others come before those."""
    if not are_aligned(ids, labels):
        return len(ids)
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    while end and labels[end - 1] != IGNORED:
        end -= 1
    return end or len(ids)


PRETOKENIZED = Format(
    name="pretokenized",
    summary=f"input_ids, optional labels (default: all learned; {IGNORED}: not learned), optional attention_mask (0: padding)",
    yields=("input_ids", "labels"),
    matches=lambda names: "input_ids" in names,
    read=_pretokenized,
    example={"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
)
