"""From sources to encoded examples: formats, labels, splits, lengths, and what is wrong with which row."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.engine.settle import settle_encoding
from peftkit.engine.sources import Numbered, read_rows
from peftkit.errors import DataError
from peftkit.formats import FORMATS, detect_format
from peftkit.formats.base import CanonicalRow, Format, RowError, columns_text
from peftkit.plan import Plan
from peftkit.recipe.schema import SourceSection
from peftkit.tasks.base import Encoding, Example, Runtime, Task, TooLong

MAX_SHOWN = 5  # bad rows named in one message; the count is always given


@dataclass(frozen=True)
class Data:
    """Encoded rows by split, and how they were encoded.

    Attributes:
        splits: `train`, and `validation` and `test` where the recipe has them.
        encoding: stored with the adapter, so that inference encodes alike.
        format: the format of the training rows.
        num_dropped: rows left out by `truncation: drop`, by split.
        num_truncated: rows that were cut, by split.
    """

    splits: dict[str, list[Example]]
    encoding: Encoding
    format: str
    num_dropped: dict[str, int]
    num_truncated: dict[str, int]

    @property
    def train(self) -> list[Example]:
        """Rows to learn from."""
        return self.splits["train"]

    @property
    def tokens_per_epoch(self) -> int:
        """Input tokens of one pass over the training rows, without padding."""
        return sum(example.num_input_tokens for example in self.train)

    @property
    def targets_per_epoch(self) -> int:
        """Targets (supervised tokens, or rows) of one pass."""
        return sum(example.num_targets for example in self.train)


def load_data(plan: Plan, tokenizer: Any, max_positions: int | None = None, model_kind: str | None = None) -> Data:
    """Read, split and encode everything that the recipe's `data` names.

    Args:
        plan: the plan.
        tokenizer: the model's tokenizer.
        max_positions: longest input that the model can take, in tokens.
        model_kind: `decoder`, `encoder` or `encoder-decoder`.

    Raises:
        RecipeError: `data.max_length` is more than that, or the rows leave a setting without effect.
        DataError: naming the rows that cannot be trained on and why.
    """
    data = plan.recipe.data
    assert data is not None, "rules refuse a recipe without data where data is needed"
    raw, item = _read(plan, data.train)
    canonical = {"train": raw}
    if isinstance(data.validation, SourceSection):
        canonical["validation"] = _read(plan, data.validation)[0]
    elif data.validation is not None:
        canonical["train"], canonical["validation"] = split_rows(raw, data.validation, plan.recipe.training.seed)
    if data.test is not None:
        canonical["test"] = _read(plan, data.test)[0]
    encoding = settle_encoding(plan, canonical["train"], max_positions, model_kind)
    runtime = plan.task.runtime(tokenizer, encoding)
    splits, dropped, truncated = {}, {}, {}
    for name, rows in canonical.items():
        splits[name] = encode_rows(runtime, rows, name)
        dropped[name] = len(rows) - len(splits[name])
        truncated[name] = sum(example.num_tokens > encoding.max_length for example in splits[name])
    return Data(splits, encoding, item.name, dropped, truncated)


def num_outputs(plan: Plan) -> int:
    """Outputs of the head, from the recipe or its rows; 0 where neither says."""
    data = plan.recipe.data
    if not plan.task.has_labels or data is None:
        return 0
    if data.labels and data.problem_type == "auto":
        return len(data.labels)
    return settle_encoding(plan, _read(plan, data.train)[0]).num_outputs


def _read(plan: Plan, source: SourceSection) -> tuple[list[Numbered], Format]:
    """Canonical rows of a source, and its format."""
    assert plan.recipe.data is not None
    raw = read_rows(source, plan.recipe_dir)
    item = choose_format(source, raw, plan.task)
    with_tasks = bool(plan.method.num_tasks_field)
    return to_canonical(raw, item, system_prompt=plan.recipe.data.system_prompt, with_tasks=with_tasks), item


def choose_format(source: SourceSection, raw: Sequence[Numbered], task: Task) -> Format:
    """The format that the recipe names, or the one that `auto` recognises by the first row's columns."""
    if source.format != "auto":
        return FORMATS[source.format]
    row = raw[0][1]
    item = detect_format(frozenset(row), task.can_read)
    readable = [name for name, other in FORMATS.items() if task.can_read(other.yields)]
    if item is None:
        item = detect_format(frozenset(row))
        found = "no format has these columns" if item is None else f"they look like `{item.name}`"
        formats = "; ".join(f"{name}: {FORMATS[name].summary}" for name in readable)
        raise DataError(
            f"`{source.path}` has {columns_text(row)}: {found}, and {task.name} cannot learn from that. "
            f"Name the format or rename with `columns`. {task.name} reads {formats}"
        )
    return item


def to_canonical(
    raw: Sequence[Numbered], item: Format, *, system_prompt: str | None = None, with_tasks: bool = False
) -> list[Numbered]:
    """Rows in canonical columns, with their targets and, with `with_tasks`, their `task_id`.

    Raises:
        DataError: naming every row that the format cannot read (the first few in words).
    """
    rows, bad = [], []
    for origin, row in raw:
        try:
            canonical = item.convert(row, True) | (task_of(row) if with_tasks else {})
        except RowError as error:
            bad.append(f"{origin}: {error}")
            continue
        rows.append((origin, with_system_prompt(canonical, system_prompt)))
    if bad:
        raise DataError(_many(f"rows that are not in format `{item.name}` ({item.summary})", bad))
    return rows


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
    """The row with a system message, where it holds messages and has none."""
    messages = row.get("messages")
    if not system_prompt or not messages or messages[0]["role"] == "system":
        return row
    return row | {"messages": [{"role": "system", "content": system_prompt}, *messages]}


def split_rows(rows: list[Numbered], fraction: float, seed: int) -> tuple[list[Numbered], list[Numbered]]:
    """Part of the rows for validation, drawn by the seed, by label where rows have one each."""
    groups: dict[str, list[int]] = {}
    for index, (_, row) in enumerate(rows):
        label = row.get("label", "")
        groups.setdefault("" if isinstance(label, float | list) else str(label), []).append(index)
    chosen: set[int] = set()
    for name in sorted(groups):
        order = random.Random(f"{seed} {name}").sample(groups[name], len(groups[name]))
        chosen.update(order[: round(fraction * len(order))])
    if not chosen or len(chosen) == len(rows):
        raise DataError(f"`data.validation: {fraction}` of {len(rows)} rows leaves one side empty; use another fraction")
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    return kept, [rows[index] for index in sorted(chosen)]


def encode_rows(runtime: Runtime, rows: Sequence[Numbered], split: str, *, target: bool = True) -> list[Example]:
    """Encode rows; those that `truncation: drop` drops are left out.

    Raises:
        DataError: naming every row that is too long or cannot be encoded.
    """
    examples, bad, too_long = [], [], []
    for origin, row in rows:
        try:
            example = runtime.encode(row, origin, target=target)
        except TooLong as error:
            too_long.append((error.num_tokens, origin))
        except RowError as error:
            bad.append(f"{origin}: {error}")
        else:
            examples += [example] if example is not None else []
    if bad:
        raise DataError(_many(f"rows of {split} that cannot be used", bad))
    if too_long:
        longest = max(too_long)[0]
        heading = f"rows of {split} longer than {runtime.settings.max_length} tokens"
        if target:
            remedy = "`data.truncation` left, right or drop would cut or leave them out"
            heading += f" (`data.max_length`; {longest} would fit them all, {remedy})"
        raise DataError(_many(heading, [f"{origin}: {length} tokens" for length, origin in too_long]))
    if not examples:
        raise DataError(f"no row of {split} is left: `truncation: drop` dropped all {len(rows)}")
    return examples


def _many(heading: str, lines: Sequence[str]) -> str:
    more = f"\n  ... and {len(lines) - MAX_SHOWN} more" if len(lines) > MAX_SHOWN else ""
    return f"{len(lines)} {heading}:\n  " + "\n  ".join(lines[:MAX_SHOWN]) + more


def class_counts(data: Data) -> dict[str, int]:
    """Rows (or words) per class in train, for tasks with labels."""
    if not data.encoding.labels:
        return {}
    counts: Counter[str] = Counter()
    for example in data.train:
        counts.update(example.details["classes"])
    return {name: counts.get(name, 0) for name in data.encoding.labels}


def step_rows(num_rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the rows of one optimizer step (from 0): a pure function, so that resuming needs no replay.

    Every epoch is a permutation of its own; its last step holds what is left.
    """
    per_epoch = -(-num_rows // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = epoch_order(num_rows, seed, epoch)
    return order[place * batch_size : (place + 1) * batch_size]


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in one epoch; the last one used is kept."""
    key = (num_rows, seed, epoch)
    if key not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[key] = random.Random(f"{seed} {epoch}").sample(range(num_rows), num_rows)
    return _ORDERS[key]


def micro_batches(rows: Sequence[int], micro_batch_size: int, num_processes: int, process: int) -> list[list[int]]:
    """This process's micro-batches of a step: the same number of them in every process, some of them perhaps empty."""
    width = micro_batch_size * num_processes
    chunks = [rows[start : start + width] for start in range(0, len(rows), width)]
    # Dealt like cards, so that a short last chunk is spread over the processes.
    return [list(chunk[process::num_processes]) for chunk in chunks]


def fingerprints(data: Data) -> dict[str, str]:
    """sha256 of the encoded rows by split: two runs with equal ones trained on the same."""
    result = {}
    for name, examples in data.splits.items():
        digest = hashlib.sha256()
        for example in examples:
            task = () if example.task_id is None else (example.task_id,)
            digest.update(repr((example.inputs, example.labels, *task)).encode())
        result[f"data.{name}"] = digest.hexdigest()
    return result
