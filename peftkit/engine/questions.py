"""Held-out rows as questions: the prompt that a model is given, and the row's own answer to compare its with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from peftkit.engine.audit import BadRows
from peftkit.engine.generate import answer_batches
from peftkit.engine.loaded import LoadedAdapter
from peftkit.formats.base import CanonicalRow, RowError
from peftkit.tasks.example import Example, Runtime, TooLong
from peftkit.tasks.generations import question_of
from peftkit.tasks.generations_torch import AnswerScorer


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        example: its tokens, with the `file:row` that it comes from.
        prompt: the text of these tokens.
        reference: the row's own answer.
    """

    example: Example
    prompt: str
    reference: str


def questions_of(
    rows: Iterable[tuple[str, CanonicalRow]], prompts: Runtime, split: str, scorer: AnswerScorer
) -> list[Question]:
    """The questions that rows put.

    Args:
        rows: `file:row` and canonical row.
        prompts: what makes tokens of a prompt, and refuses one that is too long for the model.
        split: their name, for messages.
        scorer: refuses answers that it could not compare.

    Raises:
        DataError: naming the rows that have no answer, or none that can be compared, and those that are too long.
    """
    questions, bad = [], BadRows(f"rows of {split} that cannot be asked and compared")
    for origin, row in rows:
        try:
            asked, reference = question_of(row)
            scorer.check(reference)
            example = prompts.encode(asked, origin, target=False)[0]
        except RowError as error:
            bad.add(f"{origin}: {error}")
        except TooLong as error:
            bad.add(f"{origin}: the prompt has {error.num_tokens} tokens, the model takes {prompts.settings.max_length}")
        else:
            questions.append(Question(example, prompts.tokenizer.decode(example.inputs["input_ids"]), reference))
    if bad.count:
        bad.fail()
    return questions


def answer_questions(
    loaded: LoadedAdapter,
    questions: Sequence[Question],
    scorer: AnswerScorer,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """One result per question, in their order, gathered from all processes, each of which answers its share.

    Args:
        loaded: the model; its recipe's generation settings are taken.
        questions: what is asked.
        scorer: compares the answers.
        batch_size: prompts per pass.
        on_batch: told how many are answered.
    """
    world, rank = 1, 0
    if torch.distributed.is_initialized():
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mine = range(rank, len(questions), world)
    results = []
    with _own_random_numbers(loaded.facts.seed):
        examples = [questions[place].example for place in mine]
        for batch in answer_batches(loaded, examples, {}, batch_size=batch_size):
            for number, answer in batch.items():
                question = questions[mine[number]]
                asked = {"index": mine[number], "row": question.example.origin, "prompt": question.prompt}
                results.append(asked | scorer.score(answer["prediction"], question.reference))
            on_batch(len(batch))
    return sorted(gather_object(results) if world > 1 else results, key=lambda result: result["index"])


@contextlib.contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Where answers are sampled: the same ones each time, and training's own random numbers go on as they would."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
