"""Template parity: some rows of training and their tokens, kept with an adapter and made again wherever it is used.

What differs then (another template, another tokenizer, another version of a library) would make the model answer to other
tokens than it has learned from, without any sign of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.adapters import RENDERINGS, read_mapping
from peftkit.engine.facts import read_facts
from peftkit.engine.model import read_tokenizer
from peftkit.errors import CertificateError
from peftkit.formats.base import RowError
from peftkit.guides import TEMPLATE_PARITY
from peftkit.run import write_json
from peftkit.tasks import TASKS
from peftkit.tasks.chat import freeze_date
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import Runtime


def write_renderings(folder: Path, renderings: Sequence[Mapping[str, Any]]) -> None:
    """Keep what `Runtime.rendering` gave for some rows, each with its `row`."""
    write_json(folder / RENDERINGS, {"renderings": list(renderings)})


def fixed_renderings(folder: Path) -> list[dict[str, Any]]:
    """Renderings of the task's fixed rows in place of an adapter's training rows, which are checked once more.

    Raises:
        CertificateError, LoadError: see `check_renderings`.
    """
    facts = read_facts(folder)
    settings = facts.encoding or Encoding(max_length=4096, truncation="right")
    runtime = TASKS[facts.task].runtime(read_tokenizer(str(folder)), settings)
    check_renderings(folder, runtime)
    freeze_date(runtime.tokenizer, settings.template_date)
    return [{"row": row} | runtime.rendering(row) for row in runtime.probe_rows()]


def check_renderings(folder: Path, runtime: Runtime) -> int:
    """Render the rows kept in a folder again; returns how many there are.

    Raises:
        CertificateError: a row gives other text or other tokens than in training.
        LoadError: the file is damaged.
    """
    if not (folder / RENDERINGS).is_file():
        return 0
    kept = read_mapping(folder / RENDERINGS).get("renderings", [])
    freeze_date(runtime.tokenizer, runtime.settings.template_date)
    try:
        for number, expected in enumerate(kept, 1):
            _compare(number, expected, runtime, folder)
    finally:
        freeze_date(runtime.tokenizer, None)
    return len(kept)


def _compare(number: int, expected: Mapping[str, Any], runtime: Runtime, folder: Path) -> None:
    try:
        found = runtime.rendering(expected["row"])
    except RowError as error:
        raise CertificateError(
            f"{folder / RENDERINGS}: row {number} of training cannot be rendered any more: {error}", guide=TEMPLATE_PARITY
        ) from error
    for name in ("text", "generation_prompt", "input_ids"):
        if found.get(name) != expected.get(name):
            raise CertificateError(
                f"{folder / RENDERINGS}: row {number} of training gives another `{name}` than in training: "
                f"{_difference(expected.get(name), found.get(name))}. The chat template, the tokenizer or a library has "
                "changed: the adapter would be asked with other tokens than it has learned from",
                guide=TEMPLATE_PARITY,
            )


def _difference(expected: Any, found: Any) -> str:
    """The first place where two texts, or two lists of lists of tokens, differ."""
    if isinstance(expected, list) and isinstance(found, list):
        expected, found = ([token for part in parts for token in part] for parts in (expected, found))
    if not isinstance(expected, str | list) or not isinstance(found, str | list):
        return f"{expected!r} became {found!r}"
    shorter = min(len(expected), len(found))
    place = next((place for place in range(shorter) if expected[place] != found[place]), shorter)
    return f"from place {place + 1} on, {expected[place : place + 20]!r} became {found[place : place + 20]!r}"
