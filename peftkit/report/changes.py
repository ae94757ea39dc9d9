"""What of a recipe is not the default, and in what several runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.recipe.explain import KeyInfo, all_keys
from peftkit.report.facts import Json, RunFacts, mapping


@dataclass(frozen=True)
class Change:
    """A key of the recipe whose value is not the default.

    Attributes:
        key: dotted.
        value: what it is.
        default: what it would be; None with `required`.
        required: whether it has no default.
        origin: who said so: recipe, --set, or decided where the recipe left it open.
        description: what the key means.
    """

    key: str
    value: Any
    default: Any
    required: bool
    origin: str
    description: str


def changes(facts: RunFacts) -> list[Change]:
    """The keys of a run that are not at their defaults, in the order of the schema."""
    method = str(mapping(facts.resolved.get("adapter")).get("method", ""))
    values, written = flat(facts.resolved), flat(facts.written)
    found = []
    for key in all_keys():
        is_ours = key.method in ("", method) and key.path in values and key.path != "name"
        if is_ours and _differs(key, values[key.path]):
            origin = _origin(key.path, written, facts)
            found.append(Change(key.path, values[key.path], key.default, key.required, origin, key.description))
    return found


def differing(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """key -> its value in every run, for the keys in which they differ; the name alone is no difference."""
    values = [flat(facts.resolved) for facts in runs]
    keys = dict.fromkeys(key for run in values for key in run if key not in ("name", "output.dir"))
    table = {key: [run.get(key) for run in values] for key in keys}
    return {key: row for key, row in table.items() if any(value != row[0] for value in row)}


def flat(recipe: Json, prefix: str = "") -> Json:
    """Dotted key -> value. Mappings that are values, such as `rank_pattern`, are taken apart like sections."""
    found: Json = {}
    for name, value in recipe.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        found |= inner or {f"{prefix}{name}": value}
    return found


def _differs(key: KeyInfo, value: Any) -> bool:
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    return key.required or (value != default and not (value in (None, {}) and default in (None, {})))


def _origin(path: str, written: Json, facts: RunFacts) -> str:
    """A key below one that is written, such as `data.train.path` below `data.train`, is written too."""
    arguments = [str(argument).removeprefix("--set=") for argument in facts.environment.get("argv") or []]
    names = path.split(".")
    stems = [".".join(names[:count]) for count in range(1, len(names) + 1)]
    if any(argument.startswith(f"{stem}=") for stem in stems for argument in arguments):
        return "--set"
    return "recipe" if any(written.get(stem, "auto") != "auto" for stem in stems) else "decided"
