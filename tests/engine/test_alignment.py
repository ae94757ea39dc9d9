"""Tags at the right tokens, and decoder inputs that are the target shifted by one, for whatever model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.formats.base import RowError
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX
from peftkit.tasks.seq_2_seq_lm_torch import Runtime as Seq2SeqRuntime
from peftkit.tasks.token_cls_torch import Runtime as TaggingRuntime
from tests.conftest import bert_like_tokenizer, tiny_tokenizer

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
_LETTERS = st.characters(codec="utf-8", categories=("L", "N", "P", "S"))
WORDS = st.lists(st.text(_LETTERS, min_size=1, max_size=9), min_size=1, max_size=12)


@cache
def tagging(max_length: int = 512, truncation: str = "error", *, every: bool = False) -> TaggingRuntime:
    """A runtime on a byte-level tokenizer, which knows every character."""
    return TaggingRuntime(tiny_tokenizer(), Encoding(max_length, truncation, labels=TAGS, label_all_tokens=every))


@given(words=WORDS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_tags_go_round(words: list[str], data: Any) -> None:
    tags = data.draw(st.lists(st.sampled_from(TAGS), min_size=len(words), max_size=len(words)))
    (example,) = tagging().encode({"tokens": words, "tags": tags}, "rows:1")
    read = [TAGS[example.labels[place]] for _, place in example.details["places"]]
    assert read == tags
    assert sum(label != IGNORE_INDEX for label in example.labels) == len(words)


@given(words=WORDS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_with_all_tokens_a_word_is_inside_of_what_it_begins(words: list[str], data: Any) -> None:
    tags = data.draw(st.lists(st.sampled_from(TAGS), min_size=len(words), max_size=len(words)))
    (example,) = tagging(every=True).encode({"tokens": words, "tags": tags}, "rows:1")
    starts = [place for _, place in example.details["places"]]
    read = [TAGS[label] for label in example.labels if label != IGNORE_INDEX]
    assert [TAGS[example.labels[place]] for place in starts] == tags
    owners = [
        sum(place >= start for start in starts) - 1 for place, label in enumerate(example.labels) if label != IGNORE_INDEX
    ]
    first = {starts[word] for word in range(len(words))}
    places = [place for place, label in enumerate(example.labels) if label != IGNORE_INDEX]
    expected = [
        tags[word] if place in first else tags[word].replace("B-", "I-") for word, place in zip(owners, places, strict=True)
    ]
    assert read == expected


@given(words=WORDS.filter(lambda words: len(words) > 2))
@settings(max_examples=100, deadline=None)
def test_split_parts_hold_every_word_once(words: list[str]) -> None:
    tags = ["B-PER" if number % 2 else "O" for number in range(len(words))]
    examples = tagging(20, "split").encode({"tokens": words, "tags": tags}, "rows:1")
    assert [word for example in examples for word in example.details["words"]] == words
    assert all(example.length <= 20 for example in examples)
    assert [TAGS[example.labels[place]] for example in examples for _, place in example.details["places"]] == tags


MODELS: dict[str, Any] = {
    "t5": transformers.T5Config(
        vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    ),
    "mt5": transformers.MT5Config(
        vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    ),
    **{
        name: config_class(
            vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=start, forced_eos_token_id=2,
        )
        for name, config_class, start in (
            ("bart", transformers.BartConfig, 2), ("marian", transformers.MarianConfig, 0),
            ("pegasus", transformers.PegasusConfig, 0),
        )
    },
}  # fmt: skip
STARTS = {name: config.decoder_start_token_id for name, config in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_reads_its_start_and_the_target_but_for_the_end(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(MODELS[name]).eval()
    runtime = Seq2SeqRuntime(tiny_tokenizer(adds_end=True), Encoding(60, source_prefix="turn: "))
    rows = [{"prompt": "the cat sat", "completion": "two red birds"}, {"prompt": "dogs", "completion": "home"}]
    examples = [example for row in rows for example in runtime.encode(row, "rows:1")]
    seen: list[torch.Tensor] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    batch = runtime.collate(examples)
    with torch.no_grad():
        logits = runtime.forward(model, batch)
    for ids, example in zip(seen[0].tolist(), examples, strict=True):
        assert ids[: len(example.labels)] == [STARTS[name], *example.labels[:-1]]
    assert all(example.labels[-1] == 2 and IGNORE_INDEX not in example.labels for example in examples)
    assert float(runtime.loss_sum(logits, batch["labels"])) > 0


def test_the_prefix_is_in_front_of_every_source_in_training_and_inference() -> None:
    tokenizer = tiny_tokenizer(adds_end=True)
    runtime = Seq2SeqRuntime(tokenizer, Encoding(60, source_prefix="turn: "))
    row = {"prompt": "the cat", "completion": "sat"}
    for target in (True, False):
        (example,) = runtime.encode(row, "rows:1", target=target)
        assert tokenizer.decode(example.inputs["input_ids"], skip_special_tokens=True) == "turn: the cat"


def test_a_pretokenised_source_and_target_are_taken_as_they_are() -> None:
    runtime = Seq2SeqRuntime(tiny_tokenizer(adds_end=True), Encoding(60))
    (example,) = runtime.encode({"input_ids": [5, 6, 7, 2], "labels": [9, -100, 2]}, "rows:1")
    assert (example.inputs, example.labels, example.num_targets) == ({"input_ids": [5, 6, 7, 2]}, [9, -100, 2], 2)
    with pytest.raises(RowError, match=r"`labels` has the token 999 \(place 2\); the tokenizer has the tokens 0 to"):
        runtime.encode({"input_ids": [5], "labels": [9, 999]}, "rows:1")


def test_a_tokenizer_with_special_tokens_keeps_them_around_every_part() -> None:
    runtime = TaggingRuntime(bert_like_tokenizer(), Encoding(6, "split", labels=TAGS))
    words = ["the", "cat", "sat", "on", "a", "mat"]
    for example in runtime.encode({"tokens": words, "tags": ["O"] * 6}, "rows:1"):
        tokens = runtime.tokenizer.convert_ids_to_tokens(example.inputs["input_ids"])
        assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
