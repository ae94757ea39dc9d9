"""A configuration of another tool as plain data: YAML, JSON, or the TRL command of a shell script."""

from __future__ import annotations

import json
import re
import shlex
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, RecipeError
from peftkit.migration.base import Config
from peftkit.migration.places import find_place
from peftkit.recipe.yaml_file import MAX_BYTES, parse_scalar, parse_yaml

_YAML, _JSON, _SHELL = (".yaml", ".yml"), (".json",), (".sh", ".bash", ".txt", "")
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\S*|\"[^\"]*\"|'[^']*')\s*$", re.MULTILINE)
_WORDS = {"yes": True, "on": True, "off": False}  # as YAML 1.1 has it; `no` is a strategy too, and stays


def read_config(path: Path) -> Config:
    """Read a file, by its suffix.

    Raises:
        RecipeError: it cannot be read, or is no configuration.
    """
    content, suffix = _content(path), path.suffix.lower()
    if suffix in _SHELL:
        return _read_shell(path, content)
    if suffix in _JSON:
        return Config(path, _json_mapping(path, content))
    if suffix in _YAML:
        return _read_yaml(path, content)
    known = ", ".join(filter(None, (*_YAML, *_JSON, *_SHELL)))
    raise RecipeError([Problem(str(path), "", f"files that end in `{suffix}` are not read; those in {known} are")])


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError([Problem(str(path), "", "is a folder; name the configuration file in it")]) from None
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from None


def _read_yaml(path: Path, content: bytes) -> Config:
    try:
        values, lines = parse_yaml(content, str(path))
    except RecipeError as error:
        found = [Problem(p.where, p.key, p.what.replace("recipe", "configuration"), p.exit_code) for p in error.problems]
        raise RecipeError(found) from None
    made = {key: _WORDS.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    return Config(path, made, {str(key[0]): line for key, line in lines.items() if len(key) == 1})


def _json_mapping(path: Path, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecipeError([Problem(str(path), "", f"not valid JSON: {error}")]) from None
    if not isinstance(values, dict):
        raise RecipeError([Problem(str(path), "", "a configuration is a mapping of keys and values; this is none")])
    return values


def _read_shell(path: Path, content: bytes) -> Config:
    """The one `trl COMMAND --option value` (or `sft.py --option value`) of a script."""
    text = content.decode("utf-8", errors="replace").replace("\\\r\n", " ").replace("\\\n", " ")
    variables = {name: value.strip("\"'") for name, value in _ASSIGNMENT.findall(text)}
    found = list(_commands(path, text, variables))
    if len(found) != 1:
        what = (
            f"has {len(found)} TRL commands; keep the one to move over"
            if found
            else "has no `trl sft ...` command; of other tools the YAML is read"
        )
        raise RecipeError([Problem(str(path), "", what)])
    command, before, after = found[0]
    values = _options(before) | _options(after)
    if any("$" in str(value) for value in values.values()):
        named = ", ".join(key for key, value in values.items() if "$" in str(value))
        what = f"the script sets no such variable with a plain `NAME=value`: {named}; put the values themselves there"
        raise RecipeError([Problem(str(path), "", what)])
    return Config(path, _from_file(values, path) | values, {}, command)


def _commands(path: Path, text: str, variables: Mapping[str, str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """What TRL is asked for, the words before that, and those after, for every command of a script."""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
        except ValueError as error:
            if "trl" not in line:
                continue
            raise RecipeError([Problem(f"{path}:{number}", "", f"is no shell command: {error}")]) from None
        for place, word in enumerate(words):
            if word.rpartition("/")[2] == "trl" and len(words) > place + 1 and not words[place + 1].startswith("-"):
                yield words[place + 1], words[:place], words[place + 2 :]
            elif re.search(r"(^|/)(sft|dpo|grpo|kto|reward|rloo|orpo|ppo|gkd|distillation)\w*\.py$", word):
                yield Path(word).stem.partition("_")[0], words[:place], words[place + 1 :]


def _options(words: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b`, `--flag` and `--no_flag`."""
    values: dict[str, Any] = {}
    for name, *rest in _grouped(words):
        key, equals, value = name[2:].partition("=")
        key = key.replace("-", "_")
        given = [parse_scalar(word) for word in ([value] if equals else []) + rest]
        if not given and key.startswith("no_"):
            values[key[3:]] = False
        else:
            values[key] = True if not given else given[0] if len(given) == 1 else given
    return values


def _grouped(words: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for word in words:
        if word.startswith("--"):
            if group:
                yield group
            group = [word]
        elif group and word not in ("\\", "&", "&&", "|", ";"):
            group.append(word)
    if group:
        yield group


def _from_file(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the file of `--config` says, which the command line has the last word on."""
    name = values.pop("config", None)
    if name is None:
        return {}
    place = find_place(str(name), path.parent)
    if place is None:
        raise RecipeError([Problem(str(path), "config", f"there is no file `{name}`")])
    return dict(read_config(place).values)
