"""Files of every kind to rows; what is wrong with one is an error that names file and row."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from peftkit.engine.sources import read_rows, sound_rows
from peftkit.errors import DataError
from peftkit.formats.base import RowError
from peftkit.reading.files import BATCH_ROWS, DataFile, read_file
from peftkit.recipe.paths import FILE_SUFFIXES
from peftkit.recipe.schema import SourceSection
from peftkit.tasks import TASKS
from tests.unit.bad_files import FILES, BadFile, parquet, squad
from tests.unit.bad_rows import BAD_FILES

ROWS = [{"text": "a", "label": "x"}, {"text": "b ü", "label": "y"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TABLE = "text,label\na,x\nb ü,y\n".encode()
CONLL = "-DOCSTART- -X- O\n\n# sent_id 1\nTom NNP B-PER\nsat VBD O\n\n\n#tag NN O\n"
CONLLU = "# text = du chat\n1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_\n1\tde\tde\tADP\t_\t_\t_\t_\t_\t_\n3.1\tx\t_\t_\t_\t_\t_\t_\t_\t_\n"


def read(folder: Path, name: str, content: bytes, **source: Any) -> list[tuple[str, Any]]:
    """The rows of a file with this content; origins without the folder."""
    (folder / name).write_bytes(content)
    rows = read_rows(SourceSection(path=name, **source), folder)
    return [(origin.removeprefix(f"{folder}/"), row) for origin, row in rows]


def arrow(rows: list[dict[str, Any]], *, stream: bool) -> bytes:
    """An Arrow IPC file or stream."""
    buffer, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    """A .zip file of one member in a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("rows")
        archive.writestr(f"rows/{name}", content)
    return buffer.getvalue()


def compress_zstd(content: bytes) -> bytes:
    """Two zstd frames, as parallel compressors write them."""
    half = len(content) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))


SOUND = {
    "jsonl": ("rows.jsonl", LINES, [1, 2]),
    "ndjson": ("rows.ndjson", LINES, [1, 2]),
    "suffix in capitals": ("ROWS.JSONL", LINES, [1, 2]),
    "byte order mark": ("rows.jsonl", b"\xef\xbb\xbf" + LINES, [1, 2]),
    "blank lines": ("rows.jsonl", b"\n" + LINES.replace(b"\n", b"\r\n\r\n"), [2, 4]),
    "no line break at the end": ("rows.jsonl", LINES[:-1], [1, 2]),
    "list": ("rows.json", json.dumps(ROWS, indent=2).encode(), [1, 2]),
    "list with a byte order mark": ("rows.json", b"\xef\xbb\xbf " + json.dumps(ROWS).encode(), [1, 2]),
    "list in an object": ("rows.json", json.dumps({"version": 2, "note": [], "rows": ROWS}, indent=1).encode(), [1, 2]),
    "JSON lines under another name": ("rows.json", LINES, [1, 2]),
    "csv": ("rows.csv", TABLE, [2, 3]),
    "csv with a byte order mark": ("rows.csv", b"\xef\xbb\xbf" + TABLE, [2, 3]),
    "csv of Windows": ("rows.csv", TABLE.replace(b"\n", b"\r\n"), [2, 3]),
    "csv with blank lines": ("rows.csv", TABLE.replace(b"\n", b"\n\n"), [3, 5]),
    "tsv": ("rows.tsv", TABLE.replace(b",", b"\t"), [2, 3]),
    "parquet": ("rows.parquet", parquet(text=["a", "b ü"], label=["x", "y"]), [1, 2]),
    "arrow file": ("rows.arrow", arrow(ROWS, stream=False), [1, 2]),
    "arrow stream": ("rows.arrow", arrow(ROWS, stream=True), [1, 2]),
    "gzip": ("rows.jsonl.gz", gzip.compress(LINES[:25]) + gzip.compress(LINES[25:]), [1, 2]),
    "bz2": ("rows.csv.bz2", bz2.compress(TABLE), [2, 3]),
    "xz": ("rows.json.xz", lzma.compress(json.dumps(ROWS).encode()), [1, 2]),
    "zip": ("rows.jsonl.zip", zipped("rows.jsonl", LINES), [1, 2]),
    "zstd": ("rows.jsonl.zst", compress_zstd(LINES), [1, 2]),
    "parquet in gzip": ("rows.parquet.gz", gzip.compress(parquet(text=["a", "b ü"], label=["x", "y"])), [1, 2]),
    "arrow in zstd": ("rows.arrow.zst", compress_zstd(arrow(ROWS, stream=False)), [1, 2]),
}


@pytest.mark.parametrize("case", SOUND)
def test_a_file_of_every_kind_gives_its_rows_with_their_numbers(tmp_path: Path, case: str) -> None:
    name, content, numbers = SOUND[case]
    assert read(tmp_path, name, content) == [(f"{name}:{number}", row) for number, row in zip(numbers, ROWS, strict=True)]


@pytest.mark.parametrize("suffix", FILE_SUFFIXES)
def test_every_suffix_has_a_reader(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=r"has no rows|is empty|not a Parquet file|not an Arrow file"):
        read(tmp_path, f"rows{suffix}", b"")


def test_a_row_of_csv_is_named_by_its_first_line(tmp_path: Path) -> None:
    found = read(tmp_path, "rows.csv", b'text,label\n"a\nb",x\n"c, ""d""",y\n')
    assert found == [
        ("rows.csv:2", {"text": "a\nb", "label": "x"}),
        ("rows.csv:4", {"text": 'c, "d"', "label": "y"}),
    ]


def test_a_text_file_is_one_row_per_line_that_is_not_blank(tmp_path: Path) -> None:
    found = read(tmp_path, "rows.txt", b" one\n\n \ntwo\r\n")
    assert found == [("rows.txt:1", {"text": " one"}), ("rows.txt:4", {"text": "two"})]


@pytest.mark.parametrize("suffix", [".conll", ".bio", ".iob", ".iob2"])
def test_conll_gives_words_and_last_columns_of_sentences(tmp_path: Path, suffix: str) -> None:
    found = read(tmp_path, f"rows{suffix}", CONLL.encode())
    assert found == [
        (f"rows{suffix}:4", {"tokens": ["Tom", "sat"], "tags": ["B-PER", "O"]}),
        (f"rows{suffix}:8", {"tokens": ["#tag"], "tags": ["O"]}),
    ]


def test_conllu_gives_forms_and_universal_tags_of_words_alone(tmp_path: Path) -> None:
    content = CONLLU + "2\tchat\tchat\tNOUN\t_\t_\t_\t_\t_\t_\n"
    assert read(tmp_path, "rows.conllu", content.encode()) == [
        ("rows.conllu:2", {"tokens": ["de", "chat"], "tags": ["ADP", "NOUN"]})
    ]


def test_conll_without_tags_gives_words_alone(tmp_path: Path) -> None:
    assert read(tmp_path, "rows.conll", b"Tom\nsat\n") == [("rows.conll:1", {"tokens": ["Tom", "sat"]})]


def test_a_document_with_messages_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "b"}]}
    assert read(tmp_path, "rows.json", json.dumps(row, indent=1).encode()) == [("rows.json:1", row)]


def test_nested_squad_becomes_a_row_per_question(tmp_path: Path) -> None:
    first = {"id": "1", "question": "who?", "answers": [{"text": "tom", "answer_start": 0}]}
    second = {"id": "2", "question": "why?", "answers": [], "is_impossible": True, "plausible_answers": []}
    shared = {"title": "t", "context": "tom sat"}
    assert read(tmp_path, "dev.json", squad(first, second)) == [
        ("dev.json:1", shared | first),
        ("dev.json:2", shared | {name: second[name] for name in ("id", "question", "answers", "is_impossible")}),
    ]


def test_nan_and_infinity_are_read_for_the_format_to_judge(tmp_path: Path) -> None:
    ((_, row),) = read(tmp_path, "rows.jsonl", b'{"score": NaN, "other": -Infinity}')
    assert [str(value) for value in row.values()] == ["nan", "-inf"]


def test_what_one_row_has_wrong_leaves_the_others_readable(tmp_path: Path) -> None:
    content = b'{"text": 1}\n{"text": }\n{"text": "\xff"}\n[]\n{"a": 1, "a": 2}\n{"text": 2}\n'
    rows = [row for _, row in read(tmp_path, "rows.jsonl", content)]
    assert [isinstance(row, RowError) for row in rows] == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", b'[{"a": 1}, {"a": 1, "a": 2}, {"a": 3}]'),
        ("rows.csv", b'a,b\n1,1\n"2"2,2\n3,3\n'),
        ("rows.tsv", b"a\tb\n1\t1\n2\n3\t3\n"),
        ("rows.conll", b"a O\n\nb O\nc\n\nd O\n"),
        ("rows.txt", b"a\n\xff\nb\n"),
    ],
)
def test_rows_after_a_bad_one_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    rows = [row for _, row in read(tmp_path, name, content)]
    assert [isinstance(row, RowError) for row in rows] == [False, True, False]


def test_rows_of_a_column_file_come_in_order_over_its_batches(tmp_path: Path) -> None:
    rows = [{"n": number} for number in range(2 * BATCH_ROWS + 1)]
    found = read(tmp_path, "rows.arrow", arrow(rows, stream=False))
    assert [row for _, row in found] == rows
    assert found[-1][0] == f"rows.arrow:{len(rows)}"


def test_a_line_of_five_megabytes_is_a_row(tmp_path: Path) -> None:
    text = "a" * 5_000_000
    assert read(tmp_path, "rows.jsonl", json.dumps({"text": text}).encode()) == [("rows.jsonl:1", {"text": text})]
    assert read(tmp_path, "rows.csv", f"text\n{text}\n".encode()) == [("rows.csv:2", {"text": text})]


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b'[{"text": "a"}, {"text": "b"}, oops')
    rows = read_rows(SourceSection(path="rows.json"), tmp_path)
    assert [next(rows)[1], next(rows)[1]] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"rows\.json:3: not valid JSON in line 1, column 32"):
        next(rows)


def test_a_file_that_may_not_be_opened_is_named() -> None:
    def refuse() -> Any:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(DataError, match=r"^data/rows\.csv cannot be read: Permission denied$"):
        list(read_file(DataFile("data/rows.csv", "rows.csv", refuse)))


def test_a_file_of_another_kind_is_refused_with_what_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.xlsx: files that can be read end in \.jsonl, "):
        read(tmp_path, "rows.xlsx", b"")


def test_offsets_that_lead_out_of_an_arrow_file_are_found(tmp_path: Path) -> None:
    sound, damaged = (b"".join(place.to_bytes(4, "little") for place in places) for places in ((0, 1, 5), (0, 9, 5)))
    content = arrow(ROWS, stream=False)
    assert sound in content
    with pytest.raises(DataError, match=r"rows\.arrow: not an Arrow file: .*offset"):
        read(tmp_path, "rows.arrow", content.replace(sound, damaged))


def test_a_zip_file_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    content = bytearray(zipped("rows.jsonl", LINES))
    content[content.rindex(b"PK\x01\x02") + 6] = 200
    with pytest.raises(DataError, match=r"rows\.jsonl\.zip cannot be unpacked: zip file version 20"):
        read(tmp_path, "rows.jsonl.zip", bytes(content))


def test_an_encrypted_zip_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(zipped("rows.jsonl", LINES))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.rindex(mark) + place] |= 1
    with pytest.raises(DataError, match="is encrypted, password required"):
        read(tmp_path, "rows.jsonl.zip", bytes(content))


@pytest.mark.parametrize("bad", FILES, ids=[bad.name for bad in FILES])
def test_a_bad_file_is_refused_with_its_name_and_row(tmp_path: Path, bad: BadFile) -> None:
    (tmp_path / bad.file).write_bytes(bad.bytes())
    with pytest.raises(DataError) as caught:
        sound_rows(read_rows(SourceSection(path=bad.file, **bad.source), tmp_path))
    assert [word for word in bad.words if word not in str(caught.value)] == []


@pytest.mark.parametrize("bad", [bad for bad in BAD_FILES if not bad.by_reader], ids=lambda bad: f"{bad.task} {bad.name}")
def test_a_file_with_a_bad_row_is_read_whole(tmp_path: Path, bad: BadFile) -> None:
    (tmp_path / bad.file).write_bytes(bad.bytes())
    origins = [origin for origin, _ in sound_rows(read_rows(SourceSection(path=bad.file, **bad.source), tmp_path))]
    assert any(origin.endswith(bad.words[0]) or bad.words[0] == bad.file for origin in origins)


def test_the_corpus_covers_every_task_and_says_each_thing_once() -> None:
    assert len({(bad.task, bad.name) for bad in BAD_FILES}) == len(BAD_FILES) >= 60
    assert {bad.task for bad in BAD_FILES if not bad.by_reader} == {*TASKS}
