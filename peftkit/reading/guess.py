"""What rows look like: which tasks could learn from them, in which format, by which of their columns.

A format says itself which columns it knows (`Format.matches`). Columns of other names are guessed by their names and by what
they hold. Either way a reading counts only where the format then reads the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from peftkit import guides
from peftkit.errors import DataError, RecipeError
from peftkit.formats import FORMATS
from peftkit.formats.base import CanonicalRow, Format, RawRow, RowError, columns_text, is_missing, shown
from peftkit.reading.columns import computed_columns
from peftkit.reading.files import Numbered, local_file, read_file
from peftkit.recipe.paths import FILE_SUFFIXES, find_files, find_path, places_text, saved_splits, source_kind
from peftkit.recipe.schema import SourceSection
from peftkit.tasks import TASKS
from peftkit.tasks.base import Task

NUM_ROWS = 1000  # that are looked at
_SHORT, _FEW_WORDS, _ONE_WORD = 40, 5, 100  # names of classes have no more characters and words, or characters of one word
_NUMBER = re.compile(r"[-+]?\d*\.?\d+")  # as CSV files hold them
_TURN_KEYS = {"role", "from"}
_SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}

Kind = Literal["text", "class", "number", "words", "turns", "other"]


@dataclass(frozen=True)
class Look:
    """The first rows of a source.

    Attributes:
        path: the source, as it was named.
        split: of a saved dataset; empty where it has none.
        rows: those that can be read.
        faults: why others cannot, each with its `file:row`.
        is_whole: whether there are no more.
    """

    path: str
    split: str
    rows: list[RawRow]
    faults: list[str]
    is_whole: bool

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


@dataclass(frozen=True)
class Reading:
    """A way to learn from rows.

    Attributes:
        task: what could learn.
        format: how its rows are laid out.
        columns: our names -> those in the file, where they differ.
        learned: what is learned of the first row, in words.
        num_bad: rows among those looked at that it cannot read.
    """

    task: Task
    format: Format
    columns: dict[str, str]
    learned: str
    num_bad: int


@dataclass(frozen=True)
class _Role:
    """A column that a format needs: its name there, what it may hold, what it is called elsewhere, best first."""

    name: str
    kinds: tuple[Kind, ...]
    names: str
    by_content: bool = False  # whether any column that holds such a thing will do


_TEXT_ROLE = _Role("text", ("text",), "text sentence review comment content body message tweet utterance query", True)
_CLASS_ROLE = _Role("label", ("class",), "label category class intent sentiment target topic rating stars emotion type", True)
_FIRST = _Role("text", ("text", "class"), "sentence1 sentence_a text1 text_a premise question1 first")
_SECOND = _Role("text_pair", ("text", "class"), "sentence2 sentence_b text2 text_b hypothesis question2 second")
_QUESTION = "instruction question query prompt input problem user request ask source title"
_ANSWER = "output answer response reply completion solution target assistant bot summary"
# Ways to rename columns, the most specific first.
_LAYOUTS: tuple[tuple[str, tuple[_Role, ...]], ...] = (
    (
        "preference",
        (
            _Role("prompt", ("text", "turns", "class"), _QUESTION),
            _Role("chosen", ("text", "turns"), "chosen preferred accepted better winner"),
            _Role("rejected", ("text", "turns"), "rejected dispreferred refused worse loser"),
        ),
    ),
    ("chat", (_Role("messages", ("turns",), "messages conversation dialog dialogue chat turns", True),)),
    (
        "tokens",
        (
            _Role("tokens", ("words",), "tokens words token word text", True),
            _Role("tags", ("words", "other"), "tags ner_tags labels ner pos entities label", True),
        ),
    ),
    (
        "question_answering",
        (
            _Role("question", ("text",), "question query"),
            _Role("context", ("text",), "context passage paragraph document article"),
            _Role("answers", ("other", "text", "class"), "answers answer"),
        ),
    ),
    ("classification", (_FIRST, _SECOND, _CLASS_ROLE)),
    ("pairs", (_FIRST, _SECOND, _Role("score", ("number",), "score similarity label", True))),
    ("classification", (_TEXT_ROLE, _CLASS_ROLE)),
    (
        "seq2seq",
        (
            _Role("source", ("text",), "source src document article en"),
            _Role("target", ("text",), "target tgt summary highlights translation de fr es zh"),
        ),
    ),
    (
        "instruction",
        (_Role("instruction", ("text", "class"), _QUESTION, True), _Role("output", ("text", "class"), _ANSWER, True)),
    ),
    (
        "pairs",
        (
            _Role("anchor", ("text",), "anchor query question sentence1 text", True),
            _Role("positive", ("text",), "positive passage document answer sentence2", True),
        ),
    ),
    ("text", (_TEXT_ROLE,)),
)


def look_at(path: str, recipe_dir: Path) -> Look:
    """Read the first rows of a file, glob, folder or saved dataset.

    Raises:
        RecipeError: it is a URL or a name of the hub, which is not looked into.
        DataError: there is nothing there, or no row that can be read.
    """
    split, rows = _open(path, recipe_dir)
    sound: list[RawRow] = []
    faults: list[str] = []
    for origin, row in islice(rows, NUM_ROWS):
        if isinstance(row, RowError):
            faults.append(f"{origin}: {row}")
        else:
            sound.append(row)
    if not sound:
        raise DataError("\n".join(faults[:3]) or f"`{path}` has no rows")
    return Look(path, split, sound, faults, next(rows, None) is None)


def _open(path: str, recipe_dir: Path) -> tuple[str, Iterator[Numbered]]:
    kind = source_kind(SourceSection(path=path), recipe_dir)
    if kind in ("url", "hub"):
        raise RecipeError(
            f"`{path}` is no file here; rows of a URL or of the hub are named in the recipe itself, at `data.train`"
        )
    split, files = "", find_files(path, recipe_dir)
    folder = find_path(path, recipe_dir)
    if kind == "saved" and folder is not None:
        splits = saved_splits(folder) or ("",)
        split = "train" if "train" in splits else splits[0]
        files = sorted((folder / split).glob("*.arrow"))
    if not files and folder is not None:
        raise DataError(f"the folder `{path}` has no file that ends in {', '.join(FILE_SUFFIXES)}")
    if not files:
        raise DataError(f"there is no file `{path}` (looked in {places_text(recipe_dir)})")
    return split, (row for file in files for row in read_file(local_file(file)))


def splits_beside(look: Look, recipe_dir: Path) -> dict[str, tuple[str, str]]:
    """Validation and test rows beside training rows, as path and split: `dev.csv` beside `train.csv`, another split."""
    folder = find_path(look.path, recipe_dir)
    splits = (saved_splits(folder) or ()) if folder is not None else ()
    head, slash, file = look.path.rpartition("/")
    found: dict[str, tuple[str, str]] = {}
    for split, names in _SPLIT_NAMES.items():
        beside = [f"{head}{slash}{file.replace('train', name)}" for name in names if "train" in file]
        places = [(look.path, name) for name in names if name in splits]
        places += [(path, "") for path in beside if find_path(path, recipe_dir) is not None]
        found |= {split: places[0]} if places else {}
    return found


def readings_of(look: Look, task: str | None = None) -> list[Reading]:
    """Ways to learn from rows, the likeliest first; those of one task alone where it is named."""
    names = [task] if task else [*TASKS]
    direct = [
        reading
        for item in FORMATS.values()
        if item.matches(frozenset(look.rows[0]))
        for name in _in_order(names, item)
        if (reading := try_reading(look, TASKS[name], item, {}))
    ]
    known = {reading.task.name for reading in direct}
    guessed = [reading for name in names if name not in known for reading in _guesses(look, TASKS[name])]
    guessed.sort(key=lambda pair: (pair[0], _in_order(names, pair[1].format).index(pair[1].task.name)))
    return direct + [reading for _, reading in guessed]


def _in_order(names: list[str], item: Format) -> list[str]:
    """The likelier tasks first: what is laid out as source and target is mostly for models with encoder and decoder."""
    return names[::-1] if item.name == "seq2seq" else names


def _guesses(look: Look, task: Task) -> Iterator[tuple[int, Reading]]:
    """The likeliest reading after renaming columns, and that of plain text, each with its place among the layouts."""
    kinds = {name: _kind(name, values) for name, values in _flat(look.rows).items()}
    is_known = False
    for place, (name, roles) in enumerate(_LAYOUTS):
        columns = _assigned(roles, kinds, look.rows) if not is_known or name == "text" else None
        reading = try_reading(look, task, FORMATS[name], columns) if columns else None
        if reading:
            is_known = True
            yield place, reading


def _flat(rows: Sequence[RawRow]) -> dict[str, list[Any]]:
    """The values of every column, and of what lies one level within mappings and first elements of lists, by dotted names."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
            prefix, inner = (f"{name}.0", value[0]) if isinstance(value, list) and value else (name, value)
            is_section = isinstance(inner, dict) and not {*inner} & _TURN_KEYS
            for key, part in inner.items() if is_section else ():
                found.setdefault(f"{prefix}.{key}", []).append(part)
    return found


def try_reading(look: Look, task: Task, item: Format, columns: Mapping[str, str]) -> Reading | None:
    """The reading of these columns (our names -> the file's), where at least half of the rows can be read so."""
    try:
        return checked_reading(look, task, item, columns)
    except DataError:
        return None


def checked_reading(look: Look, task: Task, item: Format, columns: Mapping[str, str]) -> Reading:
    """The same, or why there is none.

    Raises:
        DataError: more than half of the rows cannot be read so, with the reason of the first one.
    """
    faults: list[str] = []
    first: CanonicalRow | None = None
    for row in look.rows:
        try:
            canonical = item.convert(computed_columns(row, columns, {}), True)
            if not task.can_read(item.columns_of(canonical)):
                raise RowError(f"has {', '.join(item.columns_of(canonical))}, which {task.name} cannot learn from")
            first = first or canonical
        except RowError as error:
            faults.append(str(error))
    if first is None or len(faults) > len(look.rows) // 2:
        raise DataError(f"format `{item.name}`: {len(faults):,} of {len(look.rows):,} rows cannot be read: {faults[0]}")
    renamed = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    return Reading(task, item, renamed, _learned(first), len(faults))


def refuse_unread(look: Look, task: str | None) -> None:
    """Say that nothing can be learned from rows.

    Raises:
        DataError: always; with the columns, and what there would have to be.
    """
    known = [item for item in FORMATS.values() if task is None or TASKS[task].can_read(item.yields)]
    formats = "\n".join(f"  {item.name}: {item.summary}" for item in known)
    what = f"`{look.path}` has {columns_text(look.rows[0])}: no format that {task or 'any task'} reads can be made of them"
    raise DataError(f"{what}. There are:\n{formats}", guide=guides.FORMATS)


def _learned(row: CanonicalRow) -> str:
    """What is learned of a row in canonical columns."""
    if "messages" in row or "chosen" in row:
        turns = row.get("messages") or row["chosen"]
        return f"the answer {shown(turns[-1].get('content') or turns[-1].get('tool_calls'))}"
    names = ("label", "tags", "answers", "completion", "score", "positive", "segments", "text", "labels")
    name = next(name for name in names if name in row)
    return f"{name} {shown(row['answers']['text'] if name == 'answers' else row[name])}"


def _assigned(roles: Sequence[_Role], kinds: Mapping[str, Kind], rows: Sequence[RawRow]) -> dict[str, str] | None:
    """A column for every role, by name before content; None where one is left without."""
    found: dict[str, str] = {}
    for role in roles:
        free = [name for name, kind in kinds.items() if kind in role.kinds and name not in found.values()]
        named = [(rank, name) for name in free if (rank := _rank_of_name(name, role.names.split())) is not None]
        if named:
            found[role.name] = min(named, key=lambda pair: pair[0])[1]
    for role in roles:
        free = [name for name, kind in kinds.items() if kind in role.kinds and name not in found.values()]
        if role.name not in found and role.by_content and free:
            found[role.name] = _longest(free, rows) if role is _TEXT_ROLE else free[0]
    return found if len(found) == len(roles) else None


def _rank_of_name(name: str, known: Sequence[str]) -> tuple[bool, int] | None:
    """How well a column's name says what it is: `review` before `review_text` before `comment`; None where it does not."""
    plain = re.sub(r"\W+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)).lower()
    ranks = [(plain != other, rank) for rank, other in enumerate(known) if f"_{other}_" in f"_{plain}_"]
    return min(ranks, default=None)


def _longest(names: Sequence[str], rows: Sequence[RawRow]) -> str:
    return max(names, key=lambda name: sum(len(str(value)) for value in _flat(rows)[name]))


def _kind(name: str, values: Sequence[Any]) -> Kind:
    """What a column holds, by its name and all of its values."""
    present = [value for value in values if not is_missing(value) and value != ""]
    if not present:
        return "other"
    if all(isinstance(value, list) and value for value in present):
        return _kind_of_lists(present)
    if all(isinstance(value, float) for value in present):
        return "number"
    if all(isinstance(value, str | int) and not isinstance(value, bool) for value in present):
        texts = [str(value) for value in present]
        if _are_ids(name, texts) or _are_classes(texts):
            return "class" if _are_classes(texts) else "other"
        return "number" if all(_NUMBER.fullmatch(text.strip()) for text in texts) else "text"
    return "other"


def _kind_of_lists(lists: Sequence[list[Any]]) -> Kind:
    firsts = [value[0] for value in lists]
    if all(isinstance(first, dict) and {*first} & _TURN_KEYS for first in firsts):
        return "turns"
    return "words" if all(isinstance(first, str) for first in firsts) else "other"


def _are_ids(name: str, texts: Sequence[str]) -> bool:
    """Whether texts only tell rows apart."""
    is_called_so = _rank_of_name(name, ("id", "ids", "uuid", "guid", "index", "idx", "url")) is not None
    are_codes = len(texts) > 2 and all(text.isascii() and not {*" ."} & {*text} for text in texts)
    return len({*texts}) == len(texts) and (is_called_so or are_codes)


def _are_classes(texts: Sequence[str]) -> bool:
    """Whether texts are names of classes: short, and again and again the same (among few rows, two are enough)."""
    different = {*texts}
    words = {text: len(text.split()) for text in different}
    are_short = all(count <= _FEW_WORDS and len(text) <= (_SHORT if count > 1 else _ONE_WORD) for text, count in words.items())
    return are_short and len(different) <= max(2, len(texts) // 3) and len(texts) > 2
