"""`peftkit compare`: methods and other variants of a recipe on the same rows, under the same budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.commands import experiment
from peftkit.comparison.file import Comparison, read_experiment
from peftkit.comparison.record import Record
from peftkit.comparison.variants import (
    Variant,
    make_variants,
    override_text,
    refuse_lengths,
    wanted_of,
)
from peftkit.errors import RecipeError
from peftkit.recipe import LoadedRecipe
from peftkit.stop import stops_at_once


def compare(path: Path, stated: Mapping[str, Any], options: experiment.Options) -> Record:
    """Compare; `path` is a recipe, a `compare:` file, or the directory of a comparison; `stated`: fields of `Comparison`.

    Raises:
        RecipeError: something is wrong that is known before the first trial.
        Stopped: a signal asked for it.
    """
    path, options = experiment.directory_given(path, options)
    with stops_at_once("before the first trial"):
        asked = with_forgetting(read_experiment(path, Comparison, stated), path)
        loaded = experiment.prepare(asked, options)
        wanted = wanted_of(asked.methods, asked.variants)
        refuse_lengths(wanted, asked.budget)
        # The file in the directory says all of it, so that it can be run without the command line.
        asked = asked.model_copy(update={"methods": [], "variants": wanted})
        record = Record.begin(experiment.find_directory(asked, loaded, options), loaded, asked)
        if not options.resume:
            settle(record, loaded, asked, options)
    with experiment.opened(record, loaded, asked, options):
        experiment.run(record, loaded, asked, options, experiment.planned(record, loaded, asked))
        record.finish()
    return record


def with_forgetting(asked: Comparison, path: Path) -> Comparison:
    """The same with `forgetting` as a key of the recipe, its path seen from the file or from the current folder."""
    if asked.forgetting is None:
        return asked
    found = next((place for place in (path.parent, Path()) if (place / asked.forgetting).is_file()), Path())
    text = override_text("evaluation.forgetting", str((found / asked.forgetting).absolute()))
    return asked.model_copy(update={"forgetting": None, "set": [*asked.set, text]})


def settle(record: Record, loaded: LoadedRecipe, asked: Comparison, options: experiment.Options) -> None:
    """Check every variant as a recipe, look at it up to the weights, and enter what is found.

    Raises:
        PeftkitError: variants cannot work and are not to be skipped.
    """
    variants, refused = make_variants(loaded, asked.variants, skip_refused=options.skip_refused)
    seeds, reference = record.result["seeds"], asked.match_params
    names = [variant.name for variant in variants]
    if isinstance(reference, str) and reference not in names:
        raise RecipeError(f"--match-params: `{reference}` is not compared; name one of {', '.join(names)}, or a number")
    variants = sorted(variants, key=lambda variant: variant.name != reference)  # the others are matched to it
    console.print_note(f"looking at {len(variants)} variants up to their weights")
    requests = [
        experiment.request(loaded, variant.texts(asked.set, training__seed=seeds[0]), target=_target(reference, variant))
        for variant in variants
    ]
    answers = experiment.ask(requests)
    for variant, found in zip(variants, answers, strict=True):
        if "problem" in found:
            refused[variant.name] = found["problem"]
    sound = [(variant, found) for variant, found in zip(variants, answers, strict=True) if "problem" not in found]
    experiment.refuse_problems(
        [found | {"name": variant.name} for variant, found in zip(variants, answers, strict=True)], options
    )
    record.decide_metric(sound[0][1]["metric"], "test" if "test" in sound[0][1]["splits"] else "validation")
    if record.result["split"] == "validation":
        record.result["notes"].append("validation rows chose the step that is kept too: their figures flatter all variants")
    experiment.enter(record, loaded, asked, sorted(sound, key=lambda pair: names.index(pair[0].name)))
    for name, reason in refused.items():
        record.refuse(name, reason, asked.variants[name])


def _target(reference: str | int | None, variant: Variant) -> Any:
    if reference is None or variant.name == reference:
        return None
    return {"of": 0} if isinstance(reference, str) else reference
