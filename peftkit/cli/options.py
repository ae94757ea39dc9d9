"""Options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli import completion

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", autocompletion=completion.recipe_files)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the recipe; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else there.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model, where the one that the adapter names cannot be found.")]
Adapter = Annotated[Path, typer.Option("--adapter", help="Run directory, or any PEFT adapter folder.")]
Locked = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Refuse other packages, models or rows than this run (or its environment.json) has."),
]
Force = Annotated[bool, typer.Option("--force", help="With --resume: go on although recipe, rows, model or host have changed.")]
HangTimeout = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="End processes that make no progress for so long; 0: never.")
]
NumMachines = Annotated[int | None, typer.Option(min=1, help="Train on so many machines; default: the scheduler's.")]
# Of `evaluate`.
GenerationMetrics = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Generate answers: rouge,bleu,chrf,exact_match,answer,triples; default: as in the recipe."
    ),
]
AnswerPattern = Annotated[
    str | None, typer.Option(metavar="REGEX", help="Its one group is the answer within a text, such as '#### (.+)'.")
]
CompareBase = Annotated[
    bool, typer.Option("--compare-base", help="Measure the base model on the same rows, with intervals of the difference.")
]
Forgetting = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Texts (txt, or rows with `text`) to measure the rise of the loss on.")
]
Harness = Annotated[
    str | None, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness, for adapter and base: arc_easy,piqa.")
]
# Of `merge`.
Onto = Annotated[
    str | None,
    typer.Option(
        metavar="WEIGHTS",
        help="Of a quantised base: dequantized, those that it stands for (the default) | original | quantized | best",
    ),
]
OriginalBase = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The unquantised base, where the adapter does not name it.")
]
HarnessInclude = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder with further tasks of it.")]


def names_of(text: str) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
