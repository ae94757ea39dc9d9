"""In what two runs, or recipes, differ: keys, versions, machine, rows and model; and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import LoadError
from peftkit.plan import Hardware, make_plan
from peftkit.recipe import load_recipe
from peftkit.recipe.explain import all_keys
from peftkit.recipe.yaml_file import parse_yaml
from peftkit.report.changes import flat
from peftkit.report.facts import Json, RunFacts, is_run, mapping, read_run
from peftkit.resolved import resolved_yaml

Pairs = dict[str, tuple[Any, Any]]

_UNDECIDED = "auto"  # of a recipe: what a machine, the rows or the model will decide
_NO_DIFFERENCE = ("name", "output.dir")
_MACHINE = ("python", "platform", "device", "num_processes", "git_commit")
_COSTS = ("global_step", "train_loss", "trainable_params", "train_seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        path: run directory or recipe.
        is_run: which of them it is.
        recipe: dotted key -> value, as resolved; `auto` where nothing has decided it yet.
        environment: packages and facts about the machine, by dotted names; empty for a recipe.
        fingerprints: of rows and model; likewise.
        results: metrics as `split.name`, and what the run cost; likewise.
        notes: what could not be read.
    """

    path: Path
    is_run: bool
    recipe: Json
    environment: Json = field(default_factory=dict)
    fingerprints: Json = field(default_factory=dict)
    results: Json = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Differences:
    """Name -> (left, right) in four parts; None is what a side has not. `results` are all there are, alike or not."""

    recipe: Pairs
    environment: Pairs
    fingerprints: Pairs
    results: Pairs


def read_side(path: Path) -> Side:
    """A run directory, or a recipe.

    Raises:
        LoadError: it is neither, or a run without a readable recipe.
        RecipeError: the recipe is not valid.
    """
    if path.is_dir():
        if not is_run(path):
            raise LoadError(f"{path} is no run directory; name what `train` wrote, or a recipe")
        return _side_of_run(path, read_run(path))
    loaded = load_recipe(path, needs_data=False, checks_rules=False)
    # Any machine will do, and this one refuses least: what it decides is taken out again.
    plan = make_plan(loaded, Hardware("cuda", "any", supports_bf16=True, memory_bytes=0))
    values = flat(parse_yaml(resolved_yaml(plan).encode(), str(path))[0])
    open_keys = {choice.key for choice in plan.choices} & values.keys() - {"training.learning_rate"}
    return Side(path, False, values | dict.fromkeys(open_keys, _UNDECIDED))


def _side_of_run(path: Path, facts: RunFacts) -> Side:
    if not facts.resolved:
        raise LoadError(f"{path} has no recipe that can be read: {'; '.join(facts.unreadable) or 'there is none'}")
    machine = {name: facts.environment.get(name) for name in _MACHINE if name in facts.environment}
    metrics = {f"{split}.{name}": value for split, scores in facts.last_scores.items() for name, value in scores.items()}
    costs = {name: facts.summary[name] for name in _COSTS if name in facts.summary}
    return Side(
        path=path,
        is_run=True,
        recipe=flat(facts.resolved),
        environment=flat(mapping(facts.environment.get("packages"))) | machine,
        fingerprints=mapping(facts.environment.get("fingerprints")),
        results=metrics | costs,
        notes=facts.unreadable,
    )


def differences(left: Side, right: Side) -> Differences:
    """How two sides differ; parts that only one of them has, as versions beside a recipe, are no difference."""
    # What a recipe leaves open, a run may have decided in any way.
    wildcard = _UNDECIDED if left.is_run != right.is_run else None
    return Differences(
        recipe=_unlike(_stated(left, right), _stated(right, left), wildcard),
        environment=_unlike(left.environment, right.environment),
        fingerprints=_unlike(left.fingerprints, right.fingerprints),
        results=_pairs(left.results, right.results),
    )


def _stated(side: Side, other: Side) -> Json:
    """The keys of a side without those that the other has not and that are at their defaults, as of another method."""
    method = str(side.recipe.get("adapter.method", ""))
    defaults = {key.path: key.default for key in all_keys() if key.method in ("", method) and not key.required}
    idle = {
        key
        for key, value in side.recipe.items()
        if key not in other.recipe and (value in (None, {}, []) or (key in defaults and value == defaults[key]))
    }
    return {key: value for key, value in side.recipe.items() if key not in idle and key not in _NO_DIFFERENCE}


def _pairs(left: Mapping[str, Any], right: Mapping[str, Any]) -> Pairs:
    return {name: (left.get(name), right.get(name)) for name in {**left, **right}}


def _unlike(left: Json, right: Json, wildcard: str | None = None) -> Pairs:
    if not left or not right:
        return {}
    pairs = _pairs(left, right)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and (wildcard is None or wildcard not in pair)}
