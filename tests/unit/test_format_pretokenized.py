"""The pretokenized format: padding, labels of their own, and numbers that are none."""

from __future__ import annotations

from typing import Any

import pytest

from peftkit.formats import FORMATS
from peftkit.formats.base import RowError
from peftkit.formats.pretokenized import check_aligned

PRETOKENIZED = FORMATS["pretokenized"]
IDS = [5, 6, 7]


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"input_ids": IDS}, IDS, IDS),
        ({"input_ids": IDS, "labels": None, "attention_mask": None}, IDS, IDS),
        ({"input_ids": IDS, "labels": [-100, 6, 7]}, IDS, [-100, 6, 7]),
        ({"input_ids": [0, *IDS, 0, 0], "attention_mask": [0, 1, 1, 1, 0, 0]}, IDS, IDS),
        ({"input_ids": [*IDS, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}, IDS, [-100, 6, 7]),
        ({"input_ids": [*IDS, 0], "labels": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}, IDS, IDS),
        # Labels that are not their tokens' are a decoder's: their padding is theirs, whatever the mask says of the input.
        ({"input_ids": IDS, "labels": [8, 9]}, IDS, [8, 9]),
        ({"input_ids": [5, 0, 0], "labels": [8, 9, 1], "attention_mask": [1, 0, 0]}, [5], [8, 9, 1]),
        ({"input_ids": IDS, "labels": [8, 9, 1, -100, -100]}, IDS, [8, 9, 1]),
    ],
)
def test_a_good_row_loses_its_padding(row: dict[str, Any], ids: list[int], labels: list[int]) -> None:
    assert PRETOKENIZED.convert(row, True) == {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (None, [5, 6, 7, 8]),
        ([5, 6, 7, 8], [5, 6, 7, 8]),
        ([-100, -100, 7, 8], [5, 6]),
        ([-100, 6, -100, 8], [5, 6, 7]),
        ([-100, 6, 7, -100], [5]),
        ([-100] * 4, [5, 6, 7, 8]),
        ([1, 2], [5, 6, 7, 8]),
    ],
)
def test_inference_sees_the_tokens_before_the_last_that_are_learned(labels: Any, ids: list[int]) -> None:
    assert PRETOKENIZED.convert({"input_ids": [5, 6, 7, 8], "labels": labels}, False) == {"input_ids": ids}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"labels": IDS}, "no column `input_ids`; the row has `labels`"),
        ({"input_ids": []}, "column `input_ids` holds []; it must be a list with at least one whole number"),
        ({"input_ids": "5 6"}, "column `input_ids` holds '5 6'; it must be a list"),
        ({"input_ids": [5, -1]}, "column `input_ids` holds -1 at place 2; it must be a whole number from 0 on"),
        ({"input_ids": [5, -100]}, "column `input_ids` holds -100 at place 2"),
        ({"input_ids": [5, True]}, "column `input_ids` holds True at place 2"),
        ({"input_ids": [5.0]}, "column `input_ids` holds 5.0 at place 1"),
        ({"input_ids": [[5, 6]]}, "column `input_ids` holds [5, 6] at place 1"),
        ({"input_ids": [5, None]}, "column `input_ids` holds None at place 2"),
        ({"input_ids": IDS, "labels": []}, "column `labels` holds []"),
        ({"input_ids": IDS, "labels": [5, 6, -1]}, "holds -1 at place 3; it must be a whole number from 0 on, or -100"),
        ({"input_ids": IDS, "labels": [-100] * 3}, "every label is -100: there is nothing to learn"),
        ({"input_ids": IDS, "labels": [-100] * 5}, "every label is -100: there is nothing to learn"),
        ({"input_ids": IDS, "attention_mask": [1, 1]}, "column `attention_mask` has 2 numbers; every token (3) needs one"),
        ({"input_ids": IDS, "attention_mask": "111"}, "column `attention_mask` holds text; every token (3) needs one"),
        ({"input_ids": IDS, "attention_mask": [1, 2, 1]}, "column `attention_mask` holds other numbers than 0 and 1"),
        ({"input_ids": IDS, "attention_mask": [0, 0, 0]}, "column `attention_mask` is 0 everywhere"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1]}, "column `attention_mask` is 0 at place 2, between tokens"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_the_place(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        PRETOKENIZED.convert(row, True)
    assert words in str(caught.value)


def test_aligned_labels_pass_for_tasks_that_learn_their_own_input() -> None:
    check_aligned(PRETOKENIZED.convert({"input_ids": IDS, "labels": [-100, 6, 7]}, True))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([6, 7, -100], "label 1 is 6 and its token 5; every token has one label, its own id .labels are not shifted. or -100"),
        ([5, 6], "there are 2 labels for 3 tokens; every token has one label"),
    ],
)
def test_shifted_or_missing_labels_are_refused_for_tasks_that_learn_their_own_input(labels: list[int], words: str) -> None:
    with pytest.raises(RowError, match=words):
        check_aligned(PRETOKENIZED.convert({"input_ids": IDS, "labels": labels}, True))
