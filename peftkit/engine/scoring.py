"""Rows of a file as one number for a model: what decides between models that should be the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peftkit.engine.data import encode_rows
from peftkit.engine.evaluate import flat_metrics
from peftkit.engine.facts import AdapterFacts
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.measure import Rows, measure
from peftkit.engine.model import read_tokenizer
from peftkit.engine.rows import Row, RowReader
from peftkit.recipe.schema import SourceSection
from peftkit.tasks import TASKS
from peftkit.tasks.chat import freeze_date
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import Example
from peftkit.tasks.generations import AnswerSettings
from peftkit.tasks.generations_torch import AnswerScorer

BATCH_SIZE = 16


def rows_of_file(facts: AdapterFacts, path: Path) -> list[Row]:
    """Rows of a file in the format of the training rows, their columns renamed alike, each with its place.

    Raises:
        DataError: naming those that cannot be read.
    """
    with_tasks = bool(facts.encoding and facts.encoding.task_names)
    reader = RowReader(TASKS[facts.task], Path(), facts.system_prompt, with_tasks, rename=facts.rename)
    return reader.open([SourceSection(path=str(path.absolute()), format=facts.format)]).sound_rows()


def read_examples(folder: Path, facts: AdapterFacts, path: Path) -> list[Example]:
    """The rows of a file, in the format and with the columns and tokens of training; no weights are needed.

    Raises:
        DataError: rows that cannot be read or are too long.
        LoadError: there is no tokenizer.
    """
    encoding = facts.encoding or Encoding(max_length=4096, truncation="right")
    tokenizer = read_tokenizer(str(folder) if (folder / "tokenizer_config.json").is_file() else facts.base)
    freeze_date(tokenizer, encoding.template_date)
    return encode_rows(TASKS[facts.task].runtime(tokenizer, encoding), rows_of_file(facts, path), path.name)


def deciding_metric(loaded: LoadedAdapter) -> tuple[str, bool]:
    """The metric that training compares adapters by, and whether more of it is better."""
    name = loaded.task.default_metric_for(loaded.runtime.settings)
    return name, loaded.task.metrics[name]


def score(loaded: LoadedAdapter, examples: Sequence[Example], on_batch: Callable[[int], None]) -> dict[str, float]:
    """Single-number metrics of an adapter's model."""
    rows = Rows(examples, [], AnswerScorer(AnswerSettings()), BATCH_SIZE, on_batch)
    return flat_metrics(measure(loaded, rows).metrics)


def alone_like(loaded: LoadedAdapter, model: PreTrainedModel) -> LoadedAdapter:
    """A stand-alone model in the place of an adapter's: the same rows and tokens, in the dtype of its weights."""
    dtype = str(model.dtype).removeprefix("torch.")
    facts: Any = dataclasses.replace(loaded.facts, dtype=dtype, mixed_precision="no")
    return dataclasses.replace(loaded, model=model.eval(), facts=facts)
