"""What `compare` and `sweep` share: the directory, the look at all variants, the trials, the table."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.comparison.file import FILE, Budget, Experiment, read_experiment, top_key, write_experiment
from peftkit.comparison.record import TRIALS, Record
from peftkit.comparison.result import INTERVAL, failures, table
from peftkit.comparison.trials import TIMED_STEPS, Trial, exit_code_of, run_all, timed_steps
from peftkit.comparison.variants import (
    Variant,
    check_recipe,
    load_base,
)
from peftkit.errors import PeftkitError, Problem, RecipeError
from peftkit.launch import require_room
from peftkit.lock import lock
from peftkit.recipe import LoadedRecipe
from peftkit.run import Run
from peftkit.stop import stopped


@dataclass(frozen=True)
class Options:
    """How to run an experiment, beside what it is.

    Attributes:
        output: its directory; None: a new one in the recipe's output.dir.
        resume: whether to go on in that directory.
        retry_failed: with `resume`: run trials again that failed.
        skip_refused: leave out variants that cannot work.
        jobs: trials at once.
    """

    output: Path | None = None
    resume: bool = False
    retry_failed: bool = False
    skip_refused: bool = False
    jobs: int = 1


def directory_given(path: Path, options: Options) -> tuple[Path, Options]:
    """The file and the options where the directory of an experiment is named instead of its file."""
    if not path.is_dir():
        return path, options
    if not (path / FILE).is_file():
        raise RecipeError(f"{path}: is a folder without {FILE}; name a recipe, a file or the directory of a comparison")
    if not options.resume:
        raise RecipeError(f"{path}: is the directory of a comparison; add `--resume` to go on with it")
    return path / FILE, dataclasses.replace(options, output=options.output or path)


def prepare(asked: Experiment, options: Options) -> LoadedRecipe:
    """The recipe, and everything about it and the options that stands in the way.

    Raises:
        RecipeError: something does.
    """
    if options.retry_failed and not options.resume:
        raise RecipeError("--retry-failed: has no effect without --resume")
    if options.resume and options.output is None:
        raise RecipeError("--resume: needs --output DIR, or the directory in place of the recipe")
    require_room(options.jobs)
    loaded = load_base(asked.recipe, asked.set)
    check_recipe(loaded, asked.budget, asked.metric)
    return loaded


@contextlib.contextmanager
def opened(record: Record, loaded: LoadedRecipe, asked: Experiment, options: Options) -> Iterator[None]:
    """Hold the directory, which a new experiment gets now: nothing is left of one that was refused.

    Raises:
        RecipeError: another process holds it.
    """
    record.root.mkdir(parents=True, exist_ok=True)
    with lock(Run(record.root), console.print_note, force=False):
        if options.resume:
            record.result = Record.begin(record.root, loaded, asked).result  # what another process has done meanwhile
            record.open_again(retry_failed=options.retry_failed)
        record.write()
        write_experiment(record.root, asked)
        yield


def find_directory(asked: Experiment, loaded: LoadedRecipe, options: Options) -> Path:
    """Where the directory of the experiment is, or will be.

    Raises:
        RecipeError: it holds something else, or another experiment.
    """
    kind, name = top_key(type(asked)), asked.name or loaded.recipe.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    root = options.output or Path(loaded.recipe.output.dir) / f"{kind}-{name}-{stamp}"
    if not options.resume:
        Run(root).require_new()
        return root
    if not (root / FILE).is_file():
        raise RecipeError(f"--resume: {root} holds no {kind} that was begun; leave --resume out to start one")
    before = read_experiment(root / FILE, type(asked), {})
    changed = [field for field in type(asked).model_fields if getattr(before, field) != getattr(asked, field)]
    if changed:
        raise RecipeError(f"--resume: {root} was begun with other {', '.join(changed)}; {FILE} in it has them")
    return root


def enter(record: Record, loaded: LoadedRecipe, asked: Experiment, sound: Sequence[tuple[Variant, dict[str, Any]]]) -> None:
    """Enter variants that can work, with their sizes and, for a budget of tokens, their steps by seed."""
    seeds, tokens = record.result["seeds"], asked.budget.tokens if asked.budget is not None else None
    sized = [dataclasses.replace(variant, overrides=variant.overrides | found["size"]) for variant, found in sound]
    steps: list[dict[str, int]] = [{} for _ in sized]
    if tokens is not None:
        places = [(number, seed) for number in range(len(sized)) for seed in seeds]
        requests = [
            request(loaded, sized[number].texts(asked.set, training__seed=seed), tokens=tokens) for number, seed in places
        ]
        for (number, seed), found in zip(places, ask(requests), strict=True):
            if "problem" in found:
                raise RecipeError([Problem(f"variant `{sized[number].name}`", "", found["problem"], found["exit_code"])])
            steps[number][str(seed)] = found["steps"]
    for variant, (_, found), counted in zip(sized, sound, steps, strict=True):
        facts = {key: found[key] for key in ("trainable_params", "all_params", "size_note")}
        record.add(variant, facts | {"steps": counted}, seeds)


def request(loaded: LoadedRecipe, overrides: list[str], **wanted: Any) -> dict[str, Any]:
    """A request to `peftkit.commands.survey_variants`."""
    return {"recipe": str(loaded.path), "overrides": overrides} | wanted


def ask(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to all requests, from a process that imports torch and ends.

    Raises:
        PeftkitError: it ended before it had answered.
    """
    command = [sys.executable, "-m", "peftkit.commands.survey_variants"]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(answers) != len(requests):
        raise PeftkitError(f"the variants could not be looked at:\n{done.stderr[-2000:]}")
    return answers


def refuse_problems(answers: Sequence[dict[str, Any]], options: Options) -> None:
    """Raise the problems of variants, one where all have the same, unless they are to be skipped and something is left."""
    bad = [answer for answer in answers if "problem" in answer]
    if not bad or (options.skip_refused and len(bad) < len(answers)):
        return
    texts = {answer["problem"] for answer in bad}
    if len(texts) == 1 and len(bad) == len(answers):
        raise RecipeError([Problem("", "", bad[0]["problem"], bad[0]["exit_code"])])
    raise RecipeError(
        [Problem(f"variant `{bad_one['name']}`", "", bad_one["problem"], bad_one["exit_code"]) for bad_one in bad]
    )


def planned(record: Record, loaded: LoadedRecipe, asked: Experiment) -> Iterator[Trial]:
    """The trials that are to be run, in their order."""
    for entry in record.trials():
        if entry["state"] == "pending":
            variant = next(variant for variant in record.variants if entry in variant["trials"])
            yield make_trial(record, loaded, asked, variant, entry["seed"])


def make_trial(record: Record, loaded: LoadedRecipe, asked: Experiment, variant: dict[str, Any], seed: int) -> Trial:
    """One trial: the variant under the budget with this seed."""
    further: dict[str, Any] = {"training__seed": seed, "name": f"{variant['name']}-seed-{seed}"}
    steps = variant["steps"].get(str(seed)) or (asked.budget.steps if asked.budget is not None else None)
    further |= {"training__max_steps": steps} if steps is not None else {}
    folder = record.root / TRIALS / variant["name"] / f"seed-{seed}"
    return Trial(variant["name"], seed, folder, loaded.path, tuple(_variant(variant).texts(asked.set, **further)))


def _variant(entry: Mapping[str, Any]) -> Variant:
    return Variant(**{field.name: entry[field.name] for field in dataclasses.fields(Variant)})


def run(record: Record, loaded: LoadedRecipe, asked: Experiment, options: Options, queue: Iterator[Trial]) -> None:
    """Run all trials that are left.

    Raises:
        Stopped: a signal asked for it; the trials that ran have written checkpoints.
    """
    if asked.budget is not None and asked.budget.seconds is not None:
        time_variants(record, loaded, asked, options)
    number = run_all(queue, options.jobs, record.start, ended(record))
    if number:
        raise stopped(number, told(record))


def told(record: Record) -> str:
    """How a comparison that is stopped goes on."""
    command = shlex.join(["peftkit", record.result["kind"], str(record.root), "--resume"])
    return f"with the trials that ran at a checkpoint. To go on:\n  {command}"


def ended(record: Record) -> Callable[[Trial, int, float], None]:
    """What notes the end of a trial and says it in a line."""

    def note(trial: Trial, code: int, seconds: float) -> None:
        entry = record.end(trial, code, seconds)
        all_trials = list(record.trials())
        over = sum(other["state"] in ("done", "failed") for other in all_trials)
        metric = record.result["metric"]
        outcome = f"{metric} {entry['metrics'][metric]:.4f}" if entry["state"] == "done" else entry["error"]
        line = f"[{over}/{len(all_trials)}] {trial.variant}, seed {trial.seed}: {outcome} ({seconds:.0f} s)"
        console.print_note(line if entry["state"] != "failed" else f"{line}; its log is {trial.log_path}")

    return note


def time_variants(record: Record, loaded: LoadedRecipe, asked: Experiment, options: Options) -> None:
    """Turn the seconds of the budget into steps for each variant, by a run of some steps of each.

    Steps rather than a clock end a run, so that its learning rate goes through the whole schedule, a run that is resumed ends
    where it would have, and all seeds of a variant learn from equally many rows.
    """
    assert isinstance(asked.budget, Budget)
    assert asked.budget.seconds is not None
    changes = {"training__max_steps": TIMED_STEPS, "training__logging_steps": 1, "evaluation__max_rows": 8}
    left = list(record.trials())
    waiting = [variant for variant in record.variants if variant["trials"][0] in left and not variant["steps"]]
    trials = {}
    for variant in waiting:
        texts = _variant(variant).texts(asked.set, training__eval_on_start=False, **changes)
        folder = record.root / TRIALS / variant["name"] / "timing"
        trials[variant["name"]] = Trial(variant["name"], -1, folder, loaded.path, tuple(texts))
    codes: dict[str, int] = {name: 0 for name, trial in trials.items() if trial.is_done}

    def end(trial: Trial, code: int, seconds: float) -> None:
        codes[trial.variant] = code
        console.print_note(
            f"timed {trial.variant}: " + (trial.error(code) if code else f"{TIMED_STEPS} steps ({seconds:.0f} s)")
        )

    queue = iter([trial for name, trial in trials.items() if name not in codes])
    number = run_all(queue, options.jobs, lambda trial: None, end)
    if number:
        raise stopped(number, told(record))
    for variant in waiting:
        _take_time(variant, trials[variant["name"]], codes[variant["name"]], asked.budget.seconds)
    record.write()


def _take_time(variant: dict[str, Any], trial: Trial, code: int, seconds: float) -> None:
    for entry in variant["trials"]:
        if code:
            entry |= {"state": "failed", "exit_code": exit_code_of(code), "error": f"could not be timed: {trial.error(code)}"}
        else:
            variant["steps"][str(entry["seed"])] = timed_steps(trial, seconds)


def print_comparison(record: Record) -> None:
    """The table, and what to know about it."""
    result = record.result
    columns, rows = table(result)
    console.print_figures(f"{result['name']}, {len(result['seeds'])} seed(s)", columns, rows)
    if len(result["seeds"]) > 1:
        console.print_text(f"+-: {INTERVAL}")
    console.print_text(f"Pareto: nothing is at least as good in {', '.join(result['pareto_over'])} and better in one of them")
    for line in failures(result):
        console.print_text(line)
    for line in [*result["notes"], *result.get("different_rows", [])]:
        console.print_text(f"note: {line}")
    console.print_text(f"written: {record.root}")


def write_report(record: Record) -> None:
    """report.html of the directory."""
    if importlib.util.find_spec("peftkit.report") is not None:
        importlib.import_module("peftkit.report").write_report([record.root], record.root / "report.html")
