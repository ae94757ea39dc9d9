"""What moving over from another tool is made of: their keys as tables, the draft of a recipe, and a note on each key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peftkit.errors import Problem
from peftkit.migration.places import written_place

Outcome = Literal["kept", "default", "changed", "added", "no_equal", "ignored", "unknown"]
OUTCOMES: Mapping[Outcome, str] = {
    "kept": "kept",
    "changed": "changed in meaning",
    "added": "defaults there that are not the defaults here",
    "default": "the same as the default here, and left out",
    "no_equal": "without an equal here",
    "unknown": "unknown there too, as far as was read",
    "ignored": "left out on purpose",
}
DEFAULT = "the default of"
_OFF: tuple[Any, ...] = (None, False, "", "no", "none", "off", [], {})


@dataclass(frozen=True)
class Config:
    """A configuration of another tool, as read.

    Attributes:
        path: the file.
        values: their keys in the order of the file.
        lines: key -> its line, where the file has lines that say so.
        command: what a command line asked TRL for, such as `sft`; empty where there was none.
    """

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)
    command: str = ""

    def where(self, key: str) -> str:
        """`file:line` of a key."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)


@dataclass(frozen=True)
class Move:
    """Where the value of one of their keys goes.

    Attributes:
        ours: dotted key of a recipe, or the option of a command.
        why: how the meaning differs; empty where it does not.
        values: their value -> ours, where the spelling differs; all others stay as they are.
    """

    ours: str
    why: str = ""
    values: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """What became of one of their keys."""

    key: str
    outcome: Outcome
    ours: str = ""
    why: str = ""


@dataclass(frozen=True)
class Entry:
    """A value of the recipe, the keys that it came from, and what is to be known of it."""

    value: Any
    keys: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, eq=False)
class Tool:
    """What is known of another tool. Every key of its configuration classes is in one of the tables.

    Attributes:
        name: as `--from` takes it.
        title: as people write it.
        version: the release that was read.
        moves: keys whose value goes over one by one.
        read: keys that a step reads together with others, and where they lead.
        no_equal: keys that nothing here is equal to -> what happens without them.
        ignored: keys that are left out on purpose -> why.
        refused: keys of trainings that cannot be had here -> what can be had.
        steps: what the tables cannot say; each looks at some of the keys of `read`.
        defaults: our dotted key -> the default there, where it is not ours.
        logging_steps: how often a line is logged there, by default.
    """

    name: str
    title: str
    version: str
    moves: Mapping[str, Move]
    read: Mapping[str, Move]
    no_equal: Mapping[str, str]
    ignored: Mapping[str, str]
    refused: Mapping[str, str]
    steps: Sequence[Callable[[Draft], None]]
    defaults: Mapping[str, Any]
    logging_steps: int = 500

    @property
    def keys(self) -> frozenset[str]:
        """Every key that is known of the tool."""
        return frozenset((*self.moves, *self.read, *self.no_equal, *self.ignored, *self.refused))


@dataclass(eq=False)
class Draft:
    """A recipe in the making.

    Attributes:
        config: what is moved over.
        tool: the tool that it is of.
        config_dir: folders that their relative paths may start from: the current one, the configuration's, and those around it.
        recipe_dir: folder that the recipe is written to.
        entries: our dotted key -> value.
        notes: their key -> what became of it.
        problems: what cannot be had here.
        launch: our launch file, where they use several processes.
    """

    config: Config
    tool: Tool
    recipe_dir: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    launch: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of one of their keys; the default where it is left out or empty."""
        value = self.config.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float) -> Any:
        """A number of theirs; anything else is refused, and the default taken."""
        value = self.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
        self.refuse(key, f"`{value}` is no number")
        return default

    def is_on(self, key: str) -> bool:
        """Whether one of their switches is on."""
        return is_on(self.config.values.get(key))

    def put(self, ours: str, value: Any, *keys: str, why: str = "") -> None:
        """Set a key of ours from those of the named keys of theirs that are stated; nothing where none is."""
        stated = tuple(key for key in keys if self.get(key) is not None)
        if not stated:
            return
        self.entries[ours] = Entry(value, stated, why)
        for key in stated:
            self._note(key, ours, why)

    def _note(self, key: str, ours: str, why: str) -> None:
        """A key may lead to several of ours."""
        before = self.notes.get(key)
        places, reasons = [ours], [why] if why else []
        if before is not None and before.ours:
            places = list(dict.fromkeys([*before.ours.split(", "), ours]))
            reasons = list(dict.fromkeys([*([before.why] if before.why else []), *reasons]))
        self.notes[key] = Note(key, "changed" if reasons else "kept", ", ".join(places), "; ".join(reasons))

    def add(self, ours: str, value: Any, why: str = "") -> None:
        """Set a key of ours that is not stated there, by the default there."""
        if ours not in self.entries:
            self.entries[ours] = Entry(value, (), why or f"{DEFAULT} {self.tool.title}")

    def place(self, name: Any) -> str:
        """A path or hub id of theirs as the recipe has to say it."""
        return written_place(str(name), self.config.path.parent, self.recipe_dir)

    def drop(self, key: str, why: str, outcome: Outcome = "ignored") -> None:
        """Leave one of their keys out, where it is stated."""
        if key in self.config.values:
            self.notes[key] = Note(key, outcome, "", why)

    def refuse(self, key: str, what: str) -> None:
        """Something that cannot be had here."""
        self.problems.append(Problem(self.config.where(key), key, what))

    def value(self, ours: str, default: Any = None) -> Any:
        """What the recipe has so far."""
        return self.entries[ours].value if ours in self.entries else default


def is_on(value: Any) -> bool:
    """Whether a value of theirs asks for something: numbers do, and 0 is one; empty texts, lists and `no` do not."""
    return not any(value is off or (value == off and type(value) is type(off)) for off in _OFF)


def spread(groups: Mapping[str, str]) -> dict[str, str]:
    """`{sentence: "key key"}` as key -> sentence."""
    return {key: sentence for sentence, names in groups.items() for key in names.split()}


def same(names: str, section: str) -> dict[str, Move]:
    """Keys that are called the same here, in a section."""
    return {name: Move(f"{section}.{name}") for name in names.split()}


def listed(value: Any) -> list[str]:
    """A list, or a text with commas, as a list of texts."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [str(part).strip() for part in parts if str(part).strip()]
