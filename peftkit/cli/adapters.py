"""Commands about a trained adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.options import (
    Adapter,
    AnswerPattern,
    AsJson,
    Base,
    CompareBase,
    Forgetting,
    GenerationMetrics,
    Harness,
    HarnessInclude,
    Onto,
    OriginalBase,
    names_of,
)


def evaluate(  # noqa: PLR0913, PLR0917 - one parameter per option
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or any PEFT adapter folder.")],
    data: Annotated[Path | None, typer.Option(help="Rows to evaluate on; default: the run's test or validation rows.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write one line per row here too.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")] = None,
    generation_metrics: GenerationMetrics = None,
    answer_pattern: AnswerPattern = None,
    compare_base: CompareBase = False,
    forgetting: Forgetting = None,
    harness: Harness = None,
    harness_include: HarnessInclude = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Compute metrics and write predictions."""
    from peftkit import console
    from peftkit.commands import evaluate as command

    request = command.Request(
        run,
        data,
        base,
        predictions,
        batch_size,
        max_rows,
        generation_metrics=None if generation_metrics is None else names_of(generation_metrics),
        answer_pattern=answer_pattern,
        compare_base=compare_base,
        forgetting=forgetting,
        harness=names_of(harness or ""),
        harness_include=harness_include,
    )
    result = command.evaluate(request)
    console.print_json(result) if as_json else command.print_evaluation(result)


def infer(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter", metavar="[NAME=]DIR", help="Run directory, or any PEFT adapter folder; repeatable with names."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help='One prompt; for QUESTION_ANS a JSON object: {"question": "...", "context": "..."}.')
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="Rows to answer (jsonl, json, csv, tsv, parquet, txt).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the answers go, as JSON lines.")] = None,
    task_id: Annotated[
        str | None,
        typer.Option("--task-id", help="Task of the prompt, and of rows that name none, for adapters of several tasks."),
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of several adapters: who answers (--prompt: default all; --input: rows without a column `adapter`).",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; 0: the likeliest token.")
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, a file, or chat when neither is given."""
    from peftkit.commands import infer as command

    settings = command.settings_from(max_new_tokens, temperature)
    question = command.Question(prompt, source, output, task_id, use)
    command.infer(adapter, base, question, settings=settings, batch_size=batch_size, prints_json=as_json)


def merge(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16")] = "auto",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
    onto: Onto = None,
    original_base: OriginalBase = None,
    data: Annotated[Path | None, typer.Option(help="Rows that `--onto best` decides by.")] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base, checked against the adapter."""
    from peftkit import console
    from peftkit.commands import merge as command

    result = command.merge(command.Request(adapter, output, base, dtype, max_shard_size, onto, original_base, data))
    console.print_json(result) if as_json else command.print_merge(result)


def convert(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Folder of the LoRA adapter.")],
    rank: Annotated[float, typer.Option(help="Rank, or below 1 the share of the update's energy to keep.")] = 0.99,
    data: Annotated[Path | None, typer.Option(help="Rows to measure both adapters on.")] = None,
    to: Annotated[str, typer.Option(help="lora, the one method that others can be turned into.")] = "lora",
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Turn an adapter of another method into a LoRA, with the error of that."""
    from peftkit import console
    from peftkit.commands import convert as command

    result = command.convert(command.Request(adapter, output, base, rank, data, to))
    console.print_json(result) if as_json else command.print_conversion(result)
