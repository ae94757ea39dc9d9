"""`peftkit convert`: an adapter of another method as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.engine.convert import check_convertible, convert_adapter
from peftkit.engine.guard import explain_exhaustion, rebuilding_text
from peftkit.engine.loaded import CPU, load_adapter
from peftkit.errors import RecipeError


def convert(adapter: Path, base: str | None, output: Path, rank: float) -> dict[str, Any]:
    """Convert and measure; returns what `--json` prints."""
    if not rank > 0 or (rank >= 1 and rank != int(rank)):
        raise RecipeError(f"--rank: {rank:g} is neither a whole number nor a share of the update's energy between 0 and 1")
    check_convertible(adapter, base, output)
    with explain_exhaustion(lambda: rebuilding_text("while converting")):
        return convert_adapter(load_adapter(adapter, base, CPU), output, rank)


def print_conversion(result: dict[str, Any]) -> None:
    """The result for people."""
    console.print_text(
        f"{result['output']}: LoRA of rank {result['rank_min']} to {result['rank_max']}; logits differ from the adapter's "
        f"by at most {result['max_abs_diff']:.3g} ({100 * result['relative_diff']:.2g}% of the largest)"
    )
