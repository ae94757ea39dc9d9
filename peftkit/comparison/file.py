"""What is compared: the `compare:` or `sweep:` file, or the same from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from peftkit.errors import Problem, RecipeError
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.yaml_file import parse_yaml, read_yaml
from peftkit.run import write_text
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section

FILE = "compare.yaml"
Seeds = Annotated[list[NonNegativeInt], Field(min_length=1)]
T = TypeVar("T", bound="Experiment")


class Budget(Section):
    """What every trial may spend; one of the three."""

    steps: PositiveInt | None = Field(None, description="Optimizer steps.")
    tokens: PositiveInt | None = Field(None, description="Target tokens: training ends with the step that reaches them.")
    seconds: PositiveFloat | None = Field(None, description="Seconds of training, turned into steps by a timed run.")


class Experiment(Section):
    """What `compare` and `sweep` have in common.

    Attributes:
        recipe: the recipe, a path; relative ones count from the file's folder, then from the current one.
    """

    recipe: str = Field(min_length=1, description="The recipe that is varied.")
    name: str | None = Field(None, pattern=r"^[\w.\-]+$", description="Name; default: that of the recipe.")
    set: list[str] = Field([], description="Changes to the recipe for all trials, as KEY=VALUE.")
    seeds: PositiveInt | Seeds = Field(1, description="How many seeds, from the recipe's own on, or which.")
    budget: Budget | None = Field(None, description="What every trial may spend; default: as the recipe says.")
    metric: str | None = Field(None, description="The metric to compare; default: the task's own.")


class Comparison(Experiment):
    """`compare:` in a file: methods and other variants of a recipe."""

    methods: list[str] = Field([], description="Methods, at their defaults; the recipe's own as the recipe has it.")
    variants: dict[Annotated[str, Field(pattern=r"^[\w.\-]+$")], dict[str, Any]] = Field(
        {}, description="Name of a variant -> its keys of the recipe, such as `{adapter.method: lora, adapter.r: 4}`."
    )
    match_params: str | PositiveInt | None = Field(
        None, description="Choose sizes so that all train as many parameters as this variant, or as this number."
    )
    forgetting: str | None = Field(
        None,
        description="File of other texts: how much the loss on them grows by training; the recipe's `evaluation.forgetting`.",
    )


class Sweep(Experiment):
    """`sweep:` in a file: values of keys, all of them or searched."""

    grid: dict[str, list[Any]] = Field({}, description="Key of the recipe -> values; every combination is tried.")
    search: dict[str, str] = Field({}, description="Key of the recipe -> range, such as `float:1e-5:1e-2:log`.")
    trials: PositiveInt = Field(20, description="search: settings to try.")


def read_experiment(path: Path, kind: type[T], stated: Mapping[str, Any]) -> T:
    """What a file says, or a plain recipe; what the command line states takes the place of what the file has.

    Args:
        path: a file with the one key `compare` (or `sweep`), or a recipe.
        kind: what it shall be.
        stated: fields by name; None and empty ones are not stated.

    Raises:
        RecipeError: the file is of another kind, or something in it or in `stated` is wrong.
    """
    data, lines = read_yaml(path)
    top, other = (top_key(kind), "sweep" if top_key(kind) == "compare" else "compare")
    if set(data) == {other}:
        raise RecipeError(f"{path}: is a file for `peftkit {other}`")
    if top in data and (more := set(data) - {top}):
        raise RecipeError(f"{path}: beside `{top}` there can be nothing else; found {', '.join(sorted(more))}")
    fields = data.get(top, {"recipe": str(path)})
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: `{top}` takes a mapping with the keys {', '.join(kind.model_fields)}")
    options = {name: value for name, value in stated.items() if value not in (None, [], {})}
    try:
        found = kind.model_validate(fields | options)
    except ValidationError as error:
        where = {key[1:]: f"{path}:{line}" for key, line in lines.items() if key[:1] == (top,)}
        raise RecipeError(list(_problems(error, kind, where, options))) from None
    if problems := list(_unsound(found)):
        raise RecipeError([Problem(str(path), key, what) for key, what in problems])
    return found.model_copy(update={"recipe": str(_recipe_path(found.recipe, path))})


def top_key(kind: type[Experiment]) -> Literal["compare", "sweep"]:
    """The key under which a file holds it."""
    return "sweep" if kind is Sweep else "compare"


def write_experiment(folder: Path, experiment: Experiment) -> None:
    """Write it down in its directory, as a file that can be run again."""
    data = {top_key(type(experiment)): experiment.model_dump(mode="json", exclude_defaults=True)}
    write_text(folder / FILE, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def budget_of(stated: tuple[str, float] | None) -> dict[str, Any] | None:
    """`--budget steps 200` as the section that it stands for."""
    if stated is None:
        return None
    unit, amount = stated
    if unit not in Budget.model_fields:
        known = ", ".join(Budget.model_fields)
        raise RecipeError(f"--budget: the unit is one of {known}, not `{unit}`; such as `--budget steps 200`")
    whole = int(amount) if amount == int(amount) else amount
    return {unit: whole}


def seeds_of(text: str | None) -> int | list[int] | None:
    """`--seeds 3` (how many) or `--seeds 0,5` (which).

    Raises:
        RecipeError: it is neither.
    """
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise RecipeError(f"--seeds: takes a number of seeds, or seeds separated by commas; not `{text}`")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else numbers


def by_key(option: str, texts: Sequence[str]) -> dict[str, str]:
    """`KEY=TEXT` arguments as key -> text.

    Raises:
        RecipeError: one is of another form, or names a key again.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value or key in found:
            raise RecipeError(f"{option} {text}: takes KEY=VALUES, each key once, such as `{option} adapter.r=...`")
        found[key] = value
    return found


def values_of(text: str) -> list[Any]:
    """`8,16` or `[q_proj],[q_proj,v_proj]` as a list of values."""
    values: list[Any] = parse_value(f"[{text}]", f"--grid {text}")
    return values


def parse_value(text: str, place: str) -> Any:
    """A value of the command line, read as YAML."""
    return parse_yaml(f"value: {text}".encode(), place)[0]["value"]


def _recipe_path(name: str, file: Path) -> Path:
    """Where the recipe is.

    Raises:
        RecipeError: nowhere.
    """
    for folder in (file.parent, Path()):
        path = (folder / name) if str(file) != name else file
        if path.is_file():
            return path.absolute()
    raise RecipeError([Problem(str(file), "recipe", f"there is no file `{name}` (looked in {file.parent} and here)")])


def _problems(
    error: ValidationError, kind: type[Experiment], where: Mapping[Any, str], options: Mapping[str, Any]
) -> Iterator[Problem]:
    for item in error.errors(include_url=False):
        key = tuple(part for part in item["loc"] if "[" not in str(part) and part not in ("int", "constrained-int"))
        place = f"--{str(key[0]).replace('_', '-')}" if key[0] in options else where.get(key) or where.get(key[:1], "")
        what = item["msg"]
        if item["type"] == "extra_forbidden":
            known = Budget.model_fields if key[0] == "budget" else kind.model_fields
            what = f"no such key; there are: {', '.join(known)}{did_you_mean(str(key[-1]), known)}"
        yield Problem(place, ".".join(map(str, key)), what)


def _unsound(found: Experiment) -> Iterator[tuple[str, str]]:
    if found.budget is not None and len(found.budget.model_dump(exclude_none=True)) != 1:
        yield "budget", "takes one of steps, tokens, seconds"
    if isinstance(found.seeds, list) and len(set(found.seeds)) < len(found.seeds):
        yield "seeds", "names a seed twice"
    if isinstance(found, Comparison):
        if not found.methods and not found.variants:
            yield "methods", "names nothing to compare; such as `--methods lora,ia3,full`, or `variants:` in a file"
        if both := set(found.methods) & set(found.variants):
            yield "variants", f"are called like methods that are compared too: {', '.join(sorted(both))}"
    if isinstance(found, Sweep):
        yield from _unsound_sweep(found)


def _unsound_sweep(sweep: Sweep) -> Iterator[tuple[str, str]]:
    if bool(sweep.grid) == bool(sweep.search):
        yield "grid", "a sweep has either a grid (`--grid adapter.r=4,8`) or a search (`--search adapter.r=int:4:64:log`)"
    if not sweep.search and "trials" in sweep.model_fields_set:
        yield "trials", "has no effect on a grid, of which every combination is tried"
    for key, values in sweep.grid.items():
        if not values:
            yield "grid", f"has no values for {key}"
    if sweep.search and sweep.budget is not None and sweep.budget.steps is None:
        yield "budget", "a search is given steps: tokens and seconds would have to be counted for each trial anew"
