"""`peftkit merge`: one stand-alone model from base and adapter."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.adapters import MERGED, adapter_folder
from peftkit.engine.facts import read_facts
from peftkit.engine.guard import explain_exhaustion, rebuilding_text
from peftkit.engine.in_files import weights_in_files
from peftkit.engine.loaded import CPU, LoadedAdapter, load_adapter
from peftkit.engine.merge import Wanted, check_mergeable, check_shard_size, dtype_of_base, merge_adapter
from peftkit.engine.onto import CHOICES, load_alone, merge_onto, why_not_onto
from peftkit.engine.scoring import alone_like, deciding_metric, read_examples, score
from peftkit.errors import CertificateError, RecipeError
from peftkit.run import new_folder, write_json
from peftkit.tasks.example import Example

Rows = tuple[Sequence[Example], Callable[[int], None]]  # and what is told how many are done
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        adapter: run directory or adapter folder.
        output: folder of the merged model.
        base: base model, where the one that the adapter names cannot be found.
        dtype: of the merged weights.
        max_shard_size: largest file of weights.
        onto: which weights of a quantised base; None: those that the adapter saw.
        original_base: the unquantised base, where the adapter does not name it.
        data: rows that `best` decides by.
    """

    adapter: Path
    output: Path
    base: str | None = None
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    onto: str | None = None
    original_base: str | None = None
    data: Path | None = None


def merge(asked: Request) -> dict[str, Any]:
    """Merge, compare, write; returns what `--json` prints.

    `merge.json` beside the model says what it came from: `push` writes the model card by it.
    """
    result = _merged(asked)
    facts = read_facts(adapter_folder(asked.adapter), asked.base)
    origin = {"task": facts.task, "method": facts.method, "base": facts.base, "revision": facts.revision}
    write_json(asked.output / MERGED, origin | {"adapter": str(asked.adapter.absolute())} | result)
    return result


def _merged(asked: Request) -> dict[str, Any]:
    choices, examples = _check(asked)
    with explain_exhaustion(lambda: rebuilding_text("while merging")), weights_in_files(asked.output.parent) as keep:
        loaded = load_adapter(asked.adapter, asked.base, CPU)
        dtype = dtype_of_base(loaded) if asked.dtype == "auto" else asked.dtype
        wanted = Wanted(asked.output, dtype, asked.max_shard_size, keep)
        if asked.onto is None:
            return merge_adapter(loaded, wanted)
        if asked.onto != "best":
            return merge_onto(loaded, asked.onto, asked.original_base, wanted)
        return _best(loaded, choices, asked.original_base, wanted, examples)


def _check(asked: Request) -> tuple[dict[str, str], list[Example]]:
    """Find what is wrong before a weight is loaded; why each choice of `--onto` is not to be had, and the rows of `--data`.

    Raises:
        RecipeError, DataError, LoadError: what would stop it later.
    """
    if asked.dtype not in DTYPES:
        raise RecipeError(f"--dtype: `{asked.dtype}` is not allowed; it takes {' | '.join(DTYPES)}")
    if asked.onto not in (None, "best", *CHOICES):
        raise RecipeError(f"--onto: `{asked.onto}` is not allowed; it takes {' | '.join((*CHOICES, 'best'))}")
    if asked.data is not None and asked.onto != "best":
        raise RecipeError("--data: has no effect without `--onto best`")
    if asked.data is None and asked.onto == "best":
        raise RecipeError("--onto best: needs rows to decide by; name a file with --data")
    if asked.original_base is not None and asked.onto not in ("original", "best"):
        raise RecipeError("--original-base: has no effect without `--onto original` or `--onto best`")
    check_shard_size(asked.max_shard_size)
    check_mergeable(asked.adapter, asked.base, asked.output)
    if asked.onto is None:
        return {}, []
    folder = adapter_folder(asked.adapter)
    facts = read_facts(folder, asked.base)
    choices = why_not_onto(folder, facts, asked.original_base)
    if reason := choices.get(asked.onto):
        raise RecipeError(f"--onto {asked.onto}: {reason}")
    return choices, [] if asked.data is None else read_examples(folder, facts, asked.data)


def _best(
    loaded: LoadedAdapter, choices: dict[str, str], original: str | None, wanted: Wanted, examples: Sequence[Example]
) -> dict[str, Any]:
    """Merge onto each of the weights, score all results on the rows, keep the best."""
    metric, more_is_better = deciding_metric(loaded)
    able = [choice for choice, reason in choices.items() if not reason]
    with (
        console.progress(len(examples) * (1 + len(able)), "scoring") as advance,
        tempfile.TemporaryDirectory(prefix=".merged-", dir=wanted.output.parent) as place,
    ):
        adapter = score(loaded, examples, advance)
        rows = {choice: {"onto": choice, "refused": reason} for choice, reason in choices.items()}
        for choice in able:
            one = dataclasses.replace(wanted, output=Path(place) / choice)
            rows[choice] = _scored(loaded, choice, original, one, (examples, advance))
        best = _best_of(list(rows.values()), metric, more_is_better)
        with new_folder(wanted.output) as folder:
            for file in (Path(place) / best["onto"]).iterdir():
                file.rename(folder / file.name)
    table = {"metric": metric, "greater_is_better": more_is_better, "adapter_metrics": adapter, "choices": list(rows.values())}
    return best | {"output": str(wanted.output), "num_rows": len(examples)} | table


def _scored(loaded: LoadedAdapter, choice: str, original: str | None, wanted: Wanted, rows: Rows) -> dict[str, Any]:
    """One of the choices: what `merge_onto` says of it and its metrics, or why it failed."""
    try:
        found = merge_onto(loaded, choice, original, wanted)
    except CertificateError as error:
        return {"onto": choice, "refused": str(error)}
    model = load_alone(wanted.output, loaded, found["dtype"])
    del found["output"]  # it will be another one
    return found | {"metrics": score(alone_like(loaded, model), *rows)}


def _best_of(rows: Sequence[dict[str, Any]], metric: str, more_is_better: bool) -> dict[str, Any]:
    able = [row for row in rows if "metrics" in row]
    if not able:
        raise CertificateError("; ".join(f"{row['onto']}: {row['refused']}" for row in rows))
    return max(able, key=lambda row: row["metrics"][metric] * (1 if more_is_better else -1))


def print_merge(result: dict[str, Any]) -> None:
    """The result for people."""
    if "choices" in result:
        _print_choices(result)
    told = f"{result['output']}: {result['dtype']}; logits differ from the adapter's by at most {result['max_abs_diff']:.3g} "
    told += f"in {result['compared_in']}"
    if result.get("onto") == "quantized":
        told += f", and once quantised and loaded from those as computed by {result['max_abs_diff_saved']:.3g}"
    else:
        told += f" and {result['max_abs_diff_saved']:.3g} as written"
    told += f" (allowed {result['tolerance']:.3g})"
    if "onto" in result:
        told += f"; from base and adapter as trained by {result['distance']:.3g}"
    console.print_text(told)


def _print_choices(result: dict[str, Any]) -> None:
    metric, direction = result["metric"], "more" if result["greater_is_better"] else "less"
    lines: list[tuple[str, str, str]] = [("base and adapter", f"{result['adapter_metrics'][metric]:.4g}", "0")]
    for row in result["choices"]:
        if "refused" in row:
            lines.append((row["onto"], "-", row["refused"]))
        else:
            lines.append((row["onto"], f"{row['metrics'][metric]:.4g}", f"{row['distance']:.3g}"))
    title = f"{result['num_rows']} rows, {direction} is better; kept: {result['onto']}"
    console.print_table(title, ["merged onto", metric, "logits differ by"], lines)
