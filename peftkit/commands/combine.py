"""`peftkit combine`: several LoRA or IA3 adapters of one base become one, measured on the rows of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.combination import (
    BASE,
    COMBINATION,
    Combination,
    Request,
    elects_signs,
    files_of,
    grid,
    named_adapters,
    option_problems,
    prunes,
)
from peftkit.engine.combinable import Source, check_sources, rank_of, read_sources
from peftkit.engine.combined import Combined, combined_state, load_combined, num_layers, save_combined
from peftkit.engine.guard import answering_remedies, explain_exhaustion, memory_text
from peftkit.engine.rows import Row
from peftkit.engine.scoring import rows_of_file
from peftkit.engine.weighing import Metrics, Trial, metrics_of, normalized, search, trial_of
from peftkit.errors import RecipeError
from peftkit.tasks import TASKS


def combine(asked: Request) -> dict[str, Any]:
    """Check, combine, measure, write; returns what `--json` prints."""
    named = named_adapters(asked.adapters)
    if problems := [*option_problems(asked, len(named))]:
        raise RecipeError("\n".join(problems))
    files = files_of(asked.data, list(named))
    sources = read_sources(named, asked.base)
    how = _combination(asked, sources)
    check_sources(sources, how)
    rows = {source.name: rows_of_file(source.facts, files[source.name]) for source in sources if source.name in files}
    told = f"with --batch-size {asked.batch_size}"
    with explain_exhaustion(lambda: memory_text(told, answering_remedies(asked.batch_size))):
        return _combine(asked, how, load_combined(sources, how), rows)


def _combine(asked: Request, how: Combination, combined: Combined, rows: dict[str, list[Row]]) -> dict[str, Any]:
    chosen = [source for source in combined.sources if source.name in rows]
    trials = [trial_of(combined, source, rows[source.name][: asked.max_rows], asked.batch_size) for source in chosen]
    found: dict[str, Any] = {}
    measured = _alone(combined, trials) if trials else {}
    if asked.search:
        how, found["search"] = _searched(combined, trials, how, measured)
    with console.progress(num_layers(combined.sources), "combining") as advance:
        state, error = combined_state(combined.sources, how, combined.originals, advance)
    combined.put(state)
    if trials:
        measured[COMBINATION] = metrics_of(combined, trials, COMBINATION)
        found["evaluation"] = _evaluation(trials, measured)
    untrained = trials and combined.loaded.task.has_head and combined.loaded.missing
    report = _report(how, combined.sources, asked.output) | {
        "relative_error": error,
        "num_params": sum(tensor.numel() for tensor in state.values()),
        "notes": combined.notes + ["the base's head was never trained: what it reaches is chance"] * bool(untrained),
    }
    card = _card(report | found, combined)
    return report | {"certificate": save_combined(combined, asked.output, report | found, card)} | found


def _combination(asked: Request, sources: Sequence[Source]) -> Combination:
    """The combination with everything decided.

    Raises:
        RecipeError: weights that no head can have.
    """
    number = len(sources)
    mean = 1.0 if elects_signs(asked.method) else 1 / number  # methods that elect signs take the mean by themselves
    weights = asked.weights or (mean,) * number
    if TASKS[sources[0].facts.task].has_head and abs(sum(weights)) < 1e-6:
        raise RecipeError("--weights: add up to 0, and the head becomes the weighted mean of the adapters' heads")
    return Combination(
        asked.method, weights, asked.density, asked.majority_sign_method or "total", asked.svd_rank, asked.seed or 0
    )


def _alone(combined: Combined, trials: Sequence[Trial]) -> dict[str, dict[str, Metrics]]:
    """Metrics of the base and of each adapter alone, on the rows of each."""
    names = [BASE, *(source.name for source in combined.sources)]
    with console.progress(len(names) * sum(len(trial.rows) for trial in trials), "measuring") as advance:
        return {name: metrics_of(combined, trials, name, advance) for name in names}


def _searched(
    combined: Combined, trials: Sequence[Trial], how: Combination, measured: dict[str, dict[str, Metrics]]
) -> tuple[Combination, dict[str, Any]]:
    """The best combination of the grid, the first of equals, and what came of each."""
    tried = grid(how, len(combined.sources))
    num_rows = sum(len(trial.rows) for trial in trials)
    console.print_note(f"searching: {len(tried)} combinations, each on {num_rows} rows")
    alone = {trial.source.name: measured[trial.source.name][trial.source.name] for trial in trials}
    with console.progress(len(tried) * num_rows, "searching") as advance:
        lines = search(combined, trials, tried, alone, advance)
    best = max(range(len(lines)), key=lambda place: lines[place]["normalized"])
    criterion = "mean over the rows of each adapter of the metric over that of the adapter alone"
    return tried[best], {"criterion": criterion, "best": best, "tried": lines}


def _evaluation(trials: Sequence[Trial], measured: dict[str, dict[str, Metrics]]) -> dict[str, Any]:
    alone = {trial.source.name: measured[trial.source.name][trial.source.name] for trial in trials}
    data = {
        trial.source.name: {
            "num_rows": len(trial.rows),
            "metric": trial.metric,
            "metrics": {model: found[trial.source.name] for model, found in measured.items()},
        }
        for trial in trials
    }
    return {"data": data, "normalized": {model: normalized(trials, found, alone) for model, found in measured.items()}}


def _report(how: Combination, sources: Sequence[Source], output: Path) -> dict[str, Any]:
    """What was combined, and how."""
    settings: dict[str, Any] = {"rank": rank_of(sources, how)} if sources[0].updates else {}
    settings |= {"density": how.density} if prunes(how.method) else {}
    settings |= {"majority_sign_method": how.majority_sign_method} if elects_signs(how.method) else {}
    settings |= {"seed": how.seed} if how.method.startswith("dare") else {}
    weights = {source.name: weight for source, weight in zip(sources, how.weights, strict=True)}
    adapters = {source.name: str(source.folder) for source in sources}
    return {"output": str(output), "method": how.method, "adapters": adapters, "weights": weights, **settings}


def _card(result: dict[str, Any], combined: Combined) -> str:
    """README.md of the folder."""
    facts = combined.loaded.facts
    parts = [f"- {name}: weight {weight:g}" for name, weight in result["weights"].items()]
    scores = result.get("evaluation", {}).get("normalized", {})
    if scores:
        parts.append(f"- {100 * scores[COMBINATION]:.1f}% of what each adapter alone reaches on its own rows, in the mean")
    header = ["---", f'base_model: "{facts.base}"', 'library_name: "peft"', f'tags: ["{facts.method}"]', "---", ""]
    title = f"# {len(combined.sources)} {facts.method} adapters for {facts.base}, combined by `{result['method']}`"
    error = f"- distance of its update from the exact weighted sum: {100 * result['relative_error']:.3g}% (Frobenius)"
    return "\n".join([*header, title, "", f"For {facts.task}, by `peftkit combine`.", "", *parts, error, ""])


def print_combination(result: dict[str, Any]) -> None:
    """The result for people."""
    for line in result["notes"]:
        console.print_note(f"note: {line}")
    for name, found in result.get("evaluation", {}).get("data", {}).items():
        models = found["metrics"]
        rows = [(metric, *(values.get(metric, "") for values in models.values())) for metric in models[COMBINATION]]
        console.print_table(f"{found['num_rows']} rows of {name}; {found['metric']} counts", ["metric", *models], rows)
    if scores := result.get("evaluation", {}).get("normalized"):
        share = "mean share of what each adapter alone reaches on its own rows"
        console.print_table("", ["", *scores], [(share, *scores.values())])
    if searched := result.get("search"):
        console.print_text(f"best of {len(searched['tried'])} combinations on these rows; others will do a little worse")
    weights = ", ".join(f"{name} {weight:g}" for name, weight in result["weights"].items())
    settings = "".join(f", {name} {result[name]:g}" for name in ("density", "rank") if name in result)
    console.print_text(f"{result['output']}: {result['method']} of {weights}{settings}; {result['num_params']:,} parameters")
    console.print_text(
        f"its update is {100 * result['relative_error']:.3g}% away from the exact weighted sum; certificate passed: after "
        f"reload into a fresh base, logits differ by at most {result['certificate']['max_abs_diff']:.3g}"
    )
