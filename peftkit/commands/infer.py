"""`peftkit infer`: one answer, a file of answers, or a chat."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.adapters import adapter_folder
from peftkit.engine.data import encode_rows
from peftkit.engine.facts import AdapterFacts, read_facts
from peftkit.engine.generate import (
    answer_batches,
    answer_rows,
    encode_prompts,
    file_row,
    generate,
    generation_config,
    note_of_room,
    prompt_row,
)
from peftkit.engine.guard import answering_remedies, explain_exhaustion, memory_text
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.several import is_path, parse_names
from peftkit.engine.sources import read_rows, sound_rows
from peftkit.engine.unfinished import UnfinishedAnswers, fingerprint
from peftkit.errors import RecipeError, Stopped
from peftkit.recipe.schema import SourceSection
from peftkit.run import require_place, write_text
from peftkit.tasks import TASKS
from peftkit.tasks.example import Example


@dataclass(frozen=True)
class Question:
    """What is to be answered.

    Attributes:
        prompt: one prompt.
        source: file of rows to answer; neither this nor a prompt: what is typed.
        output: file of their answers.
        task_id: the task of a prompt, and of rows that name none; for adapters that know several.
        use: who answers, of several adapters; None: see there.
    """

    prompt: str | None = None
    source: Path | None = None
    output: Path | None = None
    task_id: str | None = None
    use: str | None = None


def _load(adapter: Path, base: str | None, question: Question, settings: Mapping[str, Any]) -> LoadedAdapter:
    if settings:
        require_effect(read_facts(adapter_folder(adapter), base), settings)
    loaded = load_adapter(adapter, base)
    if question.task_id is not None and not loaded.runtime.settings.task_names:
        raise RecipeError("--task-id: has no effect: this adapter was not trained on several tasks")
    return loaded


def require_effect(facts: AdapterFacts, settings: Mapping[str, Any]) -> None:
    """Refuse settings of writing for a task that writes nothing, before its model is loaded."""
    if facts.task in TASKS and not TASKS[facts.task].generates:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in settings if name != "do_sample")
        writing = ", ".join(name for name, task in TASKS.items() if task.generates)
        raise RecipeError(
            f"{options}: no effect: this adapter is for {facts.task}, and only {writing} write text; leave it out"
        )


def answer_prompt(adapter: Path, base: str | None, question: Question, settings: Mapping[str, Any], prints_json: bool) -> None:
    """Answer one prompt."""
    loaded = _load(adapter, base, question, settings)
    assert question.prompt is not None
    row = prompt_row(loaded, question.prompt, task_id=question.task_id)
    examples = encode_prompts(loaded, [("--prompt", row)])
    say_room(loaded, examples, settings)
    answer = next(answer_batches(loaded, examples, settings, batch_size=1))[0]
    if prints_json:
        console.print_json({"prompt": question.prompt, **answer})
    else:
        print_answer(answer)


def say_room(loaded: LoadedAdapter, examples: Sequence[Example], settings: Mapping[str, Any]) -> None:
    """Say which answers can be cut short, if any."""
    if note := note_of_room(loaded, examples, settings):
        console.print_note(note)


def print_answer(answer: Mapping[str, Any]) -> None:
    """A prediction and what goes with it, for people."""
    prediction = answer["prediction"]
    if isinstance(prediction, str):
        console.print_text(prediction or "(no answer)")
    else:
        console.print_text(json.dumps(prediction, ensure_ascii=False))
    if "probabilities" in answer:
        ranked = sorted(answer["probabilities"].items(), key=lambda item: -item[1])
        console.print_table("", ["label", "probability"], ranked)
    if answer.get("entities"):
        rows = [(entity["type"], entity["text"], entity["start"], entity["end"]) for entity in answer["entities"]]
        console.print_table("", ["type", "text", "start", "end"], rows)
    if "score" in answer:
        console.print_table("", ["score", "start", "end"], [(answer["score"], str(answer["start"]), str(answer["end"]))])


def answer_file(
    adapter: Path, base: str | None, question: Question, settings: Mapping[str, Any], batch_size: int
) -> tuple[int, Path]:
    """Answer every row of a file; the output has the input's columns plus `prediction`. Returns rows and output."""
    assert question.source is not None
    assert question.output is not None
    require_place(question.output, "--output")
    raw = sound_rows(read_rows(SourceSection(path=str(question.source.absolute())), Path()))
    loaded = _load(adapter, base, question, settings)
    rows = [(origin, file_row(loaded, row, origin, question.task_id)) for origin, row in raw]
    examples = encode_prompts(loaded, rows)
    say_room(loaded, examples, settings)
    own = [row for _, row in raw]
    write_answers(
        question.output,
        fingerprint(loaded.folder, own, [question.task_id, base, dict(settings)]),
        own,
        lambda done: answer_batches(loaded, examples, settings, batch_size=batch_size, done=done),
    )
    return len(raw), question.output


def write_answers(
    output: Path,
    job: str,
    rows: Sequence[Mapping[str, Any]],
    answers_of: Callable[[Collection[int]], Iterator[dict[int, dict[str, Any]]]],
) -> None:
    """Answer rows and write them with their answers, going on where the same job was interrupted.

    Args:
        output: the file.
        job: see `engine.unfinished.fingerprint`.
        rows: what is written of each row besides its answer.
        answers_of: numbers of rows that are answered -> answers of the others, by the numbers of their rows.
    """
    with UnfinishedAnswers(output, job) as found, console.progress(len(rows), "answering") as advance:
        if found.answers:
            console.print_note(f"{len(found.answers)} of {len(rows)} rows are answered already: {found.path}")
            advance(len(found.answers))
        try:
            for batch in answers_of(found.answers.keys()):
                found.add(batch)
                advance(len(batch))
        except KeyboardInterrupt as error:
            what = f"interrupted after {len(found.answers)} of {len(rows)} rows; the same command goes on with the others"
            raise Stopped(what, 130) from error
        whole = (dict(row) | found.answers[number] for number, row in enumerate(rows))
        write_text(output, "".join(f"{json.dumps(row, ensure_ascii=False, default=_as_json)}\n" for row in whole))
        found.remove()


def _as_json(value: Any) -> Any:
    """A value of a Parquet or Arrow file that JSON does not know: times as ISO 8601, bytes as base64, others as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def chat(adapter: Path, base: str | None, question: Question, settings: Mapping[str, Any]) -> None:
    """Answer what is typed, with history, streaming; an empty line or end of input ends it, `/new` forgets the history."""
    loaded = _load(adapter, base, question, settings)
    history: list[dict[str, str]] = []
    if console.is_interactive():
        console.print_note("Type a message; /new starts over, an empty line ends.")
    with contextlib.suppress(EOFError):
        while text := console.ask("> ").strip():
            if text == "/new":
                history.clear()
                continue
            answer = reply(loaded, prompt_row(loaded, text, history, task_id=question.task_id), settings)
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def reply(loaded: LoadedAdapter, row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Print an answer, text as it comes; returns it for the history."""
    if not loaded.task.generates:
        answer = next(answer_rows(loaded, [("input", dict(row))], settings, 1))
        name = answer["prediction"]
        if isinstance(name, str) and "probabilities" in answer:
            console.print_text(f"{name} ({answer['probabilities'][name]:.1%})")
        else:
            print_answer(answer)
        return str(name)
    examples = encode_rows(loaded.prompts, [("input", dict(row))], "the chat", target=False)
    say_room(loaded, examples, settings)
    answers = generate(loaded, list(islice(examples, 1)), generation_config(loaded, settings), console.print_part)
    console.print_text("")
    return answers[0]


def settings_from(max_new_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    """Generation settings of the command line; what is not given stays as the recipe has it."""
    settings: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if temperature is not None:
        settings |= {"do_sample": temperature > 0, "temperature": temperature or None}
    return settings


def infer(
    adapters: Sequence[str],
    base: str | None,
    question: Question,
    *,
    settings: Mapping[str, Any],
    batch_size: int,
    prints_json: bool,
) -> None:
    """One answer, a file of answers, or a chat when neither is given; of one adapter or of several with names."""
    prompt, source, output = question.prompt, question.source, question.output
    if prompt is not None and source is not None:
        raise RecipeError("--prompt and --input: give one of the two")
    if (source is None) != (output is None):
        raise RecipeError("--input and --output go together: a file of rows, and where their answers go")
    size = batch_size if source is not None else 1
    with explain_exhaustion(
        lambda: memory_text(
            f"while answering {size} rows at a time" if size > 1 else "while answering", answering_remedies(size)
        )
    ):
        if len(adapters) == 1 and is_path(adapters[0]):
            if question.use is not None:
                raise RecipeError("--use: has no effect on one adapter without a name; give it one: --adapter name=DIR")
            _infer(Path(adapters[0]), base, question, settings=settings, batch_size=batch_size, prints_json=prints_json)
            return
        named = parse_names(adapters)
        from peftkit.commands.infer_several import infer_several

        infer_several(named, base, question, settings=settings, batch_size=batch_size, prints_json=prints_json)


def _infer(
    adapter: Path, base: str | None, question: Question, *, settings: Mapping[str, Any], batch_size: int, prints_json: bool
) -> None:
    prompt, source, output = question.prompt, question.source, question.output
    if prompt is not None:
        answer_prompt(adapter, base, question, settings, prints_json)
    elif source is not None and output is not None:
        num_rows, output = answer_file(adapter, base, question, settings, batch_size)
        if prints_json:
            console.print_json({"num_rows": num_rows, "output": str(output)})
        else:
            console.print_note(f"{num_rows} answers: {output}")
    elif prints_json:
        raise RecipeError("--json needs --prompt or --input")
    else:
        chat(adapter, base, question, settings)
