"""A recipe file becomes a Recipe, or one error with every problem in it."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from peftkit.errors import Problem, RecipeError
from peftkit.methods import METHODS
from peftkit.recipe.rules import check_rules
from peftkit.recipe.schema import Recipe
from peftkit.recipe.yaml_file import Key, parse_yaml, read_yaml

_MEMBER_NAMES = (
    "bool",
    "int",
    "float",
    "str",
    "constrained-str",
    "constrained-int",
    "constrained-float",
    "dict",
    "list",
    "none",
)
_YAML_WORDS = {"True": "true", "False": "false", "None": "null"}


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where each of its keys was written.

    Attributes:
        recipe: the validated recipe.
        path: the file it came from.
        text: the file as written.
        overrides: the `--set` arguments.
        places: key path -> `file:line` or the override.
    """

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...]
    places: Mapping[Key, str]

    def problem(self, key: str, what: str, exit_code: int = 2) -> Problem:
        """A problem of this recipe, with its place in the file."""
        return Problem(_place(self.places, tuple(key.split("."))), key, what, exit_code)

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Problems that are found later, by key alone, get their place in the file here."""
        try:
            yield
        except RecipeError as error:
            found = [p if p.where or not p.key else self.problem(p.key, p.what, p.exit_code) for p in error.problems]
            raise RecipeError(found) from error


def load_recipe(path: Path, overrides: Sequence[str] = (), *, needs_data: bool = True) -> LoadedRecipe:
    """Read, override and validate a recipe, without torch.

    Args:
        path: the YAML file.
        overrides: `a.b=value` texts; values are read as YAML.
        needs_data: whether a recipe without `data` is a problem.

    Raises:
        RecipeError: with every problem found, each with its place and key.
    """
    data, lines = read_yaml(path)
    places: dict[Key, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    problems = [problem for text in overrides for problem in _override(data, places, text)]
    adapter = data.get("adapter")
    if isinstance(adapter, dict) and isinstance(adapter.get("method"), str):
        adapter["method"] = adapter["method"].lower()
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += _translate(error, data, places)
        problems += _missing_files(data, problems, places, path.parent)
        raise RecipeError(problems) from None
    if recipe.name is None:
        recipe = recipe.model_copy(update={"name": re.sub(r"[^\w.\-]+", "-", path.stem)})
    loaded = LoadedRecipe(recipe, path, path.read_text(encoding="utf-8-sig"), tuple(overrides), places)
    problems += [loaded.problem(key, what, code) for key, what, code in check_rules(recipe, path.parent, needs_data)]
    if problems:
        raise RecipeError(problems)
    return loaded


def _missing_files(data: Any, known: Sequence[Problem], places: Mapping[Key, str], recipe_dir: Path) -> list[Problem]:
    """Files and folders that a recipe names in vain, found although other keys of it are wrong."""
    rest = copy.deepcopy(data)
    for problem in known:
        _remove(rest, problem.key.split("."))
    findings = []
    for name in ("model", "data"):
        # The one section in a recipe where all else is right: it cannot know what the other mistakes were meant to say.
        sound = {"task": "CAUSAL_LM", "model": {"name_or_path": "owner/name"}, "adapter": {"method": "full"}}
        try:
            recipe = Recipe.model_validate(sound | {name: rest[name]})
        except (KeyError, ValidationError):
            continue
        findings += [finding for finding in check_rules(recipe, recipe_dir, False) if finding[2] != RecipeError.exit_code]
    return [Problem(_place(places, tuple(key.split("."))), key, what, code) for key, what, code in findings]


def _remove(data: dict[str, Any], keys: Sequence[str]) -> None:
    """Take away the innermost mapping entry that these keys lead to."""
    for key in keys[:-1]:
        if not isinstance(data.get(key), dict):
            data.pop(key, None)
            return
        data = data[key]
    data.pop(keys[-1], None)


def _override(data: dict[str, Any], places: dict[Key, str], text: str) -> Iterable[Problem]:
    """Put one `a.b=value` into the raw data; yields what is wrong with it."""
    place = f"--set {text if len(text) <= 100 else text[:97] + '...'}"
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        yield Problem(place, "", "an override is KEY=VALUE, such as `--set training.learning_rate=1e-4`")
        return
    try:
        parsed = parse_yaml(f"value: {value}".encode(), place)[0]["value"]
    except RecipeError as error:
        yield Problem(place, name, error.problems[0].what)
        return
    target: Any = data
    for depth, key in enumerate(keys[:-1], 1):
        if not isinstance(target.get(key), dict):
            # `data.train.max_rows` where train is a plain path: the path is its first key.
            target[key] = {"path": target[key]} if isinstance(target.get(key), str) and keys[0] == "data" else {}
        places.setdefault(tuple(keys[:depth]), place)
        target = target[key]
    if keys == ["adapter", "method"] and str(target.get("method")).lower() != str(parsed).lower():
        target.clear()  # the fields of another method mean nothing to this one
    target[keys[-1]] = parsed
    for inner in [key for key in places if key[: len(keys)] == tuple(keys)]:
        del places[inner]
    places[tuple(keys)] = place


def _place(places: Mapping[Key, str], key: Key) -> str:
    """Where a key was written, or the nearest section around it."""
    while key not in places and key:
        key = key[:-1]
    return places.get(key, "")


def _translate(error: ValidationError, data: Any, places: Mapping[Key, str]) -> list[Problem]:
    """Pydantic's errors as ours: one problem per key, in the order of the file."""
    grouped: dict[Key, list[Any]] = {}
    for item in error.errors(include_url=False):
        *parents, last = item["loc"]
        # A key that does not exist may be called anything, `dict` and `list` too.
        key = (*_clean((*parents,), data), last) if item["type"] == "extra_forbidden" else _clean(item["loc"], data)
        grouped.setdefault(key, []).append(item)
    # Where one form of a value (a path or a section) fails inside, that the other forms do not fit either says nothing.
    outer = {key[:depth] for key in grouped for depth in range(1, len(key))}
    problems = [_problem(key, items, data, places) for key, items in grouped.items() if key not in outer]
    return sorted(problems, key=lambda problem: _line_of(problem.where))


def _line_of(where: str) -> int:
    line = where.rpartition(":")[2]
    return int(line) if line.isdigit() else 0


def _clean(loc: tuple[int | str, ...], data: Any) -> Key:
    """Drop what pydantic adds to a location: the tag of the adapter's method and names of union members."""
    if len(loc) > 1 and loc[0] == "adapter" and loc[1] in METHODS:
        loc = (loc[0], *loc[2:])
    key: list[int | str] = []
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if section is not None and part not in section.model_fields and _is_member_name(part):
            continue
        in_sequence = isinstance(part, int) or section is None
        if in_sequence and _is_member_name(part):
            continue
        key.append(part)
        section = _section_at(section, part, data)
    return tuple(key)


def _is_member_name(part: int | str) -> bool:
    return any(mark in str(part) for mark in "[(") or part in _MEMBER_NAMES


def _section_at(section: type[BaseModel] | None, part: int | str, data: Any) -> type[BaseModel] | None:
    if section is None or part not in section.model_fields:
        return None
    if section is Recipe and part == "adapter":
        adapter = data.get("adapter") if isinstance(data, dict) else None
        method = METHODS.get(str(adapter.get("method"))) if isinstance(adapter, dict) else None
        return method.section if method else None
    from peftkit.recipe.explain import section_of

    return section_of(section.model_fields[str(part)].annotation)


def _problem(key: Key, items: list[Any], data: Any, places: Mapping[Key, str]) -> Problem:
    from peftkit.recipe.explain import key_info  # only errors need it: a sound recipe is answered sooner

    item = items[0]
    dotted = ".".join(map(str, key))
    parent, info = _field_at(key, data)
    if item["type"] == "extra_forbidden":
        what = unknown_key(str(key[-1]), parent, dotted.rpartition(".")[0])
    elif item["type"] == "missing":
        what = "is missing" + (f": {info.description}" if info is not None and info.description else "")
    elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        dotted, what = "adapter.method", _method_problem(item)
        key = ("adapter", "method")
    else:
        allowed = key_info(dotted, info).type_text if info is not None else item["msg"]
        what = f"{_shown(item['input'])} is not allowed; it takes {allowed}"
        what += did_you_mean(str(item["input"]), allowed.split(" | "))
        if type(item["input"]) in (int, float, bool) and "text" in allowed.replace("mapping from text", ""):
            what += "; in quotes it is text"
    return Problem(_place(places, key), dotted, what)


def _method_problem(item: Any) -> str:
    names = ", ".join(METHODS)
    if item["type"] == "union_tag_not_found":
        return f"is missing; it takes one of: {names}"
    tag = str(item["ctx"]["tag"])
    return f"no method is called `{tag}`; there are: {names}" + did_you_mean(tag, METHODS)


def _field_at(key: Key, data: Any) -> tuple[type[BaseModel] | None, Any]:
    """The section that holds this key (or its nearest parent), and the field's info where the key is known."""
    section: type[BaseModel] | None = Recipe
    for depth, part in enumerate(key):
        if section is None:
            return None, None
        info = section.model_fields.get(str(part))
        inner = _section_at(section, part, data)
        if depth == len(key) - 1 or info is None or inner is None:
            return section, info
        section = inner
    return section, None


def unknown_key(name: str, section: type[BaseModel] | None, prefix: str) -> str:
    """The sentence for a key that does not exist, with the best suggestion there is."""
    from peftkit.recipe.explain import all_keys
    from peftkit.recipe.foreign import FOREIGN_KEYS

    same = [info for info in all_keys() if info.path.rpartition(".")[2] == name]
    methods = [info.method for info in same if info.path == f"{prefix}.{name}"]
    ours = [info.path for info in same if info.path != f"{prefix}.{name}"]
    if any(methods):
        others = f" and {len(methods) - 3} others" if len(methods) > 3 else ""
        return f"no such key for this method; it belongs to `method: {' or '.join(methods[:3])}`{others}"
    if name in FOREIGN_KEYS:
        return f"no such key; here it is {FOREIGN_KEYS[name]}"
    close = did_you_mean(name, section.model_fields) if section is not None else ""
    if close:
        return f"no such key{close}"
    if ours:
        return f"no such key here; did you mean `{ours[0]}`?"
    known = ", ".join(section.model_fields) if section is not None else "none"
    return f"no such key; there are: {known}"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The best suggestion for a mistyped name, as the end of a sentence; empty where there is none."""
    import difflib

    close = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.75)
    best = max(close, key=lambda other: (sorted(other) == sorted(name), other[0] == name[0]), default="")
    return f"; did you mean `{best}`?" if best else ""


def _shown(value: Any) -> str:
    text = f"`{value}`" if isinstance(value, str) else _YAML_WORDS.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
