"""Recipes are read by YAML 1.2's rules, and whatever else a file may hold is refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.errors import RecipeError
from peftkit.recipe import load_recipe
from peftkit.recipe.yaml_file import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def value_of(text: str) -> Any:
    """What `key: TEXT` gives."""
    return parse_yaml(f"key: {text}".encode(), "r.yaml")[0]["key"]


def refusal(content: bytes | str) -> str:
    """The message for a file with this content."""
    with pytest.raises(RecipeError) as caught:
        parse_yaml(content if isinstance(content, bytes) else content.encode(), "r.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-.5e-3", -0.0005), ("+1.5", 1.5),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("off", "off"), ("y", "y"), ("NO", "NO"),
        ("true", True), ("False", False), ("TRUE", True),
        ("0010", 10), ("-7", -7), ("+12", 12), ("0o17", 15), ("0x1F", 31), ("12:30", "12:30"), ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"), ("2024-01-01 12:30:00", "2024-01-01 12:30:00"),
        ("~", None), ("null", None), ("", None), ("Null", None), ("none", "none"),
        ("'1e-4'", "1e-4"), ('"no"', "no"), ("'true'", "true"), ("'null'", "null"), ("''", ""),
        ("!!str 12", "12"), ("!!str 1e-4", "1e-4"), ("!!int '12'", 12), ("!!float 1", 1.0), ("!!null ''", None),
        (".inf", float("inf")), ("-.Inf", float("-inf")), ("+.INF", float("inf")), ("=", "="), ("1e-4x", "1e-4x"),
        ("|\n  1e-4\n", "1e-4\n"), (">-\n  no\n", "no"), ("[1, 1e-4, no]", [1, 1e-4, "no"]), ("{a: 0010}", {"a": 10}),
        ("9" * 5000, float("inf")), ("0x" + "f" * 5000, "0x" + "f" * 5000),
    ],
)  # fmt: skip
def test_a_scalar_is_read_by_the_core_schema_of_yaml_1_2(text: str, value: Any) -> None:
    read = value_of(text)
    assert (read, type(read)) == (value, type(value))


def test_nan_is_read_as_nan() -> None:
    assert all(value_of(text) != value_of(text) for text in (".nan", ".NaN", ".NAN"))


def test_safe_loader_of_pyyaml_stays_as_it_is() -> None:
    assert yaml.safe_load("[1e-4, no, 0010, 12:30, 1_000]") == ["1e-4", False, 8, 750, 1000]


def test_every_key_knows_its_line() -> None:
    _, lines = parse_yaml(b"# comment\nmodel:\n  name: x\n  list: [a,\n    b]\ntask: y\n", "r.yaml")
    found = {".".join(map(str, key)): line for key, line in lines.items() if key}
    assert found == {"model": 2, "model.name": 3, "model.list": 4, "model.list.0": 4, "model.list.1": 5, "task": 6}


def test_aliases_and_merges_work_and_own_keys_win_wherever_they_stand() -> None:
    data, lines = parse_yaml(b"base: &b {r: 8, s: 1}\nlora:\n  r: 4\n  <<: *b\ncopy: *b\nmany:\n  <<: [*b, {t: 2}]\n", "r.yaml")
    assert data == {
        "base": {"r": 8, "s": 1},
        "lora": {"r": 4, "s": 1},
        "copy": {"r": 8, "s": 1},
        "many": {"r": 8, "s": 1, "t": 2},
    }
    assert (lines["lora", "r"], lines["lora", "s"]) == (3, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a: the key stands twice (first on line 1); keep one of them"),
        ("a: {b: 1,\n  b: 2}\n", "r.yaml:2: a.b: the key stands twice (first on line 1); keep one of them"),
        (BOMB, "r.yaml:1: expands to over 20,000 values or 50 levels (an alias bomb?)"),
        ("a: &a [*a]\n", "r.yaml:1: expands to over 20,000 values or 50 levels"),
        ("a: &a\n  b: *a\n", "r.yaml:1: expands to over 20,000 values or 50 levels"),
        ("a: &a\n  <<: *a\n", "r.yaml:1: expands to over 20,000 values or 50 levels"),
        ("a: &a\n  <<: [*a, *a]\n", "r.yaml:1: expands to over 20,000 values or 50 levels"),
        ("a: *b\n", "r.yaml:1: not valid YAML: found undefined alias 'b'"),
        ("a:\n  <<: 3\n", "r.yaml:2: a: `<<` takes a mapping or a list of mappings"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "r.yaml:2: b: the tag !!python/object/apply:os.system is not"),
        ("a: 1\n!!python/name:os.system b: 1\n", "r.yaml:2: b: the tag !!python/name:os.system is not allowed"),
        ("a: !env HOME\n", "r.yaml:1: a: the tag !env is not allowed"),
        ("a: [1, !mine {b: 2}]\n", "r.yaml:1: a.1: the tag !mine is not allowed"),
        ("a: !!binary aGk=\n", "r.yaml:1: a: the tag !!binary is not allowed"),
        ("a: !!set {b}\n", "r.yaml:1: a: the tag !!set is not allowed"),
        ("a: !!int x\n", "r.yaml:1: a: `x` is no int"),
        ("a: !!bool no\n", "r.yaml:1: a: `no` is no bool"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML: a recipe is one document; a second one starts here"),
        ("", "r.yaml: the recipe is empty; `peftkit init` writes one"),
        ("# only a comment\n", "r.yaml: the recipe is empty; `peftkit init` writes one"),
        ("- a\n- b\n", "r.yaml:1: a recipe is a mapping of sections"),
        ("just text\n", "r.yaml:1: a recipe is a mapping of sections"),
        ("? [a, b]\n: 1\n", "r.yaml:1: a key must be a plain name"),
        ("a: b: c\n", "r.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "r.yaml:2: not valid YAML: found character '\\t'"),
        ("a: 'open\n", "not valid YAML: found unexpected end of stream"),
        ("a: 1\nb: \x07\n", "r.yaml:2: not valid YAML: unacceptable character #x0007"),
        ("[" * 1200, "r.yaml: nested too deeply to be a recipe"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "r.yaml:1: expands to over 20,000 values or 50 levels"),
        ("a: 1\n".encode("utf-16"), "r.yaml: is UTF-16; save it as UTF-8"),
        ("a: 1\n".encode("utf-16-be"), "r.yaml: has NUL bytes: a binary file, not a recipe"),
        ("a: 1\nb: é\n".encode("latin-1"), "r.yaml:2: byte 8 (0xe9) is not UTF-8; save the file as UTF-8 text"),
        (b"a: 1\nb: \0\n", "r.yaml: has NUL bytes: a binary file, not a recipe"),
        (b"#" * (MAX_BYTES + 1), f"r.yaml: is too large to be a recipe; at most {MAX_BYTES:,} bytes are read"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_with_its_place(content: bytes | str, message: str) -> None:
    assert message in refusal(content)


def test_all_problems_of_a_file_are_reported_at_once() -> None:
    text = refusal("a: 1\na: 2\nb: !x 1\nc: {d: 1, d: 2}\n")
    assert [line.split(" ")[0] for line in text.splitlines()] == ["r.yaml:2:", "r.yaml:3:", "r.yaml:4:"]


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes("\ufeffa: 1\n".encode())
    assert read_yaml(path)[0] == {"a": 1}


@pytest.mark.parametrize(
    ("name", "words"), [("", "is a folder, not a recipe file"), ("no.yaml", "cannot be read: No such file")]
)
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(tmp_path / name)
    assert (caught.value.exit_code, caught.value.problems[0].where) == (2, str(tmp_path / name))
