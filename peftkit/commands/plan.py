"""`peftkit plan`: everything that can be known before a weight is loaded."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from peftkit import console
from peftkit.commands.params import line, summary
from peftkit.engine.batches import Layout, fill_rate, layout_of
from peftkit.engine.data import Data
from peftkit.engine.examples import step_rows
from peftkit.engine.fit import gpu_of, propose
from peftkit.engine.hardware import detect_hardware
from peftkit.engine.memory import plan_memory
from peftkit.engine.micro_batch import settle_micro_batch
from peftkit.engine.survey import survey
from peftkit.launch_file import Sharding
from peftkit.plan import Plan, num_steps
from peftkit.recipe import LoadedRecipe

FILL_STEPS = 50  # optimizer steps that the fill rate is measured on


def plan(loaded: LoadedRecipe, *, sharding: Sharding | None = None, fit_gib: float | None = None) -> dict[str, Any]:
    """Walk through all that `train` will do, up to the weights; returns what `--json` prints.

    Args:
        loaded: the recipe.
        sharding: how processes share the run; default: there is one.
        fit_gib: the memory that settings are to be proposed for.
    """
    sharding = sharding or Sharding(detect_hardware().num_processes)
    hardware = dataclasses.replace(detect_hardware(), **sharding.counts)
    hardware = hardware if fit_gib is None else gpu_of(fit_gib, hardware)
    with console.progress(None, "reading rows") as advance:
        found = survey(loaded, on_row=lambda: advance(1), hardware=hardware)
    found = settle_micro_batch(found, sharding)
    decided, data, blueprint = found.plan, found.data, found.blueprint
    memory = plan_memory(found, sharding)
    result = summary(decided, blueprint) | {
        "num_steps": num_steps(decided, data.train.num_rows),
        "tokens_per_epoch": data.report["train"]["tokens"],
        "target_tokens_per_epoch": data.report["train"]["targets"],
        "longest_row_tokens": int(data.sample.lengths.max()),
        "fill_rate": fill_rates(decided, data),
        "rows": {name: report["examples"] for name, report in data.report.items()},
        "dropped_rows": {name: data.num_findings(name, "dropped", "bad_row", "too_long") for name in data.report},
        "truncated_rows": {name: data.num_findings(name, "truncated") for name in data.report},
        "format": ", ".join(dict.fromkeys(data.formats)),
        "data": data.report,
        "classes": data.classes["train"],
        **memory.report(),
        "targets": blueprint.targets,
        "targets_reason": blueprint.targets_reason,
        "saved_modules": blueprint.saved_modules,
        "choices": {choice.key: {"value": choice.value, "reason": choice.reason} for choice in decided.choices},
        "notes": blueprint.notes,
        "problems": [],
    }
    if fit_gib is None:
        return result
    fits = [proposal.report() for proposal in propose(loaded, found, memory, sharding)]
    return result | {"fit": {"gpu_bytes": hardware.memory_bytes, "proposals": fits}}


def fill_rates(decided: Plan, data: Data) -> dict[str, float]:
    """The share of places in forward passes that hold a token, over the first steps: as the recipe has it, and otherwise."""
    training, lengths = decided.recipe.training, data.sample.lengths
    steps = min(FILL_STEPS, -(-len(lengths) // training.batch_size))
    rows = [step_rows(len(lengths), training.batch_size, training.seed, step) for step in range(steps)]
    of_steps = [[int(lengths[row]) for row in step] for step in rows]
    layout = layout_of(decided, data.encoding.max_length)
    padded = Layout(layout.micro_batch_size, by_length=False)
    ways = {"this_run": layout, "padded": padded, "by_length": Layout(layout.micro_batch_size)}
    return {name: round(fill_rate(of_steps, way), 4) for name, way in ways.items()}


def print_plan(result: dict[str, Any]) -> None:
    """The plan for people."""
    console.print_text(line(result))
    facts = [
        (name, result[name]) for name in ("num_steps", "tokens_per_epoch", "target_tokens_per_epoch", "longest_row_tokens")
    ]
    facts += [(f"rows in {name}", count) for name, count in result["rows"].items()]
    facts += [(f"{kind} in {name}", n) for name, part in result["data"].items() for kind, n in part["findings"].items()]
    facts += [("rows checked of the stream", result["data"]["train"]["rows"])] if result["data"]["train"]["is_sample"] else []
    facts += [("format", result["format"]), ("fill rate", f"{result['fill_rate']['this_run']:.1%}")]
    facts += [("fill rate, rows as they come", f"{result['fill_rate']['padded']:.1%}")]
    console.print_table("run", ["", "value"], facts)
    if result["classes"]:
        console.print_table("classes in train", ["class", "rows"], list(result["classes"].items()))
    if result["targets"]:
        targets = over_layers(result["targets"])
        console.print_table(f"targets ({result['targets_reason']})", ["entry", "modules"], list(targets.items()))
    if result["saved_modules"]:
        console.print_text(f"trained and saved whole: {', '.join(result['saved_modules'])}")
    _print_memory(result)
    choices = [(key, str(choice["value"]), choice["reason"]) for key, choice in result["choices"].items()]
    console.print_wide_table("decided here", ["key", "value", "why"], choices)
    for note in result["notes"]:
        console.print_text(f"note: {note}")


def over_layers(targets: dict[str, int]) -> dict[str, int]:
    """Entries that differ in the numbers of layers alone as one: `layer.*.query` for `layer.0.query`, `layer.1.query`, ..."""
    names: dict[str, list[str]] = {}
    for entry in targets:
        names.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", entry), []).append(entry)
    return {name if len(found) > 1 else found[0]: sum(targets[entry] for entry in found) for name, found in names.items()}


def _print_memory(result: dict[str, Any]) -> None:
    """What one process holds at most, and what would fit."""
    memory = [(name, console.show_bytes(size)) for name, size in result["memory_bytes"].items()]
    console.print_table(f"memory of a process at its peak, in {result['memory_peak']}", ["part", "size"], memory)
    phases = [f"{name} {console.show_bytes(size)}" for name, size in result["memory_phases"].items()]
    console.print_text(f"by phase: {', '.join(phases)}")
    console.print_text(result["memory_from"])
    if "fit" not in result:
        return
    size, proposals = console.show_bytes(result["fit"]["gpu_bytes"]), result["fit"]["proposals"]
    if not proposals:
        console.print_text(f"nothing fits into {size}: a smaller model, shorter rows (data.max_length) or more GPUs would")
    elif not proposals[0]["set"]:
        console.print_text(f"it fits into {size} as it is: {console.show_bytes(proposals[0]['gpu_bytes'])} of GPU memory")
    else:
        rows = [
            (
                " ".join(f"--set '{text}'" for text in item["set"]),
                console.show_bytes(item["gpu_bytes"]),
                f"x {item['relative_time']}",
            )
            for item in proposals
        ]
        console.print_wide_table(f"what fits into {size}, the fastest first", ["settings", "GPU memory", "time, roughly"], rows)
