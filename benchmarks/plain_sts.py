"""The baseline: similarity of sentence embeddings in a plain torch loop with peft alone, no peftkit.

    python benchmarks/plain_sts.py --model FOLDER --train train.jsonl --test test.jsonl --method lora

Rows are {"sentence1": ..., "sentence2": ..., "score": 0 to 5}. Embeddings are the mean of the last hidden states, of length 1;
their cosine learns score / 5 by squared error. Prints one JSON object: Spearman's rank correlation on the test rows, after
training and before.
"""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

import torch
from plain_common import adapt, parse_options, read_rows, report
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}


def cosines(model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> torch.Tensor:
    """Similarity of the two sentences of each row: (rows,)."""
    texts = [row["sentence1"] for row in rows] + [row["sentence2"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt").to(DEVICE)
    hidden = model(**batch).last_hidden_state  # (2 * rows, tokens, hidden)
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    vectors = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return (vectors[: len(rows)] * vectors[len(rows) :]).sum(-1)


@torch.no_grad()
def spearman(model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> float:
    """Rank correlation of cosines and scores."""
    model.eval()
    found = [cosines(model, rows[at : at + 64], tokenizer, max_length).cpu() for at in range(0, len(rows), 64)]
    return float(spearmanr(torch.cat(found).numpy(), [row["score"] for row in rows]).statistic)


def train_model(model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any, options: Namespace) -> None:
    """As the Trainer does: AdamW without weight decay, linear decay to zero, clipping at 1."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    loader = torch.utils.data.DataLoader(rows, batch_size=options.batch_size, shuffle=True, collate_fn=list)
    num_steps = round(len(loader) * options.epochs)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, num_steps)
    model.train()
    step = 0
    while step < num_steps:
        for batch in loader:
            scores = torch.tensor([row["score"] / 5 for row in batch], device=DEVICE)
            functional.mse_loss(cosines(model, batch, tokenizer, options.max_length), scores).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step == num_steps:
                break


def main() -> None:
    """Train, evaluate, print."""
    options = parse_options(__doc__, LEARNING_RATES, epochs=1, max_length=128)
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = adapt(AutoModel.from_pretrained(options.model), options.method, task_type="FEATURE_EXTRACTION").to(DEVICE)
    test = read_rows(options.test)
    before = spearman(model, test, tokenizer, options.max_length)
    started = time.perf_counter()
    train_model(model, read_rows(options.train, options.max_rows), tokenizer, options)
    seconds = time.perf_counter() - started
    after = spearman(model, test, tokenizer, options.max_length)
    report(options, model, seconds, {"spearman": after, "spearman_before": before})


if __name__ == "__main__":
    main()
