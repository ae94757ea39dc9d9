"""`peftkit sweep`: values of recipe keys, all combinations of them or a search, judged on the validation rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import console
from peftkit.commands import experiment
from peftkit.commands.experiment import Options, enter, make_trial, planned, request
from peftkit.comparison.file import Sweep, read_experiment
from peftkit.comparison.record import Record
from peftkit.comparison.result import interval
from peftkit.comparison.search import example_of, open_study, propose, ranges_of, require_optuna, tell, unfinished
from peftkit.comparison.trials import Trial
from peftkit.comparison.variants import grid_of, make_variant, make_variants, name_of, refuse_lengths
from peftkit.errors import RecipeError
from peftkit.recipe import LoadedRecipe
from peftkit.run import Run, write_text
from peftkit.stop import stops_at_once

if TYPE_CHECKING:
    from optuna import Study

BEST = "best.yaml"


def sweep(path: Path, stated: Mapping[str, Any], options: Options) -> Record:
    """Sweep; `path` is a recipe, a `sweep:` file, or the directory of a sweep; `stated`: fields of `Sweep`.

    Raises:
        RecipeError: something is wrong that is known before the first trial.
        Stopped: a signal asked for it.
    """
    path, options = experiment.directory_given(path, options)
    with stops_at_once("before the first trial"):
        asked = read_experiment(path, Sweep, stated)
        loaded = experiment.prepare(asked, options)
        require_validation(loaded)
        if asked.search:
            require_optuna()
        wanted = grid_of(asked.grid) if asked.grid else {"lowest": example_of(asked.search)}
        refuse_lengths(wanted, asked.budget)
        record = Record.begin(experiment.find_directory(asked, loaded, options), loaded, asked)
        if not options.resume:
            settle(record, loaded, asked, wanted, options)
    with experiment.opened(record, loaded, asked, options):
        queue = searched(record, loaded, asked) if asked.search else planned(record, loaded, asked)
        experiment.run(record, loaded, asked, options, queue)
        write_best(record)
        record.finish()
    return record


def require_validation(loaded: LoadedRecipe) -> None:
    """Refuse a recipe without validation rows: test rows that choose are none any more.

    Raises:
        RecipeError: there are none.
    """
    data = loaded.recipe.data
    if data is not None and data.validation is None:
        what = "is missing: a sweep chooses by validation rows, and leaves test rows for its result; such as `validation: 0.1`"
        raise RecipeError([loaded.problem("data.validation", what)])


def settle(record: Record, loaded: LoadedRecipe, asked: Sweep, wanted: Mapping[str, Any], options: Options) -> None:
    """Check every variant of a grid, or the lowest values of a search, up to the weights.

    Raises:
        PeftkitError: variants cannot work and are not to be skipped.
    """
    variants, refused = make_variants(loaded, wanted, skip_refused=options.skip_refused)
    seed = record.result["seeds"][0]
    console.print_note(f"looking at {len(variants)} variants up to their weights")
    answers = experiment.ask([request(loaded, variant.texts(asked.set, training__seed=seed)) for variant in variants])
    named = [answer | {"name": variant.name} for answer, variant in zip(answers, variants, strict=True)]
    experiment.refuse_problems(named, options)
    sound = [(variant, answer) for variant, answer in zip(variants, answers, strict=True) if "problem" not in answer]
    record.decide_metric(sound[0][1]["metric"], "validation")
    has_test = "test" in sound[0][1]["splits"]
    what = "the best one's test figures judge it" if has_test else "there are no test rows that could judge it"
    record.result["notes"].append(f"validation rows choose: the best one's figure on them flatters it; {what}")
    if asked.grid:
        enter(record, loaded, asked, sound)
        refused |= {answer["name"]: answer["problem"] for answer in named if "problem" in answer}
        for name, reason in refused.items():
            record.refuse(name, reason, wanted[name])


def searched(record: Record, loaded: LoadedRecipe, asked: Sweep) -> Iterator[Trial]:
    """Trials of settings that Optuna proposes, one variant after the other, each told before the next where they can be."""
    better = record.result["greater_is_better"]
    study = open_study(record.root, record.result["name"], seed=record.result["seeds"][0], greater_is_better=better)
    ranges = ranges_of(asked.search)
    known = {variant["study_number"] for variant in record.variants}
    for left in unfinished(study):  # of a process that is gone
        if left.number not in known:
            enter_proposal(record, loaded, left.number, left.params)
    yield from planned(record, loaded, asked)
    while len(record.variants) < asked.trials:
        tell_outcomes(record, study)
        proposed = propose(study, ranges)
        variant = enter_proposal(record, loaded, proposed.number, proposed.params)
        seeds = [entry["seed"] for entry in variant["trials"] if entry["state"] == "pending"]
        yield from (make_trial(record, loaded, asked, variant, seed) for seed in seeds)
    tell_outcomes(record, study)


def enter_proposal(record: Record, loaded: LoadedRecipe, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Enter proposed settings; those that cannot work are refused, in the record and to the study."""
    facts: dict[str, Any] = {"trainable_params": None, "all_params": None, "size_note": "", "steps": {}, "study_number": number}
    try:
        variant = make_variant(loaded, name_of(values, number), values)
        return record.add(variant, facts, record.result["seeds"])
    except RecipeError as error:
        entry = record.refuse(name_of(values, number), error.problems[0].what, values)
        entry.update(facts)
        return entry


def tell_outcomes(record: Record, study: Study) -> None:
    """Tell the study of every variant whose trials have all ended."""
    waiting = {trial.number for trial in unfinished(study)}
    for variant in record.variants:
        states = {trial["state"] for trial in variant["trials"]}
        if variant["study_number"] in waiting and not states & {"pending", "running"}:
            found = variant["summary"].get(record.result["metric"]) if states == {"done"} else None
            tell(study, variant["study_number"], found["mean"] if found else None)


def write_best(record: Record) -> None:
    """The best variant's recipe as best.yaml, and its figures on test rows, which nothing has been chosen by."""
    best = record.best()
    if best is None:
        return
    done = [Run(record.root / trial["run_dir"]) for trial in best["trials"] if trial["state"] == "done"]
    write_text(record.root / BEST, done[0].resolved_path.read_text(encoding="utf-8"))
    tests = [run.read_status()["summary"]["metrics_by_split"].get("test", {}) for run in done]
    test = {name: interval([figures[name] for figures in tests]) for name in tests[0]}
    record.result["best"] = {"variant": best["name"], "recipe": BEST, "test": test}


def print_sweep(record: Record) -> None:
    """The table, and the best."""
    experiment.print_comparison(record)
    if best := record.result.get("best"):
        test = [f"test {name} {found['mean']:.4f}" for name, found in best["test"].items()]
        console.print_text(f"best: {best['variant']}; its recipe is {record.root / best['recipe']}")
        console.print_text("; ".join(test)) if test else None
