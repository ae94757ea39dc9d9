"""One of several processes that share out the tokens of rows: `python -m tests.context_worker RANK WORLD_SIZE PORT TYPE...`.

It prints, for each model type, how far loss and gradients of all of them are from those of one process that has every token.
"""

from __future__ import annotations

import math
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from peftkit.engine.context_parallel import split_batch
from peftkit.engine.segments import CONTEXT
from peftkit.engine.step import Step
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX
from tests.conftest import tiny_tokenizer
from tests.contracts.test_packing import loss_and_gradients, loss_by_row
from tests.contracts.test_packing_types import packed_batch, small_config, small_model


def split_loss(model: Any, rank: int, world: int) -> torch.Tensor:
    """This process's part of the loss of the rows that `loss_by_row` computes whole."""
    batch = packed_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
    step = Step(model, TASKS["CAUSAL_LM"].runtime(tiny_tokenizer(), Encoding(max_length=8)))
    step.splits_rows = True
    return step(split_batch(batch, model, world, rank))


def differences(model_type: str, rank: int, world: int) -> tuple[float, float]:
    """Of the loss, and of the norm of the gradients, as shares."""
    torch.manual_seed(0)
    model = small_model(small_config(model_type), "sdpa") or small_model(small_config(model_type), "eager")
    model.train()
    loss, gradients = loss_and_gradients(model, loss_by_row)
    model.set_attn_implementation(CONTEXT)
    if model.config._attn_implementation != CONTEXT:
        return math.nan, math.nan  # its layers do not ask transformers for their attention
    part, own = loss_and_gradients(model, lambda model: split_loss(model, rank, world))
    found = torch.cat([torch.tensor([part]), own])
    dist.all_reduce(found)
    return abs(float(found[0]) - loss) / loss, float((found[1:] - gradients).norm() / gradients.norm())


if __name__ == "__main__":
    rank, world, port = map(int, sys.argv[1:4])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name in sys.argv[4:]:
        print(name, *differences(name, rank, world), flush=True)
