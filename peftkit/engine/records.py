"""Records on disk: plain data of any shape, one after the other in a file, read one at a time, whatever their number.

A record is JSON in which every list of whole numbers is replaced by its length; the numbers follow as 32-bit integers. That is
four bytes a token, and reading a record takes some microseconds. Two arrays beside the file hold where each record begins and a
few numbers about it, so that sums over all records need not read them; they are mapped, not read.
"""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

_NUMBERS = "\0"  # the key that stands for a list of whole numbers in the JSON, or for a mapping that has this very key


class RecordWriter:
    """Writes a file of records, to be closed by `finish`.

    Args:
        path: the file; the arrays are written beside it.
        columns: names of the numbers that are kept of every record beside it.
    """

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path, self.columns = path, tuple(columns)
        self._file = path.open("wb")
        self._offsets = _offsets_path(path).open("wb")
        self._numbers = _numbers_path(path).open("wb")

    def add(self, record: Any, *numbers: float) -> None:
        """Append a record of lists, mappings with text keys, texts, numbers, true, false and null."""
        assert len(numbers) == len(self.columns)
        self._offsets.write(self._file.tell().to_bytes(8, "little"))
        self._numbers.write(array("d", numbers).tobytes())
        self._file.write(to_bytes(record))

    def finish(self) -> Records:
        """Write the rest, and open what was written."""
        self._offsets.write(self._file.tell().to_bytes(8, "little"))
        for file in (self._file, self._offsets, self._numbers):
            file.flush()
            os.fsync(file.fileno())
        self.close()
        return Records(self.path, self.columns)

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._offsets, self._numbers):
            file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Records(Sequence[Any]):
    """A file of records; nothing of it is held in memory but what is being read.

    Args:
        path: the file.
        columns: names of the numbers beside it.
    """

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path, self._names = path, tuple(columns)
        self._file = path.open("rb")
        self._offsets = np.memmap(_offsets_path(path), dtype="<i8", mode="r")
        shape = (len(self._offsets) - 1, len(columns))
        empty = not all(shape)  # no file of no bytes can be mapped
        self._numbers = np.empty(shape) if empty else np.memmap(_numbers_path(path), dtype=float, mode="r", shape=shape)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(place)
        start, end = int(self._offsets[place]), int(self._offsets[place + 1])
        self._file.seek(start)
        data = self._file.read(end - start)
        size = int.from_bytes(data[:4], "little")
        numbers: array[int] = array("i")
        numbers.frombytes(data[4 + size :])
        return _unpack(json.loads(data[4 : 4 + size].decode("utf-8", "surrogatepass")), iter(numbers.tolist()))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def column(self, name: str) -> np.ndarray:
        """One number of every record (N,), in float64."""
        return np.asarray(self._numbers[:, self._names.index(name)])

    def remove(self) -> None:
        """Close and delete the file and its arrays."""
        self._file.close()
        for path in (self.path, _offsets_path(self.path), _numbers_path(self.path)):
            path.unlink(missing_ok=True)


def to_bytes(record: Any) -> bytes:
    """A record as it is written."""
    data: array[int] = array("i")
    header = json.dumps(_pack(record, data), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(4, "little") + header + data.tobytes()


def _pack(value: Any, numbers: array[int]) -> Any:
    """The value with its lists of whole numbers moved to `numbers`."""
    if isinstance(value, dict):
        packed = {key: _pack(part, numbers) for key, part in value.items()}
        return {_NUMBERS: list(packed.items())} if _NUMBERS in packed else packed
    if not isinstance(value, list | tuple):
        return value
    if value and set(map(type, value)) == {int}:
        with contextlib.suppress(OverflowError):  # of more than 32 bits: they stay in the JSON
            numbers.extend(array("i", value))
            return {_NUMBERS: len(value)}
    return [_pack(part, numbers) for part in value]


def _unpack(value: Any, numbers: Iterator[int]) -> Any:
    """The value with its lists of whole numbers in place again."""
    if isinstance(value, dict):
        held = value.get(_NUMBERS)
        if isinstance(held, int):
            return list(islice(numbers, held))
        return {key: _unpack(part, numbers) for key, part in (held or value.items())}
    return [_unpack(part, numbers) for part in value] if isinstance(value, list) else value


def _offsets_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.offsets")


def _numbers_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.numbers")
