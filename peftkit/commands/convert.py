"""`peftkit convert`: an adapter of another method as a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.adapters import adapter_folder
from peftkit.engine.convert import check_convertible, convert_adapter
from peftkit.engine.facts import read_facts
from peftkit.engine.guard import explain_exhaustion, rebuilding_text
from peftkit.engine.in_files import weights_in_files
from peftkit.engine.loaded import CPU, load_adapter
from peftkit.engine.scoring import read_examples, score
from peftkit.errors import RecipeError


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        adapter: run directory or adapter folder.
        output: folder of the new adapter.
        base: base model, where the one that the adapter names cannot be found.
        rank: of every layer, or below 1 the share of the update's energy to keep.
        data: rows to measure both adapters on.
        to: the method to convert to.
    """

    adapter: Path
    output: Path
    base: str | None = None
    rank: float = 0.99
    data: Path | None = None
    to: str = "lora"


def convert(asked: Request) -> dict[str, Any]:
    """Convert and measure; returns what `--json` prints."""
    if asked.to != "lora":
        raise RecipeError(f"--to: `{asked.to}` is not allowed; PEFT turns other methods into `lora` only")
    rank = asked.rank
    if not rank > 0 or (rank >= 1 and rank != int(rank)):
        raise RecipeError(f"--rank: {rank:g} is neither a whole number nor a share of the update's energy between 0 and 1")
    check_convertible(asked.adapter, asked.base, asked.output)
    folder = adapter_folder(asked.adapter)
    examples = read_examples(folder, read_facts(folder, asked.base), asked.data) if asked.data is not None else []
    with explain_exhaustion(lambda: rebuilding_text("while converting")), weights_in_files(asked.output.parent):
        loaded = load_adapter(asked.adapter, asked.base, CPU)
        with console.progress(2 * len(examples), "measuring") as advance:
            before = {"metrics_before": score(loaded, examples, advance)} if examples else {}
            result = convert_adapter(loaded, asked.output, rank)
            if not examples:
                return result
            converted = load_adapter(asked.output, asked.base, CPU)
            return result | {"num_rows": len(examples)} | before | {"metrics_after": score(converted, examples, advance)}


def print_conversion(result: dict[str, Any]) -> None:
    """The result for people."""
    if "metrics_before" in result:
        before, after = result["metrics_before"], result["metrics_after"]
        rows = [(name, f"{value:.4g}", f"{after[name]:.4g}") for name, value in before.items()]
        console.print_table(f"{result['num_rows']} rows", ["metric", "before", "after"], rows)
    console.print_text(
        f"{result['output']}: LoRA of rank {result['rank_min']} to {result['rank_max']}; logits differ from the adapter's "
        f"by at most {result['max_abs_diff']:.3g} ({100 * result['relative_diff']:.2g}% of the largest)"
    )
