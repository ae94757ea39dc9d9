"""The baseline: named entities with transformers' Trainer and peft alone, no peftkit.

    python benchmarks/plain_token_cls.py --model FOLDER --train train.jsonl --test test.jsonl --method lora

Rows are {"tokens": [words], "tags": [BIO tags]}. The first sub-token of a word carries its tag. Prints one JSON object:
precision, recall and F1 of whole entities (seqeval) over all words of the test rows; a word that is cut off or has no
sub-token gets the tag O.
"""

from __future__ import annotations

from typing import Any

from plain_common import adapt, fit, parse_options, read_rows, report
from seqeval.metrics import f1_score, precision_score, recall_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, set_seed

LEARNING_RATES = {"lora": 3e-3, "full": 3e-4}
IGNORED = -100


def encode(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> tuple[list[Any], list[dict[int, int]]]:
    """Rows as the model's inputs, and for each the position of every word's first sub-token."""
    inputs = [tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=max_length) for row in rows]
    positions: list[dict[int, int]] = []
    for encoding in inputs:
        first: dict[int, int] = {}
        for position, word in enumerate(encoding.word_ids()):
            if word is not None:
                first.setdefault(word, position)
        positions.append(first)
    return inputs, positions


def add_labels(inputs: list[Any], positions: list[dict[int, int]], rows: list[dict[str, Any]], tags: list[str]) -> None:
    """Labels at first sub-tokens, IGNORED elsewhere."""
    for encoding, first, row in zip(inputs, positions, rows, strict=True):
        labels = [IGNORED] * len(encoding["input_ids"])
        for word, position in first.items():
            labels[position] = tags.index(row["tags"][word])
        encoding["labels"] = labels


def main() -> None:
    """Train, evaluate, print."""
    options = parse_options(__doc__, LEARNING_RATES, epochs=2, max_length=256)
    set_seed(options.seed)
    train, test = read_rows(options.train, options.max_rows), read_rows(options.test)
    tags = sorted({tag for row in train for tag in row["tags"]})
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForTokenClassification.from_pretrained(options.model, num_labels=len(tags))
    model = adapt(model, options.method, task_type="TOKEN_CLS")
    inputs, positions = encode(train, tokenizer, options.max_length)
    add_labels(inputs, positions, train, tags)
    trainer, seconds = fit(model, inputs, DataCollatorForTokenClassification(tokenizer), options)
    inputs, positions = encode(test, tokenizer, options.max_length)
    best = trainer.predict(inputs).predictions.argmax(-1)  # (rows, longest)
    found = [["O"] * len(row["tokens"]) for row in test]
    for words, first, row_best in zip(found, positions, best, strict=True):
        for word, position in first.items():
            words[word] = tags[row_best[position]]
    true = [row["tags"] for row in test]
    metrics = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    report(options, model, seconds, {name: float(metric(true, found)) for name, metric in metrics.items()})


if __name__ == "__main__":
    main()
