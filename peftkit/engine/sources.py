"""Raw rows from files, URLs and datasets, each with the file and row number that messages name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

from peftkit.engine.audit import BadRows
from peftkit.engine.remote import hub_fingerprint, hub_rows, saved_folder, saved_rows, url_rows, url_versions
from peftkit.errors import DataError
from peftkit.formats.base import RowError
from peftkit.reading.columns import computed_columns
from peftkit.reading.files import DataFile, Numbered, local_file, read_file
from peftkit.reading.json_rows import RowOrError
from peftkit.recipe.paths import find_files, find_path, places_text, shown_url, source_kind
from peftkit.recipe.schema import SourceSection

__all__ = ["Numbered", "content_fingerprint", "mixed", "read_rows", "sound_rows"]

T = TypeVar("T")
_CHUNK = 2**20


def read_rows(source: SourceSection, recipe_dir: Path) -> Iterator[Numbered]:
    """The rows of a source in order, read as they are asked for, columns renamed and templates filled in.

    A row that cannot be read is its RowError; later ones may be sound.

    Raises:
        DataError: naming what ends the source before its end, or that it has no rows.
    """
    is_empty = True
    for origin, row in islice(_raw_rows(source, recipe_dir), source.max_rows):
        is_empty = False
        yield origin, row if isinstance(row, RowError) else _computed(row, source)
    if is_empty:
        raise DataError(f"`{_shown(source)}` has no rows")


def _shown(source: SourceSection) -> str:
    return shown_url(source.path) if "://" in source.path else source.path


def _computed(row: dict[str, Any], source: SourceSection) -> RowOrError:
    try:
        return computed_columns(row, source.columns, source.template) if source.columns or source.template else row
    except RowError as error:
        return error


def sound_rows(rows: Iterable[tuple[str, T | RowError]], what: str = "", *, drops: bool = False) -> list[tuple[str, T]]:
    """All rows, where every one of them can be read; with `drops` those that can.

    Args:
        rows: rows with their places.
        what: what the message says of them besides.
        drops: whether rows that cannot be read are left out.

    Raises:
        DataError: naming those that cannot (the first few in words).
    """
    sound: list[tuple[str, T]] = []
    bad = BadRows(f"rows that cannot be read{what}")
    for origin, row in rows:
        if not isinstance(row, RowError):
            sound.append((origin, row))
        elif not drops:
            bad.add(f"{origin}: {row}")
    if bad.count:
        bad.fail()
    return sound


def _raw_rows(source: SourceSection, recipe_dir: Path) -> Iterator[Numbered]:
    kind = source_kind(source, recipe_dir)
    if kind == "hub":
        yield from hub_rows(source)
    elif kind == "saved":
        yield from saved_rows(_folder(source, recipe_dir), source)
    elif kind == "url":
        yield from url_rows(source.path)
    else:
        for file in _local_files(source, recipe_dir):
            yield from read_file(file)


def _folder(source: SourceSection, recipe_dir: Path) -> Path:
    folder = find_path(source.path, recipe_dir)
    assert folder is not None, "source_kind found it"
    return folder


def _local_files(source: SourceSection, recipe_dir: Path) -> list[DataFile]:
    files = find_files(source.path, recipe_dir)
    if not files:
        raise DataError(f"there is no data file at `{source.path}` (looked in {places_text(recipe_dir)})")
    return [local_file(path) for path in files]


def mixed(
    openers: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float] | None, stopping_strategy: str, seed: int
) -> Iterator[tuple[int, T]]:
    """The items of several sources with the index of each one's source.

    Without weights one source after the other, every item once. With weights every item is of a source drawn by them:
    `first_exhausted` ends when the drawn source has no more items; with `all_exhausted` it starts over, until every one has
    been through once.

    Raises:
        DataError: a source has no items.
    """
    if weights is None:
        for index, opener in enumerate(openers):
            yield from ((index, item) for item in _some(opener, index))
        return
    draw = random.Random(f"mixture {seed}")
    shares, indices = list(accumulate(weights)), range(len(openers))
    sources = [_some(opener, index) for index, opener in enumerate(openers)]
    exhausted: set[int] = set()
    while True:
        (index,) = draw.choices(indices, cum_weights=shares)
        try:
            item = next(sources[index])
        except StopIteration:
            exhausted.add(index)
            if stopping_strategy == "first_exhausted" or len(exhausted) == len(openers):
                return
            sources[index] = _some(openers[index], index)
            item = next(sources[index])
        yield index, item


def _some(opener: Callable[[], Iterator[T]], index: int) -> Iterator[T]:
    is_empty = True
    for item in opener():
        is_empty = False
        yield item
    if is_empty:
        raise DataError(f"source {index + 1} of the mixture has no rows")


def content_fingerprint(source: SourceSection, recipe_dir: Path) -> str | None:
    """A text that changes whenever the rows of a source could; None where that cannot be told, as for streams.

    Raises:
        DataError: the source cannot be read.
    """
    if source.streaming:
        return None
    versions = _versions(source, recipe_dir)
    if versions is None:
        return None
    from xxhash import xxh3_128

    stated = source.model_dump(mode="json", exclude={"path", "weight", "streaming"})
    return xxh3_128(json.dumps([versions, stated], sort_keys=True).encode()).hexdigest()


def _versions(source: SourceSection, recipe_dir: Path) -> list[str] | None:
    """A text for every file of a source that changes with it, and the names that messages give them."""
    kind = source_kind(source, recipe_dir)
    if kind == "url":
        return url_versions(source.path)
    if kind == "hub":
        return [source.path, hub_fingerprint(source)]
    if kind == "saved":
        folder = saved_folder(_folder(source, recipe_dir), source)
        return [f"{path} {_file_hash(path)}" for path in sorted(folder.iterdir()) if path.is_file()]
    return [f"{file.shown} {_file_hash(Path(file.shown))}" for file in _local_files(source, recipe_dir)]


def _file_hash(path: Path) -> str:
    from xxhash import xxh3_128

    digest = xxh3_128()
    try:
        with path.open("rb") as handle:
            while chunk := handle.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
