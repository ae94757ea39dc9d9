"""SEQ_2_SEQ_LM: encoder inputs, decoder labels, and metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM

from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Runtime, TooLong
from tests.conftest import tiny_tokenizer

ROWS = [{"prompt": "the cat sat", "completion": "on a mat"}, {"prompt": "two red birds", "completion": "saw seven small dogs"}]


def runtime_of(**settings: Any) -> Runtime:
    """With a tokenizer that ends every text with </s>, as T5's does."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return TASKS["SEQ_2_SEQ_LM"].runtime(tokenizer, Encoding(**{"max_length": 64} | settings))


def batch_of(runtime: Runtime, rows: list[dict[str, str]]) -> Any:
    return runtime.collate([example for row in rows for example in runtime.encode(row, "rows:1")])


def test_the_encoder_reads_the_prompt_and_the_completion_with_its_end_is_learned() -> None:
    runtime = runtime_of()
    (example,) = runtime.encode(ROWS[0], "rows:1")
    assert runtime.tokenizer.decode(example.inputs["input_ids"]) == "the cat sat</s>"
    assert runtime.tokenizer.decode(example.labels) == "on a mat</s>"
    assert example.num_targets == len(runtime.tokenizer("on a mat")["input_ids"])


def test_an_end_token_is_learned_where_the_tokenizer_adds_none() -> None:
    runtime = TASKS["SEQ_2_SEQ_LM"].runtime(tiny_tokenizer(None), Encoding(max_length=64))
    (example,) = runtime.encode(ROWS[0], "rows:1")
    assert runtime.tokenizer.decode(example.labels) == "on a mat</s>"


def test_the_decoder_reads_the_labels_shifted_by_one(models_dir: Path) -> None:
    runtime = runtime_of()
    batch = batch_of(runtime, ROWS)
    model = AutoModelForSeq2SeqLM.from_pretrained(models_dir / "t5").eval()
    seen: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    runtime.forward(model, batch)
    start = torch.full((2, 1), model.config.decoder_start_token_id)
    expected = torch.cat([start, batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == IGNORE_INDEX, 0)], dim=1)
    assert torch.equal(seen[0], expected)


def test_the_loss_is_that_of_transformers_times_the_targets(models_dir: Path) -> None:
    runtime = runtime_of()
    batch = batch_of(runtime, ROWS)
    model = AutoModelForSeq2SeqLM.from_pretrained(models_dir / "t5").eval()
    num_targets = int((batch["labels"] != IGNORE_INDEX).sum())
    with torch.no_grad():
        ours = runtime.loss_sum(runtime.forward(model, batch), batch["labels"])
        assert float(ours) == pytest.approx(float(model(**batch).loss) * num_targets, rel=1e-6)


def test_conversations_are_flattened_without_a_template() -> None:
    runtime = runtime_of()
    turns = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "and"},
    ]
    (example,) = runtime.encode({"messages": [*turns, {"role": "assistant", "content": "ran"}]}, "rows:1")
    assert runtime.tokenizer.decode(example.inputs["input_ids"]) == "the cat\nsat\nand</s>"
    assert runtime.tokenizer.decode(example.labels) == "ran</s>"


@pytest.mark.parametrize("row", [ROWS[1], {"prompt": ROWS[1]["completion"], "completion": ROWS[1]["prompt"]}])
def test_either_side_may_be_too_long(row: dict[str, str]) -> None:
    with pytest.raises(TooLong):
        runtime_of(max_length=5).encode(row, "rows:1")
    assert runtime_of(max_length=5, truncation="drop").encode(row, "rows:1") == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_cut_text_keeps_the_side_that_is_not_named_and_its_end_token(side: str) -> None:
    runtime = runtime_of(max_length=4, truncation=side)
    (example,) = runtime.encode(ROWS[1], "rows:1")
    whole = [runtime.tokenizer(ROWS[1][name])["input_ids"] for name in ("prompt", "completion")]
    cut = [ids[-4:] if side == "left" else [*ids[:3], ids[-1]] for ids in whole]
    assert [example.inputs["input_ids"], example.labels] == cut
    assert example.num_targets == 4


def test_loss_perplexity_and_token_accuracy_are_per_target() -> None:
    results = [
        {"loss_sum": 3.0, "num_targets": 2, "num_tokens": 2, "num_correct": 1},
        {"loss_sum": 1.0, "num_targets": 6, "num_tokens": 6, "num_correct": 6},
    ]
    assert runtime_of().summarise(results) == {"loss": 0.5, "perplexity": math.exp(0.5), "token_accuracy": 7 / 8}


def test_scores_count_the_tokens_that_are_guessed_right() -> None:
    runtime = runtime_of()
    labels = torch.tensor([[5, 6, IGNORE_INDEX]])
    logits = torch.zeros(1, 3, 300)
    logits[0, 0, 5], logits[0, 1, 7], logits[0, 2, 9] = 9.0, 9.0, 9.0
    (score,) = runtime.score(logits, {"labels": labels}, [])
    assert (score["num_targets"], score["num_correct"]) == (2, 1)
    assert score["next_token_prediction"] == runtime.tokenizer.decode([5, 7])
    by_hand = 2 * math.log(math.exp(9) + 299) - 9
    assert score["loss_sum"] == pytest.approx(by_hand, rel=1e-5)
