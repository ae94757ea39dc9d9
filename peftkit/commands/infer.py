"""`peftkit infer`: one answer, a file of answers, or a chat."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.engine.data import encode_rows
from peftkit.engine.generate import answer_rows, file_row, generate, prompt_row
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.sources import read_rows
from peftkit.errors import RecipeError
from peftkit.recipe.schema import SourceSection
from peftkit.run import write_text


@dataclass(frozen=True)
class Question:
    """What is to be answered.

    Attributes:
        prompt: one prompt.
        source: file of rows to answer; neither this nor a prompt: what is typed.
        output: file of their answers.
    """

    prompt: str | None = None
    source: Path | None = None
    output: Path | None = None


def answer_prompt(adapter: Path, base: str | None, prompt: str, settings: Mapping[str, Any], as_json: bool) -> None:
    """Answer one prompt."""
    loaded = load_adapter(adapter, base)
    answer = next(answer_rows(loaded, [("--prompt", prompt_row(loaded, prompt))], settings, 1))
    if as_json:
        console.print_json({"prompt": prompt, **answer})
    elif "probabilities" in answer:
        console.print_text(answer["prediction"])
        ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
        console.print_table("", ["label", "probability"], ranked)
    else:
        console.print_text(answer["prediction"])


def answer_file(
    adapter: Path, base: str | None, source: Path, output: Path, settings: Mapping[str, Any], batch_size: int
) -> int:
    """Answer every row of a file; the output has the input's columns plus `prediction`."""
    raw = read_rows(SourceSection(path=str(source.absolute())), Path())
    loaded = load_adapter(adapter, base)
    rows = [(origin, file_row(loaded, row, origin)) for origin, row in raw]
    with console.progress(len(rows), "answering") as advance:
        answers = list(answer_rows(loaded, rows, settings, batch_size, advance))
    lines = [json.dumps(row | answer, ensure_ascii=False) for (_, row), answer in zip(raw, answers, strict=True)]
    write_text(output, "".join(f"{line}\n" for line in lines))
    return len(lines)


def chat(adapter: Path, base: str | None, settings: Mapping[str, Any]) -> None:
    """Answer what is typed, with history, streaming; an empty line or end of input ends it, `/new` forgets the history."""
    loaded = load_adapter(adapter, base)
    history: list[dict[str, str]] = []
    if console.is_interactive():
        console.print_note("Type a message; /new starts over, an empty line ends.")
    with contextlib.suppress(EOFError):
        while text := console.ask("> ").strip():
            if text == "/new":
                history.clear()
                continue
            answer = _reply(loaded, text, history, settings)
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _reply(loaded: LoadedAdapter, text: str, history: list[dict[str, str]], settings: Mapping[str, Any]) -> str:
    row = prompt_row(loaded, text, history)
    if not loaded.task.generates:
        answer = next(answer_rows(loaded, [("input", row)], settings, 1))
        console.print_text(f"{answer['prediction']} ({answer['probabilities'][answer['prediction']]:.1%})")
        return str(answer["prediction"])
    examples = encode_rows(loaded.prompts, [("input", row)], "the chat", target=False)
    answers = generate(loaded, list(islice(examples, 1)), settings, console.print_part)
    console.print_text("")
    return answers[0]


def settings_from(max_new_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    """Generation settings of the command line; what is not given stays as the recipe has it."""
    settings: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        settings |= {"do_sample": temperature > 0, "temperature": temperature or None}
    return settings


def infer(
    adapter: Path, base: str | None, question: Question, *, settings: Mapping[str, Any], batch_size: int, as_json: bool
) -> None:
    """One answer, a file of answers, or a chat when neither is given."""
    prompt, source, output = question.prompt, question.source, question.output
    if prompt is not None and source is not None:
        raise RecipeError("--prompt and --input: give one of the two")
    if (source is None) != (output is None):
        raise RecipeError("--input and --output go together: a file of rows, and where their answers go")
    if prompt is not None:
        answer_prompt(adapter, base, prompt, settings, as_json)
    elif source is not None and output is not None:
        num_rows = answer_file(adapter, base, source, output, settings, batch_size)
        if as_json:
            console.print_json({"num_rows": num_rows, "output": str(output)})
        else:
            console.print_note(f"{num_rows} answers: {output}")
    elif as_json:
        raise RecipeError("--json needs --prompt or --input")
    else:
        chat(adapter, base, settings)
