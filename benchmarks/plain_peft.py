"""The baseline: the same sentence classification with transformers' Trainer and peft alone, no peftkit.

    python benchmarks/plain_peft.py --model FOLDER --train train.jsonl --test test.jsonl

Rows are {"text": ..., "label": 0 | 1}. Prints one JSON object: accuracy on the test rows, trained parameters, seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def read(path: Path, tokenizer, max_length: int) -> list[dict]:
    """Encoded rows of a JSON lines file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [tokenizer(row["text"], truncation=True, max_length=max_length) | {"labels": int(row["label"])} for row in rows]


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="/tmp/plain_peft")
    options = parser.parse_args()
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=options.output,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        seed=options.seed,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=read(options.train, tokenizer, options.max_length),
        eval_dataset=read(options.test, tokenizer, options.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda result: {"accuracy": float((np.argmax(result.predictions, -1) == result.label_ids).mean())},
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    accuracy = trainer.evaluate()["eval_accuracy"]
    trained = model.get_nb_trainable_parameters()[0]
    print(json.dumps({"accuracy": accuracy, "trainable_params": trained, "train_seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
