"""The rows of a run: prepared once, kept in the cache, and read from disk while training."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from peftkit.engine.audit import BadRows
from peftkit.engine.cache import cache_dir, cache_key, prune
from peftkit.engine.examples import Examples
from peftkit.engine.prepare import FINDINGS, HELD_OUT, SUMMARY, Model, Preparation
from peftkit.engine.records import Records
from peftkit.engine.settle import check_settled, settle_encoding
from peftkit.engine.stream import Stream, open_stream
from peftkit.errors import DataError, ResourceError
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.plan import Plan
from peftkit.run import new_folder
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import Example, Runtime, TooLong


@dataclass(frozen=True)
class Data:
    """Encoded rows by split, and how they were encoded.

    Attributes:
        train: rows to learn from.
        held_out: `validation` and `test` where the recipe has them.
        encoding: stored with the adapter, so that inference encodes alike.
        formats: the formats of the training sources.
        report: by split, what its rows are like and how many findings of each kind there are.
        classes: by split, rows (or words) of each class, for tasks with labels.
        fingerprints: sha256 of the encoded rows by split: two runs with equal ones trained on the same.
        renderings: a few training rows and what the tokenizer made of them; stored with the adapter.
        folder: where the rows and the findings are.
        is_cached: whether they were there already.
        holder: what keeps the folder alive.
    """

    train: Examples | Stream
    held_out: dict[str, Examples]
    encoding: Encoding
    formats: list[str]
    report: dict[str, Any]
    classes: dict[str, dict[str, int]]
    fingerprints: dict[str, str]
    renderings: list[dict[str, Any]]
    folder: Path
    is_cached: bool = False
    holder: Any = field(default=None, repr=False)

    @property
    def findings_path(self) -> Path:
        """One finding a line."""
        return self.folder / FINDINGS

    def held_out_rows(self, split: str) -> Sequence[tuple[str, CanonicalRow]]:
        """`file:row` and canonical row of what was held out, for tasks that generate answers."""
        return Records(self.folder / f"{split}.{HELD_OUT}")

    @property
    def sample(self) -> Examples:
        """Training rows that can be looked at in any order: all of them, or those of a stream that were checked."""
        return self.train.sample if isinstance(self.train, Stream) else self.train

    def num_findings(self, split: str, *kinds: str) -> int:
        """Findings of these kinds in a split."""
        return sum(self.report[split]["findings"].get(kind, 0) for kind in kinds)


def load_data(plan: Plan, model: Model, *, on_row: Callable[[], None] = lambda: None) -> Data:
    """Everything that the recipe's `data` names, encoded; from the cache where it is there.

    Args:
        plan: the plan.
        model: the tokenizer, and what is known of the model.
        on_row: told of every row that is encoded.

    Raises:
        RecipeError: `data.max_length` is more than the model takes, or the rows leave a setting without effect.
        DataError: naming the rows that cannot be trained on and why.
        ResourceError: the disk is full, or may not be written to.
    """
    data = plan.recipe.data
    assert data is not None, "rules refuse a recipe without data where data is needed"
    key = cache_key(plan, model) if data.cache and not data.streams else None
    if key is None:
        holder = tempfile.TemporaryDirectory(prefix="peftkit-rows-")
        with _explained(Path(holder.name)):
            Preparation(plan, model, Path(holder.name), on_row).run()
        return _open(plan, model, Path(holder.name), holder=holder)
    folder = cache_dir() / key
    with _explained(folder):
        prune()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of several processes one prepares, the others wait for it
            is_cached = (folder / SUMMARY).is_file()
            if not is_cached:
                with new_folder(folder) as temporary:
                    Preparation(plan, model, temporary, on_row).run()
            os.utime(folder)
    return _open(plan, model, folder, is_cached=is_cached)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into a ResourceError."""
    try:
        yield
    except OSError as error:
        what = f"tokenised rows cannot be written to {error.filename or folder}: {error.strerror or error}"
        raise ResourceError(
            f"{what}; HF_HOME names another place, `data.cache: false` keeps them in a temporary folder"
        ) from error


def _open(plan: Plan, model: Model, folder: Path, **facts: Any) -> Data:
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    encoding = Encoding.from_json(summary["encoding"])
    check_settled(plan, encoding)
    splits = {name: Examples.open(folder / f"{name}.examples") for name in summary["splits"]}
    checked = splits.pop("train")
    streams = plan.recipe.data is not None and plan.recipe.data.streams
    train = open_stream(plan, plan.task.runtime(model.tokenizer, encoding), checked) if streams else checked
    named = {name: summary[name] for name in ("formats", "classes", "fingerprints", "renderings")}
    return Data(train, splits, encoding, report=summary["splits"], folder=folder, **named, **facts)


def num_outputs(plan: Plan) -> int:
    """Outputs of the head, from the recipe or its rows; 0 where neither says."""
    data = plan.recipe.data
    if not plan.task.has_labels or data is None:
        return 0
    if data.labels and data.problem_type == "auto":
        return len(data.labels)
    with tempfile.TemporaryDirectory(prefix="peftkit-rows-") as folder:
        splits, _ = Preparation(plan, Model(None), Path(folder)).read_splits()
        return settle_encoding(plan, splits["train"]).num_outputs


def encode_rows(
    runtime: Runtime, rows: Sequence[tuple[str, CanonicalRow]], split: str, *, target: bool = True, drops: bool = False
) -> list[Example]:
    """Encode a few rows in memory; those that `truncation: drop` drops are left out and, with `drops`, those that are bad.

    Raises:
        DataError: naming every row that is too long or cannot be encoded.
    """
    examples: list[Example] = []
    bad, too_long = BadRows(f"rows of {split} that cannot be used"), BadRows("")
    for origin, row in rows:
        try:
            examples += runtime.encode(row, origin, target=target)
        except TooLong as error:
            too_long.add(f"{origin}: {error.num_tokens} tokens", error.num_tokens)
        except RowError as error:
            bad.add(f"{origin}: {error}")
    if bad.count and not drops:
        bad.fail()
    if too_long.count and not drops:
        limit = runtime.settings.max_length
        too_long.heading = f"rows of {split} longer than {limit} tokens"
        too_long.fail()
    if not examples:
        raise DataError(f"no row of {split} is left: all {len(rows)} were dropped")
    return examples
