"""`peftkit merge`: one stand-alone model from base and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.engine.guard import explain_exhaustion, rebuilding_text
from peftkit.engine.in_files import weights_in_files
from peftkit.engine.loaded import CPU, load_adapter
from peftkit.engine.merge import Wanted, check_mergeable, merge_adapter
from peftkit.errors import RecipeError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def merge(adapter: Path, base: str | None, output: Path, dtype: str) -> dict[str, Any]:
    """Merge, compare, write; returns what `--json` prints."""
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype: `{dtype}` is not allowed; it takes {' | '.join(DTYPES)}")
    check_mergeable(adapter, base, output)
    with explain_exhaustion(lambda: rebuilding_text("while merging")), weights_in_files(output.parent) as keep:
        return merge_adapter(load_adapter(adapter, base, CPU), Wanted(output, dtype, keep=keep))


def print_merge(result: dict[str, Any]) -> None:
    """The result for people."""
    console.print_text(
        f"{result['output']}: {result['dtype']}; logits differ from the adapter's by at most {result['max_abs_diff']:.3g} "
        f"in float32 and {result['max_abs_diff_saved']:.3g} as written (allowed {result['tolerance']:.3g})"
    )
