"""The baseline: the same sentence classification with transformers' Trainer and peft alone, no peftkit.

    python benchmarks/plain_peft.py --model FOLDER --train train.jsonl --test test.jsonl --method lora

Rows are {"text": ..., "label": 0 | 1}. Prints one JSON object: accuracy on the test rows, trained parameters, seconds.
BitFit, bottleneck adapters and the head alone, which peft does not have, are plain torch.
"""

from __future__ import annotations

from typing import Any

from plain_common import adapt, fit, parse_options, read_rows, report
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

LEARNING_RATES = {"lora": 1e-3, "ia3": 3e-2, "bitfit": 5e-3, "prefix": 3e-2, "bottleneck": 1e-3, "full": 1e-4, "head": 1e-2}


def encode(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Rows as the model's inputs, cut at the right end."""
    return [tokenizer(row["text"], truncation=True, max_length=max_length) | {"labels": int(row["label"])} for row in rows]


def main() -> None:
    """Train, evaluate, print."""
    options = parse_options(__doc__, LEARNING_RATES, epochs=2, max_length=64)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    model = adapt(model, options.method, task_type="SEQ_CLS")
    train = encode(read_rows(options.train, options.max_rows), tokenizer, options.max_length)
    trainer, seconds = fit(model, train, DataCollatorWithPadding(tokenizer), options)
    result = trainer.predict(encode(read_rows(options.test), tokenizer, options.max_length))
    accuracy = (result.predictions.argmax(-1) == result.label_ids).mean()
    report(options, model, seconds, {"accuracy": float(accuracy)})


if __name__ == "__main__":
    main()
