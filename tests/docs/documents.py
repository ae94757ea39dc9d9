"""What documents hold: fenced and indented blocks, the commands in them, and what is shown under a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
PAGES = [README, CHINESE, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(peftkit [^`]+)`(?!`)")
_VARIABLE = re.compile(r"\$\w+|\$\([^)]*\)")


@dataclass(frozen=True)
class Block:
    """A block of a document.

    Attributes:
        kind: what stands behind the fence; empty for an indented block.
        text: its lines.
        place: `file:line` of its first line.
        before: the last line of text in front of it.
    """

    kind: str
    text: str
    place: str
    before: str


@dataclass(frozen=True)
class Command:
    """A command line of a document.

    Attributes:
        words: its arguments, without `peftkit`.
        shown: the lines under it, up to the next command or the end of the block.
        place: `file:line`.
    """

    words: tuple[str, ...]
    shown: tuple[str, ...]
    place: str

    @property
    def line(self) -> str:
        """As it would be typed, without comment."""
        return shlex.join(("peftkit", *self.words))


def blocks(path: Path) -> Iterator[Block]:
    """Fenced and indented blocks in their order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number, before = 0, ""
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = next(place for place in range(number + 1, len(lines)) if lines[place].startswith("```"))
            yield _block(path, line[3:], lines[number + 1 : end], number + 2, before)
            number, before = end, ""
        elif line.startswith("    ") and not lines[number - 1].strip():
            end = next((place for place in range(number, len(lines)) if not re.match(r"    |\s*$", lines[place])), len(lines))
            yield _block(path, "", [text[4:] for text in lines[number:end]], number + 1, before)
            number, before = end - 1, ""
        elif line.strip():
            before = line
        number += 1


def _block(path: Path, kind: str, lines: list[str], number: int, before: str) -> Block:
    return Block(kind, "\n".join(lines).rstrip("\n") + "\n", f"{path.name}:{number}", before)


def commands(path: Path) -> Iterator[Command]:
    """The `peftkit` command lines of all blocks of a document, in order."""
    for block in blocks(path):
        if block.kind in ("", "bash", "console", "sh"):
            yield from _commands_of(block)


def _commands_of(block: Block) -> Iterator[Command]:
    name, _, first = block.place.partition(":")
    found: list[tuple[int, str, list[str]]] = []
    open_line = False
    for number, line in enumerate(block.text.splitlines(), int(first)):
        text = line.removeprefix("$ ")
        if open_line or text.startswith("peftkit "):
            whole = f"{found.pop()[1]} {text.strip()}" if open_line else text
            open_line = whole.endswith("\\")
            found.append((number, whole.removesuffix("\\").rstrip(), []))
        elif found:
            found[-1][2].append(line)
    for number, text, shown in found:
        yield Command(tuple(words_of(text)), tuple(shown), f"{name}:{number}")


def words_of(line: str) -> list[str]:
    """The arguments of a command line, without `peftkit` and without a comment."""
    return shlex.split(line, comments=True)[1:]


def inline_commands(path: Path) -> Iterator[str]:
    """Command lines within sentences, `peftkit ...`, whose arguments may be left out."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for found in _INLINE.finditer(text):
        yield " ".join(found[1].split())
