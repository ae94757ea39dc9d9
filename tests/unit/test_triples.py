"""Triples within texts: every form that is documented, what is malformed, and no text that the parser would die of."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.tasks.triples import TripleFormat, parse_triples

TWO = {("张三", "出生地", "北京"), ("李四", "职业", "演员")}
FORMS = {
    "lines": "张三 | 出生地 | 北京\n李四 | 职业 | 演员",
    "full-width lines": "张三｜出生地｜北京\n\n李四，职业，演员",  # noqa: RUF001 - they are meant
    "numbered lines": "1. 张三\t出生地\t北京\n2、李四 -> 职业 -> 演员",
    "tuples": "(张三, 出生地, 北京)\n(李四, 职业, 演员)",
    "full-width tuples": "三元组：（张三，出生地，北京）；（李四，职业，演员）。",  # noqa: RUF001
    "list of tuples": '[("张三", "出生地", "北京"), ("李四", "职业", "演员")]',
    "quoted": "“张三”，「出生地」，北京\n'李四' | 职业 | \"演员\"",  # noqa: RUF001
    "objects": '[{"head": "张三", "relation": "出生地", "tail": "北京", "x": 1}, '
    '{"subject": "李四", "predicate": "职业", "object": "演员"}]',
    "lists": '[["张三", "出生地", "北京"], ["李四", "职业", "演员"]]',
    "held": '{"triples": [["张三", "出生地", "北京"], ["李四", "职业", "演员"]]}',
    "JSON lines": 'So:\n{"h": "张三", "r": "出生地", "t": "北京"}\n{"头实体": "李四", "关系": "职业", "尾实体": "演员"}',
    "fenced": '```json\n[["张三", "出生地", "北京"], ["李四", "职业", "演员"]]\n```',
    "twice": "李四 | 职业 | 演员\n张三 | 出生地 | 北京\n李四 | 职业 | 演员",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(name: str) -> None:
    found = parse_triples(FORMS[name])
    assert (found.triples, found.malformed) == (TWO, ())


@pytest.mark.parametrize(
    "text", ["", "  \n", "[]", "{}", "()", "None", "no triples.", "无", "无。", "没有关系", '{"triples": []}']
)
def test_texts_that_say_so_have_none(text: str) -> None:
    assert parse_triples(text) == parse_triples("none")
    assert parse_triples(text).malformed == ()


@pytest.mark.parametrize(
    ("text", "good", "malformed"),
    [
        ("I do not know", 0, ["I do not know"]),
        ("a | b | c\nd | e", 1, ["d | e"]),
        ("a | | c", 0, ["a |  | c"]),
        ("Paris, Texas, located in, USA", 0, ["Paris, Texas, located in, USA"]),
        ("(a, b, c), (d, e", 1, ["d, e"]),
        ("(a, b, c", 0, ["a, b, c"]),
        ('[["a", "b", "c"], ["d", "e"]]', 1, ['["d", "e"]']),
        ('[["a", "b", "c"], ["d", "e", null]]', 1, ['["d", "e", null]']),
        ('{"head": "a", "tail": "c"}', 0, ['{"head": "a", "tail": "c"}']),
        ('[{"head": "a", "relation": "b", "tail": "c"}, {"head": "d', 0, None),  # cut off by max_new_tokens
    ],
)
def test_what_is_no_triple_is_told_and_the_rest_is_kept(text: str, good: int, malformed: list[str] | None) -> None:
    found = parse_triples(text)
    assert len(found.triples) == good
    assert list(found.malformed) == ([text] if malformed is None else malformed)


@pytest.mark.parametrize(
    ("text", "triple"),
    [
        ("ＡＢＣ  Corp | founded　by | x", ("ABC Corp", "founded by", "x")),  # noqa: RUF001 - NFKC and blanks
        ("(IBM (a, b), 位于, 美国)", ("IBM (a, b)", "位于", "美国")),
        ("《红楼梦，上》，作者，曹雪芹", ("《红楼梦,上》", "作者", "曹雪芹")),  # noqa: RUF001
        ('"a, b", c, d', ("a, b", "c", "d")),
        ('5" disk | b | c', ('5" disk', "b", "c")),
        ('["a", "height", 1.50]', ("a", "height", "1.50")),
    ],
)
def test_parts_are_compared_after_nfkc_and_keep_what_stands_in_quotes_or_brackets(text: str, triple: tuple[str, ...]) -> None:
    assert parse_triples(text).triples == {triple}


def test_a_form_that_is_named_is_the_only_one_that_is_read() -> None:
    assert parse_triples("(a, b, c)", "json").malformed == ("(a, b, c)",)
    assert parse_triples("a, b, c", "tuples").malformed == ("a, b, c",)
    assert parse_triples("x (a, b, c) | r | t", "lines").triples == {("x (a, b, c)", "r", "t")}


def test_keys_of_objects_can_be_named() -> None:
    text = '[{"von": "a", "was": "b", "zu": "c", "head": "x"}]'
    assert parse_triples(text, keys=("von", "was", "zu")).triples == {("a", "b", "c")}
    assert parse_triples(text).triples == frozenset()


part = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
triples = st.lists(st.tuples(part, part, part), min_size=1, max_size=4)
WRITERS: dict[TripleFormat, Any] = {
    "lines": lambda rows: "\n".join(" | ".join(row) for row in rows),
    "tuples": lambda rows: "; ".join(f"({', '.join(row)})" for row in rows),
    "json": lambda rows: json.dumps([dict(zip(("head", "relation", "tail"), row, strict=True)) for row in rows]),
}


@pytest.mark.parametrize("form", WRITERS)
@given(rows=triples)
def test_what_is_written_is_read_whatever_the_words(form: TripleFormat, rows: list[tuple[str, str, str]]) -> None:
    found = parse_triples(WRITERS[form](rows))
    assert found == parse_triples(WRITERS["lines"](rows), "lines")
    assert found == parse_triples(WRITERS[form](rows[::-1] + rows), form)
    assert 1 <= len(found.triples) <= len(rows)
    assert found.malformed == ()


@given(text=st.text(st.sampled_from('ab ,;|()[]{}"“”（），：\n\t-1.'), max_size=60))  # noqa: RUF001
def test_no_text_stops_the_parser(text: str) -> None:
    for form in ("auto", "json", "tuples", "lines"):
        found = parse_triples(text, form)  # type: ignore[arg-type]
        assert all(all(parts) for parts in found.triples)


def test_half_a_character_in_an_escape_can_be_written_down() -> None:
    found = parse_triples(r'[["\ud83d", "b", "c"], ["\ud83d"]]')
    assert found.triples == {("?", "b", "c")}
    assert found.malformed == ('["?"]',)


@pytest.mark.parametrize("bracket", ["(", "[", "{", '[{"a":', "“"])
def test_a_text_of_open_brackets_is_malformed(bracket: str) -> None:
    assert parse_triples(bracket * 20_000).triples == frozenset()
