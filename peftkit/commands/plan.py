"""`peftkit plan`: everything that can be known before a weight is loaded."""

from __future__ import annotations

from typing import Any

from peftkit import console
from peftkit.commands.params import line, summary
from peftkit.engine.data import class_counts
from peftkit.engine.memory import estimate_memory
from peftkit.engine.survey import survey
from peftkit.plan import num_steps
from peftkit.recipe import LoadedRecipe


def plan(loaded: LoadedRecipe) -> dict[str, Any]:
    """Walk through all that `train` will do, up to the weights; returns what `--json` prints."""
    found = survey(loaded)
    decided, data, blueprint = found.plan, found.data, found.blueprint
    longest = max(example.length for example in data.train)
    rows = {name: len(examples) for name, examples in data.splits.items()}
    return summary(decided, blueprint) | {
        "num_steps": num_steps(decided, len(data.train)),
        "tokens_per_epoch": data.tokens_per_epoch,
        "target_tokens_per_epoch": data.targets_per_epoch,
        "longest_row_tokens": longest,
        "rows": rows,
        "dropped_rows": data.num_dropped,
        "truncated_rows": data.num_truncated,
        "format": data.format,
        "classes": class_counts(data),
        "memory_bytes": estimate_memory(decided, blueprint, decided.micro_batch_size * longest),
        "targets": blueprint.targets,
        "targets_reason": blueprint.targets_reason,
        "saved_modules": blueprint.saved_modules,
        "choices": {choice.key: {"value": choice.value, "reason": choice.reason} for choice in decided.choices},
        "notes": blueprint.notes,
        "problems": [],
    }


def print_plan(result: dict[str, Any]) -> None:
    """The plan for people."""
    console.print_text(line(result))
    facts = [
        (name, result[name]) for name in ("num_steps", "tokens_per_epoch", "target_tokens_per_epoch", "longest_row_tokens")
    ]
    facts += [(f"rows in {name}", count) for name, count in result["rows"].items()]
    facts += [(f"dropped in {name}", count) for name, count in result["dropped_rows"].items() if count]
    facts += [(f"truncated in {name}", count) for name, count in result["truncated_rows"].items() if count]
    facts += [("format", result["format"])]
    console.print_table("run", ["", "value"], facts)
    if result["classes"]:
        console.print_table("classes in train", ["class", "rows"], list(result["classes"].items()))
    if result["targets"]:
        console.print_table(f"targets ({result['targets_reason']})", ["entry", "modules"], list(result["targets"].items()))
    if result["saved_modules"]:
        console.print_text(f"trained and saved whole: {', '.join(result['saved_modules'])}")
    memory = [(name, console.show_bytes(size)) for name, size in result["memory_bytes"].items()]
    console.print_table("memory, estimated", ["part", "size"], memory)
    choices = [(key, str(choice["value"]), choice["reason"]) for key, choice in result["choices"].items()]
    console.print_wide_table("decided here", ["key", "value", "why"], choices)
    for note in result["notes"]:
        console.print_text(f"note: {note}")
