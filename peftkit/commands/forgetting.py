"""A process that measures what a run has forgotten: the loss on other text, with its adapter and of its base model alone.

`python -m peftkit.commands.forgetting RUN ROWS OUTPUT` writes `{"loss", "base_loss", "forgetting"}`: forgetting is by how much
the loss per token has grown.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peftkit.engine.data import encode_rows
from peftkit.engine.evaluate import score_examples
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.model import load_base_model, set_pad_token
from peftkit.engine.rows import RowReader
from peftkit.engine.sources import sound_rows
from peftkit.engine.step import Step
from peftkit.recipe.schema import SourceSection
from peftkit.run import write_json

BATCH_SIZE = 16


def forgetting(run: Path, rows: Path) -> dict[str, float]:
    """How much the loss on rows has grown by training; long rows are cut.

    Raises:
        DataError, LoadError: the rows or the adapter cannot be read.
    """
    loaded = load_adapter(run)
    settings = dataclasses.replace(loaded.runtime.settings, truncation="right")
    loaded = dataclasses.replace(loaded, runtime=loaded.task.runtime(loaded.runtime.tokenizer, settings))
    reader = RowReader(loaded.task, Path(), None, bool(settings.task_names))
    examples = encode_rows(loaded.runtime, sound_rows(reader.open([SourceSection(path=str(rows))]).rows(), ""), "forgetting")
    after = _loss(loaded, loaded.model, examples)
    # The facts of no method: the base itself, also where the run has trained all of it.
    base, _ = load_base_model(dataclasses.replace(loaded.facts, method="").base_model(loaded.folder), settings)
    set_pad_token(base, loaded.runtime.tokenizer)
    before = _loss(loaded, base.to(loaded.device).eval(), examples)
    return {"loss": after, "base_loss": before, "forgetting": after - before}


def _loss(loaded: LoadedAdapter, model: Any, examples: list[Any]) -> float:
    with loaded.inference():
        results = score_examples(Step(model, loaded.runtime, None), examples, batch_size=BATCH_SIZE, device=loaded.device)
    loss: float = loaded.runtime.summarise(results)["loss"]
    return loss


def main(run: str, rows: str, output: str) -> None:
    """Measure and write."""
    write_json(Path(output), forgetting(Path(run), Path(rows)))


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
