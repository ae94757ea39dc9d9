"""From the sources of a split to canonical rows: the format of each source, and what is wrong with which row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import guides
from peftkit.engine.sources import Numbered, mixed, read_rows, sound_rows
from peftkit.errors import DataError
from peftkit.formats import FORMATS, detect_format
from peftkit.formats.base import CanonicalRow, Format, RowError, columns_text
from peftkit.plan import Plan
from peftkit.recipe.schema import SourceSection
from peftkit.tasks.base import Task

Row = tuple[str, CanonicalRow]  # `file:row`, and the row in canonical columns
Canonical = tuple[str, CanonicalRow | RowError]  # `file:row`, and the row in canonical columns or why it cannot be read


@dataclass(frozen=True)
class OpenedSource:
    """A source whose format is known.

    Attributes:
        rows: its rows in canonical columns, from the first one each time it is called.
        format: how they are laid out.
    """

    rows: Callable[[], Iterator[Canonical]]
    format: Format


@dataclass(frozen=True)
class OpenedSplit:
    """The sources of a split, ready to be read (more than once, if need be)."""

    sources: tuple[OpenedSource, ...]
    weights: tuple[float, ...] | None
    stopping_strategy: str
    seed: int

    def rows(self) -> Iterator[Canonical]:
        """All rows: one source after the other, or mixed by their weights."""
        openers = [source.rows for source in self.sources]
        for _, row in mixed(openers, self.weights, self.stopping_strategy, self.seed):
            yield row

    def sound_rows(self, *, drops: bool = False) -> list[Row]:
        """All rows; those that cannot be read are left out with `drops`, or else told with the formats that were expected."""
        described = "; ".join(f"format `{source.format.name}`: {source.format.summary}" for source in self.sources)
        return sound_rows(self.rows(), f" ({described})", drops=drops)


@dataclass(frozen=True)
class RowReader:
    """Reads the sources of splits.

    Attributes:
        task: what learns from the rows.
        recipe_dir: folder that relative paths are looked up in first.
        system_prompt: for conversations that have none.
        with_tasks: whether every row must name its task.
        stopping_strategy: when a mixture ends.
        seed: of mixtures.
        rename: what is done to every raw row before its format reads it.
    """

    task: Task
    recipe_dir: Path
    system_prompt: str | None = None
    with_tasks: bool = False
    stopping_strategy: str = "all_exhausted"
    seed: int = 0
    rename: Callable[[Mapping[str, Any]], dict[str, Any]] = dict

    def open(self, sources: Sequence[SourceSection]) -> OpenedSplit:
        """Find out the format of every source.

        Raises:
            DataError: a source has no rows, or none that the task can learn from.
        """
        weights = tuple(source.weight for source in sources if source.weight is not None)
        return OpenedSplit(tuple(map(self._open, sources)), weights or None, self.stopping_strategy, self.seed)

    def _open(self, source: SourceSection) -> OpenedSource:
        item = choose_format(source, _first_row(source, self._raw(source)), self.task)
        return OpenedSource(lambda: self._converted(source, item), item)

    def _raw(self, source: SourceSection) -> Iterator[Numbered]:
        for origin, row in read_rows(source, self.recipe_dir):
            yield origin, row if isinstance(row, RowError) else self.rename(row)

    def _converted(self, source: SourceSection, item: Format) -> Iterator[Canonical]:
        """Rows in canonical columns that the task learns from, with their targets and, with `with_tasks`, their `task_id`."""
        for origin, row in self._raw(source):
            try:
                yield origin, row if isinstance(row, RowError) else self._canonical(row, item)
            except RowError as error:
                yield origin, error

    def _canonical(self, row: Mapping[str, Any], item: Format) -> CanonicalRow:
        canonical = item.convert(row, True)
        if not self.task.can_read(item.columns_of(canonical)):
            raise RowError(f"has {', '.join(item.columns_of(canonical))}, which {self.task.name} cannot learn from")
        return with_system_prompt(canonical | (task_of(row) if self.with_tasks else {}), self.system_prompt)


def reader_of(plan: Plan) -> RowReader:
    """The reader of a recipe's rows."""
    data = plan.recipe.data
    assert data is not None, "rules refuse a recipe without data where data is needed"
    with_tasks, seed = bool(plan.method.num_tasks_field), plan.recipe.training.seed
    return RowReader(plan.task, plan.recipe_dir, data.system_prompt, with_tasks, data.stopping_strategy, seed)


def _first_row(source: SourceSection, rows: Iterator[Numbered]) -> Mapping[str, Any]:
    """The first row that can be read.

    Raises:
        DataError: there is none.
    """
    bad = []
    for origin, row in rows:
        if not isinstance(row, RowError):
            return row
        bad.append(f"{origin}: {row}")
    raise DataError("\n".join(bad[:5]) if bad else f"`{source.path}` has no rows")


def choose_format(source: SourceSection, row: Mapping[str, Any], task: Task) -> Format:
    """The format that the recipe names, or the one that `auto` recognises by the columns of a row."""
    if source.format != "auto":
        return FORMATS[source.format]
    item = detect_format(frozenset(row), task.can_read)
    readable = [name for name, other in FORMATS.items() if task.can_read(other.yields)]
    if item is None:
        item = detect_format(frozenset(row))
        found = "no format has these columns" if item is None else f"they look like `{item.name}`"
        formats = "; ".join(f"{name}: {FORMATS[name].summary}" for name in readable)
        raise DataError(
            f"`{source.path}` has {columns_text(row)}: {found}, and {task.name} cannot learn from that. "
            f"Name the format or rename with `columns`. {task.name} reads {formats}",
            guide=guides.FORMATS,
        )
    return item


def task_of(row: Mapping[str, Any]) -> CanonicalRow:
    """The column `task_id` of a row.

    Raises:
        RowError: there is none, or it holds neither a name nor a whole number.
    """
    value = row.get("task_id")
    if value is None or not str(value).strip():
        raise RowError("no column `task_id`, which this adapter method needs (its name can be changed by `columns`)")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"column `task_id` holds {value!r}; a task is a name or a whole number")
    return {"task_id": str(value)}


def with_system_prompt(row: CanonicalRow, system_prompt: str | None) -> CanonicalRow:
    """The row with a system message, where it holds conversations that have none."""
    system = {"role": "system", "content": system_prompt}
    added = {
        name: [system, *row[name]]
        for name in ("messages", "chosen", "rejected")
        if system_prompt and row.get(name) and row[name][0]["role"] not in ("system", "developer")
    }
    return row | added
