"""`training.micro_batch_size: auto`: the largest pass that is of use and fits; the batch, and with it the result, stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from peftkit.engine.largest import find_largest_pass
from peftkit.engine.limits import usable_bytes
from peftkit.engine.memory import plan_memory
from peftkit.engine.survey import Survey
from peftkit.launch_file import Sharding
from peftkit.plan import MICRO_BATCH, Plan, with_micro_batch
from peftkit.run import Run

# Tokens of a pass beyond which a GPU gains nothing. A product with weights in 16 bits does as many operations a byte as there
# are tokens, and an H100 can do 295 in the time that it reads one (989 TFLOPS, 3.35 TB/s: its data sheet); some thirty times
# as many leave the starts of kernels and their last, partly filled waves no weight either (NVIDIA, "Matrix Multiplication
# Background User's Guide", wave quantisation).
USEFUL_TOKENS = 8192


def settle_micro_batch(found: Survey, sharding: Sharding, before: Run | None = None) -> Survey:
    """Decide on the micro-batch size by the memory plan, where the recipe says auto.

    On a GPU: powers of two, as many sequences as make `USEFUL_TOKENS` tokens on average, fewer where the plan's total is more
    than fits. Elsewhere: `make_plan`'s few sequences, fewer where they do not fit. A run that goes on keeps what it has.

    Args:
        found: the run; its plan has a provisional size.
        sharding: how processes share it.
        before: the run to go on with.
    """
    plan = found.plan
    if not plan.decides(MICRO_BATCH):
        return found
    if before is not None and (kept := kept_micro_batch(before, plan)) is not None:
        return _with(found, kept, "as the run began")
    if plan.hardware.device != "cuda" and _surely_fits(found):
        return found
    usable = usable_bytes(plan.hardware)
    there = f"{usable / 2**30:.1f} GiB"
    for size in _candidates(found):
        candidate = _with(found, size, f"the largest pass of use that fits into {there}")
        try:
            if plan_memory(candidate, sharding).total <= usable:
                return candidate
        except Exception as error:  # whatever is wrong with the plan must not fail a run that might fit
            return _with(found, plan.micro_batch_size, f"a few; the memory plan could not be made: {type(error).__name__}")
    return _with(found, 1, f"the least there is; even so the plan does not fit into {there}")


def kept_micro_batch(run: Run, plan: Plan) -> int | None:
    """What auto became in a run on a machine like this one; None where it is another, or the run's recipe had a number."""
    facts, here = run.read_environment(), (plan.hardware.device_name, plan.hardware.num_processes)
    return run.decided_micro_batch() if (facts.get("device"), facts.get("num_processes")) == here else None


def _with(found: Survey, size: int, reason: str) -> Survey:
    return dataclasses.replace(found, plan=with_micro_batch(found.plan, size, reason))


def _candidates(found: Survey) -> Iterator[int]:
    """Sizes to try, the largest first, down to 1."""
    plan = found.plan
    most = plan.micro_batch_size
    if plan.hardware.device == "cuda":
        most = max(1, plan.recipe.training.batch_size // plan.hardware.num_processes)
        is_packed = plan.rows == "packed"
        length = found.data.encoding.max_length if is_packed else float(found.data.sample.lengths.mean())
        of_use = max(1, int(USEFUL_TOKENS / length))
        most = most if most <= of_use else 2 ** (of_use.bit_length() - 1)
    yield most
    yield from (2**power for power in reversed(range((most - 1).bit_length())))


def _surely_fits(found: Survey) -> bool:
    """Whether a run is so small beside the machine's memory that its plan need not be made before it starts.

    By a formula several times as large as what models hold (Korthikanti et al. 2022, arXiv:2205.05198, section 4.1, has 34
    bytes a token, hidden unit and layer at 16 bits, and 5 a head and pair of tokens).
    """
    model = found.blueprint.model
    config: Any = found.blueprint.config.get_text_config()
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    if not (width and layers and heads):
        return False
    largest = find_largest_pass(found.plan, found.data, model)
    stored = 4 * sum(parameter.numel() * (4 if parameter.requires_grad else 2) for parameter in model.parameters())
    each = 2 * layers * (272 * width + 16 * heads * largest.longest) + 16 * getattr(config, "vocab_size", 0)
    return stored + largest.tokens * each + 2 * found.resident_bytes < usable_bytes(found.plan.hardware)
