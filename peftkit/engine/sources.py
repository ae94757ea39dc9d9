"""Raw rows from files and hub datasets, each with the file and row number that messages name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from peftkit.errors import DataError
from peftkit.recipe.paths import find_files, is_file_source, places_text
from peftkit.recipe.schema import SourceSection

Numbered = tuple[str, dict[str, Any]]  # `file:row` (rows from 1; for text files the line), and the row


def read_rows(source: SourceSection, recipe_dir: Path) -> list[Numbered]:
    """The rows of a source in order, columns renamed.

    Raises:
        DataError: naming file and row of what cannot be read.
    """
    rows = _file_rows(source, recipe_dir) if is_file_source(source) else _hub_rows(source)
    renamed = [(origin, _rename(row, source.columns, origin)) for origin, row in islice(rows, source.max_rows)]
    if not renamed:
        raise DataError(f"`{source.path}` has no rows")
    return renamed


def _file_rows(source: SourceSection, recipe_dir: Path) -> Iterator[Numbered]:
    files = find_files(source.path, recipe_dir)
    if not files:
        raise DataError(f"there is no file `{source.path}` (looked in {places_text(recipe_dir)})")
    for path in files:
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise DataError(f"{path}: files that can be read end in {', '.join(_READERS)}")
        try:
            yield from reader(path)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
            yield _checked(row, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Numbered]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, list):
        raise DataError(f"{path}: holds {type(data).__name__}, not a list of rows; one row per line belongs in a .jsonl file")
    for number, row in enumerate(data, 1):
        yield _checked(row, f"{path}:{number}")


def _read_csv(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                origin = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{origin}: has another number of columns than the header ({len(reader.fieldnames or [])})")
                yield origin, dict(row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Numbered]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}:{number}", row


def _read_text(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield f"{path}:{number}", {"text": line.rstrip("\n")}


_READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _hub_rows(source: SourceSection) -> Iterator[Numbered]:
    from datasets import load_dataset

    split = source.split or "train"
    try:
        dataset = load_dataset(source.path, source.config, split=split, revision=source.revision)
    except Exception as error:  # the hub client, the builder and the file readers each raise their own
        raise DataError(f"the dataset `{source.path}` cannot be loaded: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(dataset, 1):
        yield f"{source.path}[{split}]:{number}", dict(row)


def _checked(row: Any, origin: str) -> Numbered:
    if not isinstance(row, dict):
        raise DataError(f"{origin}: is {type(row).__name__}, not a mapping of columns")
    return origin, row


def _rename(row: dict[str, Any], columns: dict[str, str], origin: str) -> dict[str, Any]:
    renamed = dict(row)
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(f"{origin}: no column `{theirs}` (from `columns`); the row has {', '.join(row) or 'none'}")
        renamed[ours] = row[theirs]
    return renamed
