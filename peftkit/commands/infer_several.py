"""`peftkit infer` with several named adapters on one base: compared, chosen row by row, or switched in a chat."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.commands.infer import Question, print_answer, reply, require_effect, say_room, write_answers
from peftkit.engine.generate import answer_batches, encode_prompts, file_row, prompt_row
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.several import BASE, Several, survey
from peftkit.engine.sources import read_rows, sound_rows
from peftkit.engine.unfinished import fingerprint
from peftkit.errors import DataError, RecipeError
from peftkit.recipe.schema import SourceSection
from peftkit.run import require_place
from peftkit.tasks.example import Example

ALL = "all"
_HELP = "Type a message; /adapters lists who can answer, /adapter NAME chooses, /new starts over, an empty line ends."


def infer_several(
    adapters: Mapping[str, Path],
    base: str | None,
    question: Question,
    *,
    settings: Mapping[str, Any],
    batch_size: int,
    prints_json: bool,
) -> None:
    """Answers of adapters by name; see `commands.infer.infer`."""
    if question.use not in (None, ALL, BASE, *adapters):
        raise RecipeError(f"--use {question.use}: there are {', '.join([*adapters, BASE, ALL])}")
    if question.prompt is None and question.use == ALL:
        raise RecipeError("--use all: goes with --prompt alone; each row of a file, and each message, is for one of them")
    if prints_json and question.prompt is None and question.source is None:
        raise RecipeError("--json needs --prompt or --input")
    for facts in survey(adapters, base).values():
        if settings:
            require_effect(facts, settings)
    if question.source is not None:
        num_rows = _answer_file(adapters, base, question, settings, batch_size)
        written = {"num_rows": num_rows, "output": str(question.output)}
        console.print_json(written) if prints_json else console.print_note(f"{num_rows} answers: {question.output}")
        return
    several = _load(adapters, base, question)
    if question.prompt is not None:
        _answer_prompt(several, question, settings, prints_json)
    else:
        _chat(several, question, settings)


def _load(adapters: Mapping[str, Path], base: str | None, question: Question) -> Several:
    several = Several(base)
    for name, path in adapters.items():
        several.load(name, path)
    if question.use == BASE and BASE not in several.names:
        raise RecipeError("--use base: the base has no head for this task, and cannot answer without an adapter")
    if question.task_id is not None and not any(several[name].loaded.runtime.settings.task_names for name in adapters):
        raise RecipeError("--task-id: has no effect: none of these adapters was trained on several tasks")
    return several


@contextlib.contextmanager
def _chosen(several: Several, name: str, task_id: str | None) -> Iterator[tuple[LoadedAdapter, str | None]]:
    """An adapter, and the task for it, where it knows several."""
    with several[name].chosen() as loaded:
        yield loaded, task_id if loaded.runtime.settings.task_names else None


def _answer_prompt(several: Several, question: Question, settings: Mapping[str, Any], prints_json: bool) -> None:
    """The answer of one of them, or of all one after the other."""
    assert question.prompt is not None
    names = several.names if question.use in (None, ALL) else [question.use]
    answers = []
    for name in names:
        with _chosen(several, name, question.task_id) as (loaded, task_id):
            row = prompt_row(loaded, question.prompt, task_id=task_id)
            examples = encode_prompts(loaded, [("--prompt", row)])
            say_room(loaded, examples, settings)
            answers.append({"adapter": name, **next(answer_batches(loaded, examples, settings, batch_size=1))[0]})
        if not prints_json:
            console.print_text(f"[{name}]")
            print_answer(answers[-1])
    if prints_json:
        console.print_json({"prompt": question.prompt, "answers": answers})


def _answer_file(
    adapters: Mapping[str, Path], base: str | None, question: Question, settings: Mapping[str, Any], batch_size: int
) -> int:
    """Answer each row of a file by the adapter that its column `adapter` names, or else --use; how many rows there are."""
    assert question.source is not None
    assert question.output is not None
    require_place(question.output, "--output")
    raw = sound_rows(read_rows(SourceSection(path=str(question.source.absolute())), Path()))
    names = _names_of_rows(raw, [*adapters, BASE], question.use)
    several = _load(adapters, base, question)
    if BASE in names and BASE not in several.names:
        raise DataError(f"{raw[names.index(BASE)][0]}: `adapter` is `base`, which has no head for this task")
    examples = _encoded(several, raw, names, question.task_id)
    folders = [several[name].loaded.folder for name in adapters]
    job = " ".join(fingerprint(folder, [row for _, row in raw], [question.use, base, dict(settings)]) for folder in folders)
    rows = [row | {"adapter": name} for (_, row), name in zip(raw, names, strict=True)]
    write_answers(
        question.output,
        job,
        rows,
        lambda done: _answers(several, examples, names, settings, batch_size=batch_size, done=done),
    )
    return len(raw)


def _names_of_rows(raw: Sequence[tuple[str, Mapping[str, Any]]], known: Sequence[str], default: str | None) -> list[str]:
    """Who answers each row.

    Raises:
        DataError: naming the first row that does not say, or names nobody.
    """
    names = []
    for origin, row in raw:
        name = default if row.get("adapter") is None else row["adapter"]
        if name is None:
            raise DataError(
                f"{origin}: no `adapter` says who answers; there are {', '.join(known)}; --use names one for all rows"
            )
        if name not in known:
            raise DataError(f"{origin}: `adapter` is {name!r}; there are {', '.join(known)}")
        names.append(str(name))
    return names


def _encoded(
    several: Several, raw: Sequence[tuple[str, Mapping[str, Any]]], names: Sequence[str], task_id: str | None
) -> list[Example]:
    found: dict[int, Example] = {}
    for name in dict.fromkeys(names):
        places = [place for place, other in enumerate(names) if other == name]
        with _chosen(several, name, task_id) as (loaded, task):
            rows = []
            for place in places:
                origin, row = raw[place]
                plain = {key: value for key, value in row.items() if key != "adapter"}
                rows.append((origin, file_row(loaded, plain, origin, task)))
            found |= dict(zip(places, encode_prompts(loaded, rows), strict=True))
    return [found[place] for place in range(len(raw))]


def _answers(
    several: Several,
    examples: Sequence[Example],
    names: Sequence[str],
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    done: Collection[int],
) -> Iterator[dict[int, dict[str, Any]]]:
    """Answers by the numbers of their rows, those of one adapter after those of another."""
    for name in dict.fromkeys(names):
        places = [place for place, other in enumerate(names) if other == name]
        own = [examples[place] for place in places]
        with several[name].chosen() as loaded:
            say_room(loaded, own, settings)
            skipped = {number for number, place in enumerate(places) if place in done}
            for batch in answer_batches(loaded, own, settings, batch_size=batch_size, done=skipped):
                yield {places[number]: answer for number, answer in batch.items()}


def _chat(several: Several, question: Question, settings: Mapping[str, Any]) -> None:
    """Answer what is typed by the adapter that is chosen; all of them read the same history."""
    name = question.use or several.names[0]
    history: list[dict[str, str]] = []
    if console.is_interactive():
        console.print_note(_HELP)
    with contextlib.suppress(EOFError):
        while text := console.ask(f"{name}> ").strip():
            if text == "/new":
                history.clear()
            elif text == "/adapters":
                console.print_note("\n".join(f"{'*' if other == name else ' '} {other}" for other in several.names))
            elif text.split()[0] == "/adapter":
                name = _switched(text.partition(" ")[2].strip(), name, several.names)
            else:
                with _chosen(several, name, question.task_id) as (loaded, task_id):
                    answer = reply(loaded, prompt_row(loaded, text, history, task_id=task_id), settings)
                history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _switched(wanted: str, name: str, names: Sequence[str]) -> str:
    """The adapter that is wanted, if there is one of this name; the present one otherwise."""
    if wanted not in names:
        console.print_note(f"there is no adapter `{wanted}`; there are {', '.join(names)}")
        return name
    return wanted
