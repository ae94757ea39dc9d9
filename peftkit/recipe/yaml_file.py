"""YAML text to plain data and line numbers, without YAML 1.1's surprises.

PyYAML follows YAML 1.1: `1e-4` is a string, `no` a boolean, `0010` eight, `12:30` 750, and of two equal keys the last wins.
Scalars are read here by the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema) instead, from the nodes of a
loader of our own; `yaml.SafeLoader` itself stays as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from peftkit.errors import Problem, RecipeError

Key = tuple[str | int, ...]
MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # after aliases are expanded: a recipe has some hundred nodes, an alias bomb billions
MAX_DEPTH = 50

# Longer ones are no number of a recipe, and int() refuses them from 4300 digits on.
_INT = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INF_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_PLAIN = "plain"  # the tag given here to unquoted scalars without a tag, which `parse_scalar` then reads


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that resolves no plain scalar by itself, so that each of them reaches `parse_scalar`."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """The tag of a node; a plain scalar's is `_PLAIN`."""
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, (False, True))  # type: ignore[no-untyped-call]


def parse_scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar: null, bool, int, float or the text itself."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _INF_NAN.fullmatch(text) else text


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """Read a recipe file.

    Returns:
        The mapping, and for every key path its line (from 1).

    Raises:
        RecipeError: the file cannot be read, is not UTF-8 text, not one YAML mapping, or uses tags, equal keys or alias bombs.
    """
    try:
        with path.open("rb") as handle:
            content = handle.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError([Problem(str(path), "", "is a folder, not a recipe file")]) from None
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from None
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, name: str) -> tuple[dict[str, Any], dict[Key, int]]:
    """Parse the bytes of a recipe called `name` in messages; see `read_yaml`."""
    text = _decode(content, name)
    try:
        node = yaml.compose(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError([Problem(f"{name}:{line}", "", f"not valid YAML: {_words(error)}")]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not valid YAML: {str(error).splitlines()[0]}"
        raise RecipeError([Problem(f"{name}:{line}", "", what)]) from None
    except RecursionError:
        raise RecipeError([Problem(name, "", "nested too deeply to be a recipe")]) from None
    if node is None:
        raise RecipeError([Problem(name, "", "the recipe is empty; `peftkit init` writes one to start from")])
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([Problem(f"{name}:1", "", "a recipe is a mapping of sections such as `model:` and `data:`")])
    reader = _NodeReader(name)
    data = reader.read(node, ())
    if reader.problems:
        raise RecipeError(reader.problems)
    return data, reader.lines


def _words(error: yaml.MarkedYAMLError) -> str:
    if error.problem == "but found another document":
        return "a recipe is one document; a second one starts here (`---`)"
    return str(error.problem or error.context or error)


def _decode(content: bytes, name: str) -> str:
    if len(content) > MAX_BYTES:
        raise RecipeError([Problem(name, "", f"is too large to be a recipe; at most {MAX_BYTES:,} bytes are read")])
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError([Problem(name, "", "is UTF-16; save it as UTF-8")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8; save the file as UTF-8 text"
        raise RecipeError([Problem(f"{name}:{line}", "", what)]) from None
    if "\0" in text:
        raise RecipeError([Problem(name, "", "has NUL bytes: a binary file, not a recipe")])
    return text


def _is_merge(name: yaml.Node) -> bool:
    return isinstance(name, yaml.ScalarNode) and name.value == "<<" and name.tag == _PLAIN


class _NodeReader:
    """Turns YAML nodes into plain data, keeps the line of every key and collects what is wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Key, int] = {}
        self.problems: list[Problem] = []
        self.num_nodes = 0
        self.depth = 0

    def read(self, node: yaml.Node, key: Key) -> Any:
        """The value of a node that stands at `key`; None where a problem was noted."""
        self.num_nodes += 1
        self.depth += 1  # not the length of `key`, which stays the same while `<<` merges
        if self.num_nodes > MAX_NODES or self.depth > MAX_DEPTH:
            what = f"expands to over {MAX_NODES:,} values or {MAX_DEPTH} levels (an alias bomb?); a recipe needs some hundred"
            raise RecipeError([*self.problems, Problem(self._where(node), "", what)])
        self.lines.setdefault(key, node.start_mark.line + 1)
        value = self._read(node, key) if self._has_core_tag(node, key) else None
        self.depth -= 1
        return value

    def _has_core_tag(self, node: yaml.Node, key: Key) -> bool:
        if node.tag == _PLAIN or node.tag in _CORE_TAGS:
            return True
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        self._report(node, key, f"the tag {tag} is not allowed; recipes hold plain values only")
        return False

    def _read(self, node: yaml.Node, key: Key) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*key, index)) for index, item in enumerate(node.value)]
        return self._read_scalar(node, key)

    def _read_scalar(self, node: Any, key: Key) -> Any:
        if node.tag == _PLAIN:
            return parse_scalar(node.value)
        kind = node.tag.rpartition(":")[2]
        value = node.value if kind == "str" else parse_scalar(node.value)
        if kind == "float" and type(value) is int:
            value = float(value)
        if type(value).__name__ == kind or (kind == "null" and value is None):
            return value
        self._report(node, key, f"`{node.value}` is no {kind}")
        return None

    def _read_mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        # Merged keys first, so that the lines of the keys that replace them win.
        for name_node, value_node in sorted(node.value, key=lambda pair: not _is_merge(pair[0])):
            if _is_merge(name_node):
                merged |= self._read_merge(value_node, key)
                continue
            if not isinstance(name_node, yaml.ScalarNode):
                self._report(name_node, key, "a key must be a plain name")
                continue
            name = name_node.value
            if not self._has_core_tag(name_node, (*key, name)):
                continue
            line = name_node.start_mark.line + 1
            if name in first_line:
                what = f"the key stands twice (first on line {first_line[name]}); keep one of them"
                self._report(name_node, (*key, name), what)
                continue
            first_line[name] = self.lines[(*key, name)] = line
            data[name] = self.read(value_node, (*key, name))
        return merged | data

    def _read_merge(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Any] = {}
        for part in nodes:
            if isinstance(part, yaml.MappingNode):
                result = self.read(part, key) | result
            else:
                self._report(node, key, "`<<` takes a mapping or a list of mappings")
        return result

    def _where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _report(self, node: yaml.Node, key: Key, what: str) -> None:
        self.problems.append(Problem(self._where(node), ".".join(map(str, key)), what))
