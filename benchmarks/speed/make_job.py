"""The model, the tokenizer and the rows of the common job: made, not downloaded, the same on every machine.

    python benchmarks/speed/make_job.py FOLDER --vocab-size 32000 --max-length 512

A Llama with random weights (58M parameters with 32,000 tokens); a byte-level BPE of 8,000 tokens, the model's vocabulary
padded to what is asked for; rows of one question and one answer. Lengths follow a log-normal distribution, cut at the
maximum: batches of 8 in file order are 40% padding, and about 60% of a row is answer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

BPE_TOKENS = 8000
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]


def make_words(generator: random.Random) -> list[str]:
    """Words of two to four syllables, the frequent ones first."""
    words = dict.fromkeys("".join(generator.choices(SYLLABLES, k=generator.randint(2, 4))) for _ in range(40_000))
    return list(words)


def pick_words(words: list[str], count: int, generator: random.Random) -> list[str]:
    """Words at random, about as unevenly as in a language (Zipf)."""
    return [words[int(len(words) ** generator.random()) - 1] for _ in range(count)]


def make_tokenizer(words: list[str], generator: random.Random) -> Any:
    """A byte-level BPE with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS, special_tokens=[PAD, USER, ASSISTANT, END], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator((" ".join(pick_words(words, 40, generator)) for _ in range(5000)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=END, padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(options: argparse.Namespace, tokenizer: Any) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 43 // 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 64,
        max_position_embeddings=max(2048, options.max_length),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_row(words: list[str], max_length: int, tokenizer: Any, generator: random.Random) -> dict[str, Any]:
    """A question and an answer: as chat, and as token ids with the question masked."""
    length = min(max_length, max(16, round(generator.lognormvariate(-0.68, 0.5) * max_length)))
    num_question = max(2, round(length * generator.uniform(0.2, 0.6))) - 3  # the marks of the turns are 4 tokens
    texts = [
        _text(words, count, tokenizer, generator) for count in (max(1, num_question), max(1, length - max(1, num_question) - 4))
    ]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    user, assistant, end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END])
    prompt, answer = [user, *ids[0], end, assistant], [*ids[1], end]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert rendered == prompt + answer, "the template renders the row as laid out here"
    return {
        "messages": messages,
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
        "attention_mask": [1] * (len(prompt) + len(answer)),
    }


def _text(words: list[str], num_tokens: int, tokenizer: Any, generator: random.Random) -> str:
    """Words of exactly so many tokens, or a few fewer where the last word would be cut."""
    ids = tokenizer.encode(" ".join(pick_words(words, num_tokens, generator)), add_special_tokens=False)
    text = tokenizer.decode(ids[:num_tokens])
    return str(text.strip())


def main() -> None:
    """Write the folder: model, rows.jsonl, tokens.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    generator = random.Random(0)
    words = make_words(generator)
    tokenizer = make_tokenizer(words, generator)
    model_dir = options.folder / "model"
    make_model(options, tokenizer).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    rows = [make_row(words, options.max_length, tokenizer, generator) for _ in range(options.rows)]
    for name, keys in (("tokens.jsonl", ("input_ids", "labels", "attention_mask")), ("rows.jsonl", ("messages",))):
        lines = [json.dumps({key: row[key] for key in keys}) + "\n" for row in rows]
        (options.folder / name).write_text("".join(lines), encoding="utf-8")  # rows.jsonl last: with it the job is complete


if __name__ == "__main__":
    main()
