"""Sources to encoded examples in a folder: read, split, settle, encode, audit; a row is in memory while it is at hand."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from peftkit.engine.audit import Audit, BadRows, Identity, find_duplicates, find_leaks, identify, split_report
from peftkit.engine.examples import ExampleWriter
from peftkit.engine.records import Records, RecordWriter
from peftkit.engine.rows import Canonical, OpenedSplit, reader_of
from peftkit.engine.settle import settle_encoding
from peftkit.errors import DataError
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.plan import Plan
from peftkit.run import write_json
from peftkit.tasks.base import Task
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import Example, Runtime, TooLong

FINDINGS, SUMMARY = "findings.jsonl", "summary.json"
HELD_OUT = "held_out"  # canonical rows of a split that is not trained on
ALL_OF_THEM = "`peftkit data RECIPE --json --set data.on_bad_row=drop` lists them all"
NUM_RENDERINGS = 5  # rows whose rendering is stored with the adapter


@dataclass(frozen=True)
class Model:
    """What the rows must suit: the tokenizer, and what is known of the model without its weights.

    Attributes:
        tokenizer: the model's.
        max_positions: longest input that it can take, in tokens.
        kind: `decoder`, `encoder` or `encoder-decoder`.
        template_date: the day (ISO) that the chat template writes, if it writes one.
    """

    tokenizer: Any
    max_positions: int | None = None
    kind: str | None = None
    template_date: str | None = None


@dataclass
class Split(Sequence[tuple[str, CanonicalRow]]):
    """The canonical rows of one split, each with its `file:row`: those of `records` at `places` (all where None)."""

    records: Records
    places: list[int] | None = None

    def __len__(self) -> int:
        return len(self.records) if self.places is None else len(self.places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return tuple(self.records[place if self.places is None else self.places[place]])

    def __iter__(self) -> Iterator[tuple[str, CanonicalRow]]:
        return (self[number] for number in range(len(self)))

    def column(self, name: str) -> np.ndarray:
        """A number of every row (N,)."""
        return self.records.column(name)[slice(None) if self.places is None else self.places]


@dataclass
class Preparation:
    """One pass from sources to a folder of examples.

    Attributes:
        plan: the plan.
        model: what the rows must suit.
        folder: where everything is written.
        on_row: told of every row that is encoded.
    """

    plan: Plan
    model: Model
    folder: Path
    on_row: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        data = self.plan.recipe.data
        assert data is not None, "rules refuse a recipe without data where data is needed"
        self.data = data
        self.drops = data.on_bad_row == "drop"
        self.audit = Audit(self.folder / FINDINGS)
        self.first: list[CanonicalRow] = []  # training rows that gave examples
        self.held_out: dict[str, RecordWriter] = {}  # rows to ask, of tasks that generate answers

    def run(self) -> None:
        """Write examples, findings and a summary.

        Raises:
            RecipeError: the rows leave a setting without effect, or `data.max_length` is more than the model takes.
            DataError: naming the rows that cannot be trained on and why.
        """
        splits, formats = self.read_splits()
        encoding = settle_encoding(self.plan, splits["train"], self.model.max_positions, self.model.kind)
        encoding = dataclasses.replace(encoding, template_date=self.model.template_date)
        runtime = self.plan.task.runtime(self.model.tokenizer, encoding)
        written = {name: self._encode(runtime, name, split) for name, split in splits.items()}
        self._compare(splits)
        self._summarise(encoding, formats, runtime, splits, written)

    def read_splits(self) -> tuple[dict[str, Split], list[str]]:
        """The canonical rows of every split, and the formats of the training sources."""
        reader = reader_of(self.plan)
        train = reader.open(self.data.train)
        splits = {"train": Split(self._read("train", train))}
        if isinstance(self.data.validation, float):
            rows, seed = splits["train"], self.plan.recipe.training.seed
            kept, drawn = split_rows(rows, rows.column(same_row(self.plan.task)), self.data.validation, seed)
            records = rows.records
            splits = {"train": Split(records, kept), "validation": Split(records, drawn)}
        elif self.data.validation is not None:
            splits["validation"] = Split(self._read("validation", reader.open(self.data.validation)))
        if self.data.test is not None:
            splits["test"] = Split(self._read("test", reader.open(self.data.test)))
        return splits, [source.format.name for source in train.sources]

    def _read(self, split: str, opened: OpenedSplit) -> Records:
        """A split's canonical rows on disk."""
        formats = {source.format.name: source.format for source in opened.sources}
        described = "; ".join(f"format `{name}`: {item.summary}" for name, item in formats.items())
        bad = BadRows(f"rows of {split} that cannot be read ({described})", ALL_OF_THEM)
        with RecordWriter(self.folder / f"{split}.rows", Identity._fields) as writer:
            for origin, row in self._checked(split, opened):
                if isinstance(row, RowError):
                    bad.add(f"{origin}: {row}")
                    self.audit.add(split, "bad_row", origin, str(row))
                else:
                    writer.add([origin, row], *identify(row))
            records = writer.finish()
        self._judge(bad, split, len(records))
        return records

    def _checked(self, split: str, opened: OpenedSplit) -> Iterator[Canonical]:
        """The rows to look at: all of them, or the first ones of a stream."""
        return islice(opened.rows(), self.data.audit_rows if split == "train" and self.data.streams else None)

    def _judge(self, bad: BadRows, split: str, num_left: int) -> None:
        """Stop where bad rows are errors, or where dropping them leaves none."""
        if bad.count and not self.drops:
            bad.fail()
        if bad.count and not num_left:
            bad.fail("; `data.on_bad_row: drop` would leave none")
        if not num_left:
            raise DataError(f"there are no rows in {split}")

    def _encode(self, runtime: Runtime, split: str, rows: Split) -> ExampleWriter:
        """Examples of a split on disk."""
        writer = ExampleWriter(self.folder / f"{split}.examples")
        bad, too_long = BadRows(f"rows of {split} that cannot be used", ALL_OF_THEM), BadRows("", ALL_OF_THEM)
        num_written = 0
        for origin, row in rows:
            self.on_row()
            try:
                examples = runtime.encode(row, origin)
            except TooLong as error:
                too_long.add(f"{origin}: {error.num_tokens} tokens", error.num_tokens)
                self.audit.add(split, "too_long", origin, str(error))
                continue
            except RowError as error:
                bad.add(f"{origin}: {error}")
                self.audit.add(split, "bad_row", origin, str(error))
                continue
            self._note(runtime, split, origin, examples)
            if examples:
                self._keep(split, origin, row)
            for example in examples:
                writer.add(example)
            num_written += len(examples)
        self._judge(bad, split, num_written or too_long.count)
        if too_long.count and (not self.drops or not num_written):
            too_long.heading = self._too_long_text(split, runtime.settings.max_length, too_long.longest)
            too_long.fail()
        if not num_written:
            raise DataError(f"no row of {split} is left: `truncation: drop` dropped all {len(rows)}")
        return writer

    def _too_long_text(self, split: str, max_length: int, longest: int) -> str:
        """What to say of rows over max_length."""
        ways = ", ".join(way for way in self.plan.task.truncations if way != "error")
        limit, remedy = self.model.max_positions, f"`data.truncation` can be {ways}"
        is_beyond = limit is not None and longest > limit
        fits = f"the model takes at most {limit}; {remedy}" if is_beyond else f"{longest} would fit them all, {remedy} too"
        return f"rows of {split} longer than {max_length} tokens (`data.max_length`; {fits})"

    def _keep(self, split: str, origin: str, row: CanonicalRow) -> None:
        """Keep a row that gave examples, where more than these is needed of it."""
        if split == "train":
            self.first += [row] if len(self.first) < NUM_RENDERINGS else []
        elif self.plan.task.generates:
            if split not in self.held_out:
                self.held_out[split] = RecordWriter(self.folder / f"{split}.{HELD_OUT}")
            self.held_out[split].add([origin, row])

    def _note(self, runtime: Runtime, split: str, origin: str, examples: Sequence[Example]) -> None:
        """What happened to a row whose examples are as they should be."""
        limit, truncation = runtime.settings.max_length, runtime.settings.truncation
        if not examples:
            self.audit.add(split, "dropped", origin, f"is longer than {limit} tokens (`truncation: drop`)")
        elif (num_tokens := examples[0].num_tokens) <= max(limit, examples[0].length):
            pass
        elif truncation == "split":
            reason = f"{num_tokens} tokens made {len(examples)} example(s) with something to learn"
            self.audit.add(split, "split", origin, reason)
        else:
            self.audit.add(split, "truncated", origin, f"{num_tokens} tokens cut to {examples[0].length}")
        for note in dict.fromkeys(note for example in examples for note in example.notes):
            self.audit.add(split, "note", origin, note)

    def _compare(self, splits: dict[str, Split]) -> None:
        """Duplicates within splits, and rows of other splits that are in train."""
        seen = np.unique(splits["train"].column("asked"))
        for name, split in splits.items():
            find_duplicates(self.audit, name, split, split.column("whole"), split.column("asked"))
            if name != "train":
                find_leaks(self.audit, name, split, np.isin(split.column("asked"), seen))

    def _summarise(
        self,
        encoding: Encoding,
        formats: list[str],
        runtime: Runtime,
        splits: dict[str, Split],
        written: dict[str, ExampleWriter],
    ) -> None:
        classes = {name: {label: writer.classes[label] for label in encoding.labels} for name, writer in written.items()}
        for label in [label for label, count in classes["train"].items() if not count]:
            self.audit.add("train", "label_without_rows", "", f"no row has the label `{label}`: it cannot be learned")
        self.audit.close()
        reports = {}
        for name, writer in written.items():
            counts = self.audit.counts.get(name, Counter())
            reports[name] = split_report(writer.finish(), len(splits[name]), counts, self.plan.task.learns_tokens)
        reports["train"]["is_sample"] = self.data.streams
        for rows in self.held_out.values():
            rows.finish()
        for split in splits.values():
            split.records.remove()  # examples, and held-out rows, are all that is read from now on
        summary = {
            "encoding": dataclasses.asdict(encoding),
            "formats": formats,
            "splits": reports,
            "classes": classes,
            "fingerprints": {f"data.{name}": writer.fingerprint for name, writer in written.items()},
            "renderings": [{"row": row, **runtime.rendering(row)} for row in self.first],
        }
        write_json(self.folder / SUMMARY, summary)


def same_row(task: Task) -> str:
    """Which hash says that rows are equal: that of what a model is asked with; of the whole row, where answers are texts.

    Many good answers to one prompt are rows of their own, another label of one text is none.
    """
    return "whole" if task.generates else "asked"


def split_rows(
    rows: Sequence[tuple[str, CanonicalRow]], identities: Sequence[int] | np.ndarray, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Places of the rows that stay, and of those for validation: drawn by the seed, by label where rows have one each.

    Equal rows (also those that a mixture repeats) are on the same side.

    Args:
        rows: the rows.
        identities: of each row a hash (N,); see `same_row`.
        fraction: share of the distinct rows that is drawn.
        seed: of the draw.

    Raises:
        DataError: one side would be empty.
    """
    _, first, which = np.unique(np.asarray(identities), return_index=True, return_inverse=True)
    groups: dict[str, list[int]] = {}
    for place in np.sort(first).tolist():
        label = rows[place][1].get("label", "")
        groups.setdefault("" if isinstance(label, float | list) else str(label), []).append(int(which[place]))
    chosen = np.zeros(len(first), dtype=bool)
    for name in sorted(groups):
        order = random.Random(f"{seed} {name}").sample(groups[name], len(groups[name]))
        chosen[order[: round(fraction * len(order))]] = True
    drawn = chosen[which]
    if drawn.all() or not drawn.any():
        raise DataError(f"`data.validation: {fraction}` of {len(rows)} rows leaves one side empty; use another fraction")
    return np.flatnonzero(~drawn).tolist(), np.flatnonzero(drawn).tolist()
