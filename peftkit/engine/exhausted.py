"""What is said when memory runs out in training: where, with which rows, what the plan knows of it, and what would help."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Iterator

from peftkit.engine.data import Data
from peftkit.engine.fit import Remedy, remedies_for
from peftkit.engine.guard import NoMemoryError, reclaim, training_remedies
from peftkit.engine.limits import memory_of_process, usable_bytes
from peftkit.engine.memory import PARTS, MemoryPlan, plan_memory
from peftkit.engine.survey import Survey
from peftkit.errors import ResourceError
from peftkit.guides import MEMORY
from peftkit.launch import worker_sharding
from peftkit.plan import Plan
from peftkit.recipe import LoadedRecipe

_MOST_ROWS = 8


@contextlib.contextmanager
def explain_training_memory(loaded: LoadedRecipe, found: Survey) -> Iterator[None]:
    """Turn a NoMemoryError into words, once the model has been let go of.

    Args:
        loaded: the recipe.
        found: the run, before a weight was loaded.

    Raises:
        ResourceError: in words.
    """
    try:
        yield
    except NoMemoryError as error:
        _let_go(error)
        raise ResourceError(exhausted_text(loaded, found, error), guide=MEMORY) from error


def _let_go(error: BaseException | None) -> None:
    """Empty the functions that an error came through: they hold the model, its activations and the optimizer."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    reclaim()


def exhausted_text(loaded: LoadedRecipe, found: Survey, failed: NoMemoryError) -> str:
    """Where memory has run out, and what helps: by the memory plan or, where that cannot be made now, in general."""
    origins = failed.origins[:_MOST_ROWS]
    more = len(failed.origins) - len(origins)
    rows = ", ".join(origins) + (f" and {more} more" if more > 0 else "")
    lines = [f"out of memory on {failed.plan.hardware.device_name} {failed.place}", f"its rows: {rows}"]
    try:
        lines += _planned_lines(loaded, dataclasses.replace(found, plan=failed.plan))
    except Exception:  # memory is scarce now, and whatever else is wrong must not hide where it ran out
        lines += ["What helps:", *(f"  {remedy}" for remedy in training_remedies(failed.plan, found.data))]
    return "\n".join(lines)


def _planned_lines(loaded: LoadedRecipe, found: Survey) -> list[str]:
    hardware = found.plan.hardware
    sharding = worker_sharding(hardware.num_processes)
    planned, usable = plan_memory(found, sharding), usable_bytes(hardware)
    sizes = [(part, planned.phases[planned.peak].get(part, 0)) for part in PARTS]
    there = _size(memory_of_process(hardware))
    lines = [f"The plan for its fullest moment, in {planned.peak}: {_size(planned.total)}, where a process has {there}:"]
    lines.append("  " + ", ".join(f"{part} {_size(size)}" for part, size in sizes if size >= 2**16))
    if planned.total <= usable:
        lines.append("That would fit: other programs may hold memory too (nvidia-smi, free -h show it).")
        usable = 0
    remedies = remedies_for(loaded, found, planned, sharding)
    lines.append("What helps, each with what it saves; what leaves the result as it is comes first:")
    lines += [f"  {_remedy_text(remedy, usable)}" for remedy in remedies]
    return [*lines, *_together(found.plan, remedies, usable), _shorter_rows(found.plan, found.data, planned)]


def _remedy_text(remedy: Remedy, usable: int) -> str:
    key, _, value = remedy.setting.partition("=")
    enough = ", enough" if remedy.total <= usable else ""
    result = "same result" if remedy.keeps_result else "the result differs a little"
    return f"{key}: {value}  saves {_size(remedy.saved)}{enough} ({result}, time x {remedy.time:g})"


def _together(plan: Plan, remedies: list[Remedy], usable: int) -> list[str]:
    """Where no setting alone is enough: what tries combinations."""
    if not usable or any(remedy.total <= usable for remedy in remedies):
        return []
    if plan.hardware.device != "cuda":
        return ["  none of these is enough alone; several together may be"]
    size = plan.hardware.memory_bytes / 2**30
    return [f"  none of these is enough alone; `peftkit plan RECIPE --fit {size:.1f}` tries them together"]


def _shorter_rows(plan: Plan, data: Data, planned: MemoryPlan) -> str:
    """Rows of half the length hold half of the activations at most: attention's masks shrink faster."""
    longest = int(data.sample.lengths.max())
    saved = planned.phases["training"]["activations"] // 2
    return f"  data.max_length: {max(1, longest // 2)} with data.truncation  saves some {_size(saved)} (rows are cut)"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 // 10 else f"{num_bytes / 2**20:.1f} MiB"
