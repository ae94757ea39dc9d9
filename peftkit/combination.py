"""What `peftkit combine` is asked for: the methods, their settings, and what cannot be meant; free of torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit.errors import DataError, RecipeError

_SIGNED, _PRUNED = ("ties", "dare_ties"), ("ties", "dare_ties", "dare_linear", "magnitude_prune")
ON_FACTORS = ("linear", *_PRUNED)  # applied to lora_A and to lora_B, which must then have one rank
# Names of `combination_type` of PEFT's `add_weighted_adapter`.
COMBINATIONS = ("cat", "svd", *ON_FACTORS, *(f"{name}_svd" for name in _PRUNED))
MAJORITY_SIGNS = ("total", "frequency")


COMBINATION, BASE = "combination", "base"  # what tables call them
MOST = 100  # combinations that a search tries
_WEIGHTS = ((0.25, 0.5, 0.75, 1.0), (0.5, 1.0))
_DENSITIES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Combination:
    """How adapters are combined; the names are those of PEFT's `add_weighted_adapter`.

    Attributes:
        method: one of COMBINATIONS.
        weights: one per adapter.
        density: share of the numbers that is kept, for methods that prune.
        majority_sign_method: how ties and dare_ties elect a sign: by the numbers' sum (`total`) or that of their
            signs (`frequency`).
        svd_rank: rank of the result of svd and the `_svd` methods; None: the largest rank of the adapters.
        seed: of what dare_linear and dare_ties drop.
    """

    method: str
    weights: tuple[float, ...]
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None
    seed: int = 0

    @property
    def by_svd(self) -> bool:
        """Whether the result is the best approximation of its rank."""
        return self.method.endswith("svd")


def prunes(method: str) -> bool:
    """Whether a method takes a density."""
    return method.removesuffix("_svd") in _PRUNED


def elects_signs(method: str) -> bool:
    """Whether a method takes a majority sign method; it averages over the adapters that have that sign."""
    return method.removesuffix("_svd") in _SIGNED


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        adapters: run directories or adapter folders, each as DIR or NAME=DIR.
        output: folder of the combination.
        method: one of COMBINATIONS.
        weights: one per adapter; None: their mean.
        density: share of the numbers to keep.
        majority_sign_method: `total` or `frequency`; None: `total`.
        svd_rank: rank of the result.
        data: rows to measure on, each as FILE (in the adapters' order) or NAME=FILE.
        search: whether to look for weights.
        seed: of what is dropped at random.
        batch_size: rows per pass.
        max_rows: use only the first rows.
        base: base model, where the one that the adapters name cannot be found.
    """

    adapters: tuple[str, ...]
    output: Path
    method: str = "cat"
    weights: tuple[float, ...] | None = None
    density: float | None = None
    majority_sign_method: str | None = None
    svd_rank: int | None = None
    data: tuple[str, ...] = ()
    search: bool = False
    seed: int | None = None
    batch_size: int = 16
    max_rows: int | None = None
    base: str | None = None


def named_adapters(adapters: Sequence[str]) -> dict[str, Path]:
    """Name -> folder: the name that is given, that of the run directory, or else the path itself.

    Raises:
        RecipeError: fewer than two adapters, or two of one name.
    """
    if len(adapters) < 2:
        raise RecipeError(f"DIR...: name at least 2 adapters to combine, there is {len(adapters)}")
    pairs = []
    for text in adapters:
        name, equals, path = text.partition("=")
        given = equals and not Path(text).is_dir()
        folder = Path(path if given else text)
        whole = folder.absolute()
        pairs.append((name if given else whole.parent.name if whole.name == "adapter" else whole.name, folder))
    names = [name for name, _ in pairs]
    named = {name if names.count(name) == 1 else str(folder): folder for name, folder in pairs}
    if len(named) < len(pairs) or {BASE, COMBINATION} & named.keys():
        raise RecipeError(
            f"DIR...: each adapter needs a name of its own, and neither `{BASE}` nor `{COMBINATION}`; use NAME=DIR"
        )
    return named


def option_problems(asked: Request, number: int) -> Iterator[str]:
    """What is wrong with the options for so many adapters, a line each."""
    method, weights = asked.method, asked.weights
    if method not in COMBINATIONS:
        yield f"--method: there is no `{method}`; there are {', '.join(COMBINATIONS)}"
        return
    if asked.output.exists() and (not asked.output.is_dir() or any(asked.output.iterdir())):
        yield f"--output {asked.output}: is not empty; name a new folder"
    if weights is not None and asked.search:
        yield "--weights: has no effect with --search, which chooses them"
    elif weights is not None and len(weights) != number:
        yield f"--weights: {len(weights)} for {number} adapters; name one for each, in their order"
    elif weights is not None and not (all(map(math.isfinite, weights)) and any(weights)):
        yield "--weights: must be finite numbers, not all of them 0"
    yield from _method_problems(asked)
    if asked.search and not asked.data:
        yield "--search: needs --data, the rows that decide which weights are best"
    if not asked.data and asked.max_rows is not None:
        yield "--max-rows: has no effect without --data"


def _method_problems(asked: Request) -> Iterator[str]:
    """Options that the method does not take, or needs."""
    method, density = asked.method, asked.density
    if prunes(method) and density is None and not asked.search:
        yield f"--density: is needed by `{method}`: the share of the numbers that it keeps, such as 0.5"
    if prunes(method) and density is not None and not 0 < density <= 1:
        yield f"--density: {density:g} is not above 0 and at most 1"
    given = {
        "--density": (density is not None, prunes(method)),
        "--majority-sign-method": (asked.majority_sign_method is not None, elects_signs(method)),
        "--svd-rank": (asked.svd_rank is not None, method.endswith("svd")),
        "--seed": (asked.seed is not None, method.startswith("dare")),
    }
    for option, (is_given, has_effect) in given.items():
        if is_given and not has_effect:
            yield f"{option}: has no effect with `--method {method}`"
    if asked.majority_sign_method not in (None, *MAJORITY_SIGNS):
        yield f"--majority-sign-method: `{asked.majority_sign_method}` is not allowed; it takes {' | '.join(MAJORITY_SIGNS)}"


def files_of(data: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Name of an adapter -> its rows.

    Raises:
        RecipeError: names that no adapter has, or not one file for each.
        DataError: a file that is not there.
    """
    by_name = [text.partition("=") for text in data if text.partition("=")[0] in names and "=" in text]
    if by_name and len(by_name) < len(data):
        what = "either FILE for each adapter, in their order, or NAME=FILE for some"
        raise RecipeError(f"--data: {what}; the names are {', '.join(names)}")
    if data and not by_name and len(data) != len(names):
        raise RecipeError(f"--data: {len(data)} files for {len(names)} adapters; name one for each, or NAME=FILE for some")
    pairs = [(name, Path(path)) for name, _, path in by_name] or list(zip(names, map(Path, data), strict=False))
    files = dict(pairs)
    if len(files) < len(pairs):
        raise RecipeError("--data: names an adapter twice")
    if gone := [path for path in files.values() if not path.exists()]:
        raise DataError(f"--data: there is no file `{gone[0]}`")
    return files


def grid(how: Combination, number: int) -> list[Combination]:
    """What a search tries: every choice of a few weights, and of densities where the method prunes and none is given.

    With many adapters there are fewer weights to choose from, and in the end one for all of them, so that it stays within MOST.

    Args:
        how: the combination that is asked for.
        number: how many adapters there are.
    """
    densities = _DENSITIES if prunes(how.method) and how.density is None else (how.density,)
    choices = [list(itertools.product(values, repeat=number)) for values in _WEIGHTS if len(values) ** number <= MOST]
    choices = [chosen for chosen in choices if len(chosen) * len(densities) <= MOST]
    weights = choices[0] if choices else [(value,) * number for value in _WEIGHTS[0]]
    return [dataclasses.replace(how, weights=chosen, density=density) for chosen in weights for density in densities]
