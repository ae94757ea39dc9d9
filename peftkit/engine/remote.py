"""Rows behind URLs (through fsspec) and in datasets (through `datasets`): on the hub, or saved in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from peftkit.errors import DataError, LoadError
from peftkit.hub import Repo, reason, require
from peftkit.reading.files import DataFile, Numbered, read_file
from peftkit.recipe.paths import is_data_file, missing_package, saved_splits, shown_url, url_name
from peftkit.recipe.schema import SourceSection

_HTTP = ("http://", "https://")
# Facts that change with a file, by the names that the file systems of fsspec have for them, in lower case.
_HASHES = ("etag", "content-md5", "md5hash", "blob_id")
_TIMES = ("last-modified", "last_modified", "lastmodified", "mtime", "created")


@contextlib.contextmanager
def _naming(url: str) -> Iterator[None]:
    """Whatever a remote file system raises as a DataError that names the URL, without its secrets."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"there is no file at {shown_url(url)}, or its server cannot be reached") from error
    except Exception as error:  # every file system has errors of its own
        what = str(error).replace(url, shown_url(url)).splitlines() or [type(error).__name__]
        raise DataError(f"{shown_url(url)} cannot be read: {what[0]}") from error


def url_files(url: str) -> list[DataFile]:
    """The files that a URL (of a file, a folder or with `*`) names, sorted.

    Raises:
        DataError: there is none, it cannot be reached, or a package is missing.
    """
    if package := missing_package(url):
        raise DataError(f"{shown_url(url)} needs a package that is not installed; `pip install {package}` adds it")
    with _naming(url):
        system, found = _listed(url)
    if not found:
        raise DataError(f"there is no data file at {shown_url(url)}")
    if len(found) == 1 and is_data_file(url_name(url)):
        return [DataFile(shown_url(url), url_name(url), partial(_open, system, found[0], url))]
    return [DataFile(shown_url(system.unstrip_protocol(path)), path, partial(_open, system, path, url)) for path in found]


def _listed(url: str) -> tuple[Any, list[str]]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    if url.startswith(_HTTP):
        return system, [path]  # `?` begins a query there, and a folder cannot be told from a file
    if "*" in path:
        return system, sorted(system.glob(path))
    if system.isdir(path):
        names = [item["name"] for item in system.ls(path, detail=True) if item["type"] == "file"]
        return system, sorted(name for name in names if is_data_file(name.rpartition("/")[2]))
    return system, [path]


def _open(system: Any, path: str, url: str) -> IO[bytes]:
    # In one go: of parts (`Range`) not every server knows.
    options = {"block_size": 0} if url.startswith(_HTTP) else {}
    with _naming(url):
        stream: IO[bytes] = system.open(path, "rb", **options)
        return stream


def url_rows(url: str) -> Iterator[Numbered]:
    """The rows of the files that a URL names.

    Raises:
        DataError: what is behind it cannot be read, or no further.
    """
    for file in url_files(url):
        with _naming(url):
            yield from read_file(file)


def url_versions(url: str) -> list[str] | None:
    """A text per file of a URL that changes with the file; None where the server says nothing that would."""
    from fsspec.core import url_to_fs

    with _naming(url):
        system, _ = url_to_fs(url)
        system.invalidate_cache()
        texts = []
        for path in _listed(url)[1]:
            facts = {str(name).lower(): value for name, value in system.info(path).items()}
            known = {name: str(facts[name]) for name in (*_HASHES, *_TIMES) if facts.get(name) is not None}
            if not known:
                return None
            texts.append(f"{shown_url(path)} {facts.get('size')} {known}")
    return texts


def hub_rows(source: SourceSection) -> Iterator[Numbered]:
    """The rows of a dataset on the hub, labels by their names.

    Raises:
        DataError: it cannot be loaded.
    """
    split = source.split or "train"
    dataset = _load_hub(source)
    yield from _dataset_rows(dataset, f"{source.path}[{split}]")


def _load_hub(source: SourceSection) -> Any:
    options = {"split": source.split or "train", "streaming": source.streaming}
    try:
        require(Repo(source.path, source.revision, "dataset"))
        return _read_hub(source, options)
    except LoadError as error:
        raise DataError(f"the dataset `{source.path}` cannot be loaded: {error}") from error
    except Exception as error:  # the hub client, the builder and the file readers each raise their own
        what = reason(error, source.path, source.revision, "dataset")
        raise DataError(f"the dataset `{source.path}` cannot be loaded: {what}") from error


def _read_hub(source: SourceSection, options: dict[str, Any]) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.config, revision=source.revision, **options)
    except RuntimeError as error:
        if "Dataset scripts" not in str(error) or source.revision is not None:
            raise
        return load_dataset("parquet", data_files=_converted(source), **options)


def _converted(source: SourceSection) -> dict[str, str]:
    """The Parquet files that the hub has made of a split whose rows a script would make, which datasets refuses since 4.0."""
    split = (source.split or "train").partition("[")[0]
    return {split: f"hf://datasets/{source.path}@refs/convert/parquet/{source.config or 'default'}/{split}/*.parquet"}


def hub_fingerprint(source: SourceSection) -> str:
    """The fingerprint that `datasets` gives to what it resolved."""
    return str(_load_hub(source)._fingerprint)


def saved_folder(folder: Path, source: SourceSection) -> Path:
    """The folder of the split that a source names in a saved dataset.

    Raises:
        DataError: there is no such split, or several and none is named.
    """
    splits = saved_splits(folder) or ()
    if not splits:
        return folder
    name = source.split or (splits[0] if len(splits) == 1 else None)
    if name not in splits:
        what = f"has no split `{name}`" if name else "needs `split`"
        raise DataError(f"the saved dataset {folder} {what}; it has {', '.join(splits)}")
    return folder / name


def saved_rows(folder: Path, source: SourceSection) -> Iterator[Numbered]:
    """The rows of a dataset that `datasets` saved in a folder, labels by their names.

    Raises:
        DataError: it cannot be read.
    """
    from datasets import load_from_disk

    place = saved_folder(folder, source)
    try:
        dataset = load_from_disk(str(place))
    except Exception as error:  # Arrow, JSON and file system each raise their own
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the saved dataset {place} cannot be read: {what}") from error
    yield from _dataset_rows(dataset, f"{source.path}[{place.name}]" if place != folder else str(source.path))


def _dataset_rows(dataset: Any, shown: str) -> Iterator[Numbered]:
    names = _class_names(dataset.features or {})
    rows = iter(dataset)
    number = 0
    while True:
        number += 1
        try:
            row = next(rows, None)
        except Exception as error:  # while streaming, the same as in `_load_hub`
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{shown}:{number}: the dataset cannot be read: {what}") from error
        if row is None:
            return
        named = {name: _named(row[name], labels) for name, labels in names.items() if name in row}
        yield f"{shown}:{number}", dict(row) | named


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the classes by column, for columns that hold class numbers or lists of them."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: list(feature.names) for name, feature in inner.items() if type(feature).__name__ == "ClassLabel"}


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(part, names) for part in value]
    # -1 stands for a label that is not known.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
