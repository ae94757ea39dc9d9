"""Checksums of a folder's files, kept in it: whether it is whole is known before anything is read from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from peftkit.engine.guard import raise_if_exhausted
from peftkit.run import write_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every other file of a folder into it."""
    write_json(folder / CHECKSUMS, {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS})


def damage_of(folder: Path) -> str | None:
    """What is wrong with a folder that `write_checksums` has sealed; None where nothing is."""
    try:
        stated = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        wrong = [name for name, digest in stated.items() if not (folder / name).is_file() or _sha256(folder / name) != digest]
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}"
    except (OSError, ValueError, AttributeError) as error:
        raise_if_exhausted(error)
        return f"{CHECKSUMS} cannot be read: {error}"
    return ", ".join(_damage_of_file(folder / name) for name in wrong) or None


def _damage_of_file(path: Path) -> str:
    return f"{path.name} is not what was written" if path.is_file() else f"{path.name} is missing"


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
