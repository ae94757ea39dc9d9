"""Small data files with one thing wrong each, and what the message about it must say: those that cannot be read.

Every one of them ends `peftkit data` and `train` with exit code 3. `bad_rows` goes on with files that are read well.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.conftest import ROWS


@dataclass(frozen=True)
class BadFile:
    """One bad file.

    Attributes:
        name: what is wrong.
        task: the task that it is for.
        file: its name.
        content: its bytes, or what makes them.
        words: what the message must contain.
        by_reader: whether reading it is enough to find out.
        split: the split that it stands for; for `validation`, train holds `good_rows(task)`.
        source: further keys of its source.
        data: further keys of the section `data`.
    """

    name: str
    task: str
    file: str
    content: bytes | Callable[[], bytes]
    words: tuple[str, ...]
    by_reader: bool = False
    split: str = "train"
    source: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def bytes(self) -> bytes:
        """What the file holds."""
        return self.content if isinstance(self.content, bytes) else self.content()


def good_rows(task: str, num_rows: int = 3) -> list[dict[str, Any]]:
    """Sound rows of a task, no two of them alike where they have a text of their own; two classes in turn."""
    row, texts = ROWS[task], ("instruction", "source", "text", "anchor")
    rows = [row | {name: f"{row[name]} {number}" for name in texts if name in row} for number in range(num_rows)]
    return [row | {"label": ("greeting", "thanks")[place % 2]} if "label" in row else row for place, row in enumerate(rows)]


def lines(*rows: Any) -> bytes:
    """JSON lines; a text stands for itself."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def among(task: str, row: Any, place: int = 2) -> bytes:
    """JSON lines of three sound rows and the bad one as the row `place`."""
    rows: list[Any] = [*good_rows(task)]
    rows.insert(place - 1, row)
    return lines(*rows)


def one_in_ten_thousand() -> bytes:
    """One row of 10,000 without its closing brace."""
    rows: list[Any] = [*good_rows("CAUSAL_LM", 10_000)]
    rows[7776] = json.dumps(rows[7776])[:-1]
    return lines(*rows)


def huge_line() -> bytes:
    """A row of 1 MB, far longer than any max_length."""
    return among("CAUSAL_LM", {"instruction": "hello", "output": "the cat sat on a mat " * 50_000})


def zipped(*names: str) -> bytes:
    """A .zip file with these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, lines(ROWS["CAUSAL_LM"]))
    return buffer.getvalue()


def parquet(**columns: list[Any]) -> bytes:
    """A Parquet file of these columns."""
    import pyarrow
    from pyarrow import parquet as files

    buffer = io.BytesIO()
    files.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def squad(*questions: Any, context: Any = "tom sat") -> bytes:
    """Nested SQuAD JSON with one article of one paragraph."""
    return json.dumps(
        {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [*questions]}]}]}
    ).encode()


LM, SEQ2SEQ, CLS, TAGS, QA, VECTORS = ROWS
GOOD = lines(*good_rows(LM))
TEXT = "instruction,output\n"
QUESTION = {"id": "1", "question": "who?", "answers": [{"text": "tom", "answer_start": 0}]}


def _read(name: str, task: str, file: str, content: bytes | Callable[[], bytes], *words: str, **more: Any) -> BadFile:
    return BadFile(name, task, file, content, (file, *words), by_reader=True, **more)


FILES = [
    _read("empty", LM, "empty.jsonl", b"", "has no rows"),
    _read("blank lines alone", LM, "blank.jsonl", b"\n  \n\n", "has no rows"),
    _read("empty JSON", LM, "empty.json", b"", "is empty"),
    _read("empty list", LM, "none.json", b"[]", "has no rows"),
    _read("empty CSV", LM, "empty.csv", b"", "has no rows"),
    _read("header alone", LM, "header.csv", TEXT.encode(), "has no rows"),
    _read("empty text", LM, "empty.txt", b"\n", "has no rows"),
    _read("truncated row", LM, "cut.jsonl", GOOD[:-9], "cut.jsonl:3", "not valid JSON"),
    _read("truncated list", LM, "cut.json", json.dumps(good_rows(LM)).encode()[:-9], "cut.json:3", "not valid JSON"),
    _read(
        "list that ends after a row", LM, "open.json", b'[{"text": "a"},\n{"text": "b"}', "open.json:2", "line 2", "ends here"
    ),
    _read("rows without a comma", LM, "comma.json", b'[{"text": "a"}\n{"text": "b"}]', "comma.json:1", "`,` or `]`"),
    _read("more after the list", LM, "more.json", b'[{"text": "a"}]\nx', "more.json", "more follows"),
    _read("comma at the end of a list", LM, "last.json", b'[{"text": "a"},]', "last.json:2", "not valid JSON"),
    _read(
        "single quotes", LM, "quotes.jsonl", among(LM, "{'instruction': 'a', 'output': 'b'}"), "quotes.jsonl:2", "double quotes"
    ),
    _read("single quotes in a list", LM, "quotes.json", b"[{'text': 'a'}]", "quotes.json:1", "double quotes"),
    _read("comment", LM, "comment.jsonl", among(LM, "// rows follow"), "comment.jsonl:2", "not valid JSON"),
    _read("two rows in a line", LM, "two.jsonl", among(LM, '{"text": "a"} {"text": "b"}'), "two.jsonl:2", "more follows"),
    _read(
        "a list in lines", LM, "list.jsonl", json.dumps(good_rows(LM), indent=1).encode(), "list.jsonl", "call the file .json"
    ),
    _read(
        "one row over several lines",
        LM,
        "tall.jsonl",
        json.dumps(ROWS[LM], indent=1).encode(),
        "tall.jsonl:1",
        "call the file .json",
    ),
    _read("a number", LM, "number.json", b"3", "a number, not a list of rows"),
    _read("a text", LM, "text.json", b'"rows"', "text, not a list of rows"),
    _read("no JSON", LM, "page.json", b"<html></html>", "not valid JSON"),
    _read("a mapping without rows", LM, "config.json", b'{"a": 1,\n"b": [2]}', "a mapping without a list of rows"),
    _read("two lists of rows", LM, "both.json", b'{"train": [{"text": "a"}],\n"test": [{"text": "b"}]}', "`train`, `test`"),
    _read("a number among rows", LM, "mixed.jsonl", among(LM, "3"), "mixed.jsonl:2", "a number, not a mapping"),
    _read("a list among rows", LM, "mixed.json", b'[{"text": "a"}, ["b"]]', "mixed.json:2", "a list, not a mapping"),
    _read("null among rows", LM, "null.jsonl", among(LM, "null"), "null.jsonl:2", "null, not a mapping"),
    _read("one bad row in 10,000", LM, "many.jsonl", one_in_ten_thousand, "many.jsonl:7777", "not valid JSON"),
    _read(
        "key twice",
        CLS,
        "twice.jsonl",
        among(CLS, '{"text": "a", "label": "x", "label": "y"}'),
        "twice.jsonl:2",
        "`label` stands twice",
    ),
    _read("key twice in a list", CLS, "twice.json", b'[{"text": "a", "text": "b"}]', "twice.json:1", "`text` stands twice"),
    _read(
        "integer beyond 64 bits",
        CLS,
        "int.jsonl",
        among(CLS, {"text": "a", "label": 2**70}),
        "int.jsonl:2",
        "`label`",
        "64 bits",
    ),
    _read(
        "integer of 5000 digits",
        CLS,
        "digits.jsonl",
        among(CLS, '{"text": "a", "label": ' + "9" * 5000 + "}"),
        "digits.jsonl:2",
    ),
    _read(
        "half of a surrogate pair", LM, "half.jsonl", among(LM, r'{"text": "a \ud83d"}'), "half.jsonl:2", "`text`", "surrogate"
    ),
    _read("nested too deeply", LM, "deep.jsonl", among(LM, '{"text": ' + "[" * 100_000), "deep.jsonl:2", "nested too deeply"),
    _read("list nested too deeply", LM, "deep.json", b"[" * 100_000, "deep.json", "nested too deeply"),
    _read("UTF-16", LM, "wide.jsonl", GOOD.decode().encode("utf-16"), "is UTF-16; save it as UTF-8"),
    _read("UTF-16 without a mark", LM, "bare.jsonl", GOOD.decode().encode("utf-16-le"), "NUL bytes", "UTF-16"),
    _read("UTF-16 table", LM, "wide.csv", "text\nhello\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    _read(
        "Latin-1 in one row",
        LM,
        "latin.jsonl",
        GOOD + '{"text": "café"}\n'.encode("latin-1"),
        "latin.jsonl:4",
        "byte 0xe9",
        "UTF-8",
    ),
    _read(
        "Latin-1 in a table",
        CLS,
        "latin.csv",
        "text,label\na,x\ncafé,y\n".encode("latin-1"),
        "latin.csv:3",
        "`text`",
        "byte 0xe9",
    ),
    _read("Latin-1 in a list", LM, "latin.json", '[{"text": "café"}]'.encode("latin-1"), "latin.json:1", "byte 0xe9"),
    _read("Latin-1 in text", LM, "latin.txt", "a\ncafé\n".encode("latin-1"), "latin.txt:2", "byte 0xe9"),
    _read("NUL bytes in a row", LM, "nul.jsonl", GOOD + b'{"text": "a\0b"}\n', "nul.jsonl:4", "NUL bytes"),
    _read("NUL bytes in a table", CLS, "nul.csv", b"text,label\na,x\nb\0,y\n", "nul.csv:3", "NUL bytes"),
    _read("NUL bytes in a list", LM, "nul.json", b'[{"text": "a"},\n{"text": "b\0"}]', "nul.json:2", "NUL bytes"),
    _read("binary file", LM, "photo.jsonl", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xd8\xfe" * 9, "NUL bytes", "binary"),
    _read("gzip without its suffix", LM, "zipped.jsonl", gzip.compress(GOOD), "its name must end in .gz"),
    _read("Parquet under another name", LM, "table.csv", partial(parquet, text=["a"]), "its name must end in .parquet"),
    _read("no gzip", LM, "rows.jsonl.gz", GOOD, "cannot be read"),
    _read("gzip cut short", LM, "cut.jsonl.gz", gzip.compress(GOOD)[:-12], "damaged or cut short"),
    _read("bz2 cut short", LM, "cut.jsonl.bz2", bz2.compress(GOOD)[:-12], "damaged or cut short"),
    _read("no zstd", LM, "rows.jsonl.zst", GOOD, "cannot be read"),
    _read("no zip", LM, "rows.jsonl.zip", GOOD, "damaged or cut short"),
    _read("zip of two files", LM, "both.jsonl.zip", partial(zipped, "a.jsonl", "b.jsonl"), "holds 2 files (a.jsonl, b.jsonl)"),
    _read("no Parquet", LM, "rows.parquet", GOOD, "not a Parquet file"),
    _read("Parquet cut short", LM, "cut.parquet", lambda: parquet(text=["a", "b"])[:-40], "not a Parquet file"),
    _read("Parquet without rows", LM, "none.parquet", partial(parquet, text=[]), "has no rows"),
    _read("no Arrow", LM, "rows.arrow", GOOD, "not an Arrow file"),
    _read("row with a column more", CLS, "ragged.csv", b"text,label\na,x\nb,y,z\n", "ragged.csv:3", "3 columns, the header 2"),
    _read("row with a column less", CLS, "short.csv", b"text,label\na,x\nb\n", "short.csv:3", "1 columns, the header 2"),
    _read("quote never closed", CLS, "open.csv", b'text,label\na,x\n"b,y\nc,z\n', "open.csv:3", "never closed"),
    _read("text after a quote", CLS, "quote.csv", b'text,label\n"a"b,x\n', "quote.csv:2", "not valid CSV"),
    _read("semicolons in a table", CLS, "semi.csv", b"text;label\na;x\n", "semi.csv:1", "has ';' between its names"),
    _read("column named twice", CLS, "names.csv", b"text,text\na,x\n", "names.csv:1", "`text` twice"),
    _read("tabs missing", CLS, "rows.tsv", b"text\tlabel\na x\n", "rows.tsv:2", "1 columns, the header 2"),
    _read(
        "word without a tag", TAGS, "rows.conll", b"tom B-PER\nsat O\n\nthe O\ncat\n", "rows.conll:4", "line 5 has 1 columns"
    ),
    _read("CoNLL-U of two columns", TAGS, "rows.conllu", b"1\ttom\n", "rows.conllu:1", "line 1 has 2 columns, not 10"),
    _read("Latin-1 among words", TAGS, "latin.bio", "café O\n".encode("latin-1"), "latin.bio:1", "line 1", "byte 0xe9"),
    _read(
        "paragraph without questions",
        QA,
        "nested.json",
        b'{"data": [{"title": "t", "paragraphs": [{"context": "c"}]}]}',
        "nested.json:1",
        "`qas`",
    ),
    _read("question that is a text", QA, "text.json", squad("who?"), "text.json:1", "text"),
    _read(
        "column that is not there",
        LM,
        "rows.jsonl",
        lines({"q": "a"}, {"w": "b"}),
        "rows.jsonl:2",
        "`q`",
        source={"columns": {"text": "q"}},
    ),
    _read(
        "template without its column",
        LM,
        "rows.jsonl",
        lines({"q": "a"}, {"w": "b"}),
        "rows.jsonl:2",
        "'q'",
        source={"template": "{{ q }}"},
    ),
    _read(
        "template over null",
        LM,
        "rows.jsonl",
        lines({"q": "a"}, {"q": None}),
        "rows.jsonl:2",
        "null",
        source={"template": "{{ q }}"},
    ),
    _read(
        "template out of its sandbox",
        LM,
        "rows.jsonl",
        lines({"q": "a"}),
        "rows.jsonl:1",
        "template `text`",
        "unsafe",
        source={"template": "{{ q.__class__ }}"},
    ),
]
