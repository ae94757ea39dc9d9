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
from peftkit.guides import section_of
from peftkit.methods import METHODS
from peftkit.recipe.rules import check_rules
from peftkit.recipe.schema import Recipe
from peftkit.recipe.yaml_file import Key, parse_yaml, read_yaml
from peftkit.shipped import here_or_shipped

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
# Two ways to say how long a run is: an override of one takes the place of the other that the file has.
_REPLACES: dict[str, Key] = {
    "training.max_steps": ("training", "num_train_epochs"),
    "training.num_train_epochs": ("training", "max_steps"),
}
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
        return Problem(_place(self.places, _key(key)), key, what, exit_code, section_of(key))

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Problems that are found later, by key alone, get their place in the file here."""
        try:
            yield
        except RecipeError as error:
            found = [p if p.where or not p.key else self.problem(p.key, p.what, p.exit_code) for p in error.problems]
            raise RecipeError(found, guide=error.guide) from error


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, needs_data: bool = True, checks_rules: bool = True
) -> LoadedRecipe:
    """Read, override and validate a recipe, without torch.

    Args:
        path: the YAML file; `recipes/...` may be one that comes with peftkit.
        overrides: `a.b=value` texts; values are read as YAML.
        needs_data: whether a recipe without `data` is a problem.
        checks_rules: whether its keys must go together, and its files be there.

    Raises:
        RecipeError: with every problem found, each with its place and key.
    """
    path = here_or_shipped(path)
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
        problems += [*_missing_files(data, problems, places, path.parent), *_of_another_tool(data, path)]
        raise RecipeError(problems) from None
    if recipe.name is None:
        recipe = recipe.model_copy(update={"name": re.sub(r"[^\w.\-]+", "-", path.stem)})
    loaded = LoadedRecipe(recipe, path, path.read_text(encoding="utf-8-sig"), tuple(overrides), places)
    findings = check_rules(recipe, path.parent, needs_data) if checks_rules else ()
    problems += [loaded.problem(_as_written(key, data), what, code) for key, what, code in findings]
    if problems:
        raise RecipeError(problems)
    return loaded


def _missing_files(data: Any, known: Sequence[Problem], places: Mapping[Key, str], recipe_dir: Path) -> list[Problem]:
    """Files and folders that a recipe names in vain, found although other keys of it are wrong."""
    rest = copy.deepcopy(data)
    for problem in known:
        _remove(rest, _key(problem.key))
    findings = []
    for name in ("model", "data"):
        # The one section in a recipe where all else is right: it cannot know what the other mistakes were meant to say.
        sound = {"task": "CAUSAL_LM", "model": {"name_or_path": "owner/name"}, "adapter": {"method": "full"}}
        try:
            recipe = Recipe.model_validate(sound | {name: rest[name]})
        except (KeyError, ValidationError):
            continue
        findings += [finding for finding in check_rules(recipe, recipe_dir, False) if finding[2] != RecipeError.exit_code]
    named = [(_as_written(key, data), what, code) for key, what, code in findings]
    return [Problem(_place(places, _key(key)), key, what, code) for key, what, code in named]


def _of_another_tool(data: Any, path: Path) -> Iterator[Problem]:
    """The way out for a file that was not meant as a recipe."""
    from peftkit.recipe.foreign import FOREIGN_KEYS

    if "task" not in data and len(FOREIGN_KEYS.keys() & data.keys()) > 1:
        what = f"if it is a configuration of LLaMA-Factory, axolotl or TRL: `peftkit migrate {path}` makes a recipe of it"
        yield Problem(str(path), "", what)


def _key(dotted: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def _as_written(dotted: str, data: Any) -> str:
    """The key of a rule's finding without the numbers of sources that stand in no list (`data.train.0.path`)."""
    parts = dotted.split(".")
    if parts[2:3] == ["0"] and _is_single_source(data, parts):
        del parts[2]
    return ".".join(parts)


def _is_single_source(data: Any, key: Sequence[str | int]) -> bool:
    """Whether the recipe has something else than a list at `data.NAME`, which validation makes a list of one."""
    return key[0] == "data" and not isinstance(_child(_child(data, "data"), key[1]), list)


def _remove(data: Any, keys: Key) -> None:
    """Take away the innermost mapping entry that these keys lead to."""
    *outer, last = keys
    for key in outer:
        inner = _child(data, key)
        if not isinstance(inner, dict | list) or (isinstance(inner, list) and key == outer[-1]):
            last = key  # an element is not taken out of its list: the numbers of the others would change
            break
        data = inner
    if isinstance(data, dict):
        data.pop(str(last), None)


def _child(data: Any, key: int | str) -> Any:
    """What a key leads to in plain data; None where it leads nowhere."""
    if isinstance(data, list):
        return data[key] if isinstance(key, int) and key < len(data) else None
    return data.get(str(key)) if isinstance(data, dict) else None


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
    target, key = _opened(data, places, keys, place)
    if isinstance(target, str):
        yield Problem(place, name, target)
        return
    if keys == ["adapter", "method"] and str(target.get("method")).lower() != str(parsed).lower():
        target.clear()  # the fields of another method mean nothing to this one
    if (other := _REPLACES.get(name.strip())) and not places.get(other, "").startswith("--set"):
        target.pop(other[-1], None)
    target[key[-1]] = parsed
    for inner in [other for other in places if other[: len(key)] == key]:
        del places[inner]
    places[key] = place


def _opened(data: dict[str, Any], places: dict[Key, str], keys: Sequence[str], place: str) -> tuple[Any, Key]:
    """The mapping or list that holds the last of these keys, made where it is not there, and the whole key.

    Instead of it the sentence that says why there is none, where an element of a list is not named by its number.
    """
    target: Any = data
    key: Key = ()
    for depth, name in enumerate(keys):
        if isinstance(target, list):
            if not (name.isdigit() and int(name) < len(target)):
                return f"is a list of {len(target)}: its elements are `{'.'.join(keys[:depth])}.0` and so on", key
            key = (*key, int(name))
        else:
            key = (*key, name)
        if depth == len(keys) - 1:
            break
        inner = _child(target, key[-1])
        if not isinstance(inner, dict | list):
            # `data.train.max_rows` where train is a plain path: the path is its first key.
            inner = {"path": inner} if isinstance(inner, str) and keys[0] == "data" else {}
            target[key[-1]] = inner
        places.setdefault(key, place)
        target = inner
    return target, key


def _place(places: Mapping[Key, str], key: Key) -> str:
    """Where a key was written, or the nearest section around it."""
    names = tuple(map(str, key))  # a mapping may have keys that look like numbers
    known = next((key[:depth] for depth in range(len(key), 0, -1) if {key[:depth], names[:depth]} & places.keys()), ())
    return places.get(known) or places.get(tuple(map(str, known)), "")


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
        is_known = section is not None and part in section.model_fields
        if not is_known and _is_member_name(part):
            continue
        key.append(part)
        # A number stands for an element of a list of sections.
        section = section if isinstance(part, int) else _section_at(section, part, data)
    if key[2:3] == [0] and _is_single_source(data, key):
        del key[2]
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
        takes_text = "text" in allowed.replace("mapping from text", "") and "a number" not in allowed
        if type(item["input"]) in (int, float, bool) and takes_text:
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
    info: Any = None
    names = [part for part in key if not isinstance(part, int)]  # numbers stand for elements of lists, of the same type
    for depth, name in enumerate(names):
        if section is None:
            return None, None
        info = section.model_fields.get(name)
        inner = _section_at(section, name, data)
        if depth == len(names) - 1 or info is None or inner is None:
            break
        section = inner
    return section, info


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
