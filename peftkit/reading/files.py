"""One data file to raw rows, lazily; what is wrong with one row is an item, what ends the file an exception."""

from __future__ import annotations

import contextlib
import csv
import io
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from peftkit.errors import DataError
from peftkit.formats.base import RowError
from peftkit.reading.json_rows import RowOrError, read_document, read_lines, text_fault
from peftkit.recipe.paths import CONLL_SUFFIXES, FILE_SUFFIXES, compression_of, data_suffix

Numbered = tuple[str, RowOrError]

BATCH_ROWS = 1000  # rows of a column file that are Python objects at one time
_MAX_FIELD = 2**28  # characters of a CSV field; Python's own limit is 128 KiB
_HEAD = 4096
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"PK\x03\x04": ".zip", b"\x28\xb5\x2f\xfd": ".zst"}
_COLUMN_FILES = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True)
class DataFile:
    """A file of rows, wherever it lies.

    Attributes:
        shown: how messages name it.
        name: its name, whose suffixes say how to read it.
        open: opens its bytes, as they are.
    """

    shown: str
    name: str
    open: Callable[[], IO[bytes]]


def local_file(path: Path) -> DataFile:
    """A file on this machine."""
    return DataFile(str(path), path.name, lambda: path.open("rb"))


def read_file(file: DataFile) -> Iterator[Numbered]:
    """The rows of a file, each with `file:row`.

    Raises:
        DataError: the file cannot be read, or no further.
    """
    reader = _READERS.get(data_suffix(file.name))
    if reader is None:
        raise DataError(f"{file.shown}: files that can be read end in {', '.join(FILE_SUFFIXES)}")
    try:
        yield from reader(file)
    except OSError as error:
        raise DataError(f"{file.shown} cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise DataError(f"{file.shown} is damaged or cut short: {error}") from error


@contextlib.contextmanager
def _opened(file: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed."""
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(file.open())
        kind = compression_of(file.name)
        yield stack.enter_context(_decompressed(raw, kind, file.shown)) if kind else raw


def _decompressed(raw: IO[bytes], kind: str, shown: str) -> Any:
    if kind == "zstd":
        # fsspec reads a cut file as if it were whole (2026.9); Arrow says so.
        from pyarrow import CompressedInputStream, PythonFile

        return io.BufferedReader(CompressedInputStream(PythonFile(raw, mode="r"), "zstd"))
    from fsspec.compression import compr

    return _member(raw, shown) if kind == "zip" else compr[kind](raw, mode="rb")


@contextlib.contextmanager
def _member(raw: IO[bytes], shown: str) -> Iterator[IO[bytes]]:
    """The one file in a .zip file."""
    with _seekable(raw) as stream, _open_member(stream, shown) as member:
        yield member


def _open_member(stream: IO[bytes], shown: str) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(stream)
        members = [item.filename for item in archive.infolist() if not item.is_dir()]
        if len(members) == 1:
            return archive.open(members[0])
    except (RuntimeError, NotImplementedError, ValueError) as error:  # a password, an unknown compression, odd names
        raise DataError(f"{shown} cannot be unpacked: {error}") from error
    raise DataError(f"{shown}: holds {len(members)} files ({', '.join(members[:3])}); a .zip file of rows holds one")


@contextlib.contextmanager
def _seekable(stream: IO[bytes], *, is_compressed: bool = False) -> Iterator[IO[bytes]]:
    """The stream, or a copy on disk where it can be read only from front to back."""
    if not is_compressed and _can_seek(stream):
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield copy


def _can_seek(stream: IO[bytes]) -> bool:
    try:
        stream.seek(0, io.SEEK_END)
        stream.seek(0)
    except (OSError, ValueError, NotImplementedError):
        return False
    return True


@contextlib.contextmanager
def _random_access(file: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of a file, for readers that jump about in it."""
    with _opened(file) as stream, _seekable(stream, is_compressed=compression_of(file.name) is not None) as whole:
        yield whole


@contextlib.contextmanager
def _text(file: DataFile, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """The text of a file; bytes that are not UTF-8 stand in it as lone surrogates, for `text_fault` to find."""
    with _opened(file) as stream:
        buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore[type-var]
        if fault := _head_fault(buffered.peek(_HEAD)[:_HEAD]):
            raise DataError(f"{file.shown}: {fault}")
        yield io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _head_fault(head: bytes) -> str | None:
    """Why a file is no text, by its first bytes; None where it may be."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16; save it as UTF-8"
    for magic, suffix in _MAGIC.items():
        if head.startswith(magic):
            return f"is compressed; its name must end in {suffix}"
    for magic, suffix in _COLUMN_FILES.items():
        if head.startswith(magic):
            return f"is no text; its name must end in {suffix}"
    if head.count(0) > len(head) // 4:
        return "has NUL bytes: UTF-16 without a mark, or a binary file; save it as UTF-8 text"
    if b"\0" in head and any("\udc80" <= sign <= "\udcff" for sign in head[:-3].decode("utf-8", "surrogateescape")):
        return "has NUL bytes and is not UTF-8: a binary file, not text"
    return None


def _read_jsonl(file: DataFile) -> Iterator[Numbered]:
    with _text(file) as lines:
        yield from read_lines(lines, file.shown)


def _read_json(file: DataFile) -> Iterator[Numbered]:
    with _text(file) as stream:
        text = stream.read()
    yield from read_document(text, file.shown)


def _read_txt(file: DataFile) -> Iterator[Numbered]:
    with _text(file) as lines:
        for number, line in enumerate(lines, 1):
            if fault := text_fault(line):
                yield f"{file.shown}:{number}", RowError(fault)
            elif line.strip():
                yield f"{file.shown}:{number}", {"text": line.rstrip("\n")}


def _read_csv(file: DataFile) -> Iterator[Numbered]:
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    with _text(file, newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if data_suffix(file.name) == ".tsv" else ",", strict=True)
        records = _records(reader)
        number, header = next(records, (1, []))
        if isinstance(header, RowError):
            raise DataError(f"{file.shown}:{number}: {header}")
        if fault := _header_fault(header):
            raise DataError(f"{file.shown}:{number}: {fault}")
        for number, fields in records:
            yield f"{file.shown}:{number}", fields if isinstance(fields, RowError) else _csv_row(header, fields)


def _records(reader: Any) -> Iterator[tuple[int, list[str] | RowError]]:
    """The records of a CSV file, each with its first line; blank lines left out."""
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "unexpected end" in str(error)
            what = "a quote is opened and never closed" if unclosed else f"not valid CSV: {error}"
            yield first, RowError(what)
            continue
        if fields:
            yield first, fields


def _header_fault(header: Sequence[str]) -> str | None:
    for name in header:
        if fault := text_fault(name):
            return f"the header {fault}"
    if len(header) == 1 and (other := next((sign for sign in ";\t|" if sign in header[0]), None)):
        return f"the header has {other!r} between its names; a .csv file has commas there, a .tsv file tabs"
    twice = [name for name in header if header.count(name) > 1]
    return f"the header names `{twice[0]}` twice; every column needs a name of its own" if twice else None


def _csv_row(header: Sequence[str], fields: Sequence[str]) -> RowOrError:
    if len(fields) != len(header):
        return RowError(
            f"has {len(fields)} columns, the header {len(header)}; a separator within a field needs quotes around it"
        )
    faults = (f"column `{name}` {fault}" for name, field in zip(header, fields, strict=True) if (fault := text_fault(field)))
    fault = next(faults, None)
    return RowError(fault) if fault else dict(zip(header, fields, strict=True))


def _read_conll(file: DataFile) -> Iterator[Numbered]:
    is_conllu = data_suffix(file.name) == ".conllu"
    with _text(file) as lines:
        sentence: list[tuple[int, str]] = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                # Only before its first word: `#` and hashtags are words too.
                if not (line.startswith("-DOCSTART-") or (line.startswith("#") and (is_conllu or _is_comment(line, sentence)))):
                    sentence.append((number, line.rstrip("\n")))
                continue
            if sentence:
                yield f"{file.shown}:{sentence[0][0]}", _sentence(sentence, is_conllu)
            sentence = []
        if sentence:
            yield f"{file.shown}:{sentence[0][0]}", _sentence(sentence, is_conllu)


def _is_comment(line: str, sentence: Sequence[tuple[int, str]]) -> bool:
    return not sentence and line.startswith("# ")


def _sentence(lines: Sequence[tuple[int, str]], is_conllu: bool) -> RowOrError:
    """The words and tags of a sentence; words alone where it has no other column."""
    words: list[str] = []
    tags: list[str] = []
    width = 0
    for number, line in lines:
        if fault := text_fault(line):
            return RowError(f"line {number} {fault}")
        columns = line.split("\t") if is_conllu or "\t" in line.strip() else line.split()
        width = width or len(columns)
        if len(columns) != width or (is_conllu and width != 10):
            wanted = "10, as CoNLL-U has" if is_conllu else f"{width}, as the line before (blank lines end sentences)"
            return RowError(f"line {number} has {len(columns)} columns, not {wanted}")
        if is_conllu and not columns[0].isdigit():
            continue  # `1-2` and `1.1` are no words of their own (https://universaldependencies.org/format.html)
        words.append(columns[1] if is_conllu else columns[0])
        tags.append(columns[3] if is_conllu else columns[-1])
    return {"tokens": words} | ({"tags": tags} if width > 1 else {})


def _read_parquet(file: DataFile) -> Iterator[Numbered]:
    from pyarrow import ArrowException, parquet

    with _random_access(file) as stream:
        try:
            table = parquet.ParquetFile(stream)
            _check_names(table.schema_arrow.names, file.shown)
            yield from _numbered(table.iter_batches(batch_size=BATCH_ROWS), file.shown)
        except (ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file.shown}: not a Parquet file: {error}") from error


def _read_arrow(file: DataFile) -> Iterator[Numbered]:
    from pyarrow import ArrowException

    with _random_access(file) as stream:
        try:
            batches, names = _arrow_batches(stream)
            _check_names(names, file.shown)
            yield from _numbered(map(_validated, batches), file.shown)
        except (ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{file.shown}: not an Arrow file: {error}") from error
        except MemoryError as error:  # damaged lengths may ask for any amount
            raise DataError(f"{file.shown}: needs more memory than there is, or is damaged") from error


def _validated(batch: Any) -> Any:
    """The batch, none of whose offsets lead out of it: Arrow's files have no checksums."""
    batch.validate(full=True)
    return batch


def _arrow_batches(stream: IO[bytes]) -> tuple[Iterator[Any], list[str]]:
    """The record batches of an IPC file or stream, and the names of its columns."""
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        reader = ipc.open_file(stream)
        return map(reader.get_batch, range(reader.num_record_batches)), reader.schema.names
    batches = ipc.open_stream(stream)
    return iter(batches), batches.schema.names


def _check_names(names: Sequence[str], shown: str) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{shown}: two columns are called `{twice[0]}`; every column needs a name of its own")


def _numbered(batches: Iterator[Any], shown: str) -> Iterator[Numbered]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield f"{shown}:{number}", row


_READERS: dict[str, Callable[[DataFile], Iterator[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
    **dict.fromkeys(CONLL_SUFFIXES, _read_conll),
}
