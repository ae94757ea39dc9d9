"""Rows that join a batch in the middle get the tokens that they get alone, whatever the model's positions are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from peftkit.engine.continuous import can_join, join, start, trim
from peftkit.engine.decode import RunningBatch
from tests.engine.test_decode import model_of, prompts

JOINABLE = ("bloom", "falcon", "gpt2", "llama", "mixtral", "opt")


def begun(model: Any, rows: list[list[int]]) -> RunningBatch:
    """A batch of these prompts with its first token."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    batch = start(model, {"input_ids": ids, "attention_mask": (ids != 0).long()}, config)
    step(batch, is_first=True)
    return batch


def step(batch: RunningBatch, *, is_first: bool = False) -> None:
    batch.append(batch.next_logits(is_first=is_first).argmax(-1))


def alone(model: Any, row: list[int], count: int) -> list[int]:
    """The first tokens after a prompt."""
    batch = begun(model, [row])
    for _ in range(count - 1):
        step(batch)
    found: list[int] = batch.ids[0, -count:].tolist()
    return found


@pytest.mark.parametrize("model_type", JOINABLE)
@torch.inference_mode()
def test_rows_that_join_get_the_tokens_that_they_get_alone(model_type: str) -> None:
    model, rows = model_of(model_type), prompts()
    batch = begun(model, rows[1:3])
    for _ in range(4):
        step(batch)
    later = begun(model, [rows[0], rows[4]])
    assert can_join(batch)
    assert can_join(later)
    join(batch, later)
    for _ in range(3):
        step(batch)
    for row, found, count in zip((rows[1], rows[2], rows[0], rows[4]), batch.ids, (8, 8, 4, 4), strict=True):
        assert found[-count:].tolist() == alone(model, row, count)


@torch.inference_mode()
def test_padding_goes_with_the_longest_row() -> None:
    model, rows = model_of("llama"), prompts()
    batch = begun(model, [rows[1], rows[3]])  # of 11 and of 2 tokens
    batch.keep(torch.tensor([1]))
    trim(batch)
    assert batch.ids.shape == (1, 3)
    step(batch)
    assert batch.inputs["past_key_values"].get_seq_length() == 3
    assert batch.ids[0, -2:].tolist() == alone(model, rows[3], 2)


@pytest.mark.parametrize("model_type", ["gemma2", "t5"])
@torch.inference_mode()
def test_windows_and_encoders_stay_apart(model_type: str) -> None:
    model = model_of(model_type)
    ids = torch.tensor([prompts()[1]])
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, decoder_start_token_id=0)
    batch = start(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config)
    step(batch, is_first=True)
    assert not can_join(batch)
