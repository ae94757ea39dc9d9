"""Conversations as tokens: exactly the answers are learned, with their end, whatever the template."""

from __future__ import annotations

import dataclasses
import sys
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.formats.base import RowError
from peftkit.tasks.causal_lm_torch import Runtime
from peftkit.tasks.chat import default_chat_template, freeze_date, says_date, template_variables
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Example
from tests.templates import CHATML, END, GENERATION, TEMPLATES, THINK, template_tokenizer

_LETTERS = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="<[|")
TEXTS = st.text(st.one_of(_LETTERS, st.sampled_from("ab \n\t.é字😀")), min_size=1, max_size=25).map(str.strip).filter(bool)


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """A system turn, perhaps, and one to four rounds of question and answer."""
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages += [{"role": "user", "content": draw(TEXTS)}, {"role": "assistant", "content": draw(TEXTS)}]
    return messages


@cache
def runtime_of(template: str | None, **stated: Any) -> Runtime:
    """The runtime of a tokenizer with this template; without one, with the default."""
    tokenizer = template_tokenizer(template)
    if template is None:
        tokenizer.chat_template = default_chat_template(tokenizer)
    kwargs = {"enable_thinking": False} if stated.pop("thinks", True) is False else {}
    return Runtime(tokenizer, Encoding(sys.maxsize, chat_template_kwargs=kwargs, **stated))


def encode(runtime: Runtime, messages: list[dict[str, Any]], **row: Any) -> Example:
    """The one example of a conversation."""
    (example,) = runtime.encode({"messages": messages, **row}, "rows:1")
    return example


def learned(runtime: Runtime, example: Example) -> str:
    """The text of all tokens that are learned."""
    return runtime.tokenizer.decode([label for label in example.labels if label != IGNORE_INDEX])


def answers(messages: list[dict[str, Any]]) -> list[str]:
    """The answers."""
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_exactly_the_answers_and_their_end_are_learned(name: str, messages: list[dict[str, Any]]) -> None:
    runtime = runtime_of(TEMPLATES[name])
    example = encode(runtime, messages)
    assert learned(runtime, example) == "".join(answer + END[name] for answer in answers(messages))


@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_the_default_template_too_learns_exactly_the_answers(messages: list[dict[str, Any]]) -> None:
    runtime = runtime_of(None)
    assert learned(runtime, encode(runtime, messages)) == "".join(answer + "</s>" for answer in answers(messages))


@pytest.mark.parametrize("thinks", [True, False])
@given(messages=conversations())
@settings(max_examples=60, deadline=None)
def test_an_empty_think_block_is_not_learned(thinks: bool, messages: list[dict[str, Any]]) -> None:
    runtime = runtime_of(THINK, thinks=thinks, train_on="last_turn")
    example = encode(runtime, messages)
    assert learned(runtime, example) == answers(messages)[-1] + "<|im_end|>"
    assert ("think block" in str(example.notes)) == thinks


def test_what_was_thought_is_learned() -> None:
    runtime = runtime_of(THINK, train_on="last_turn")
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "easy"}]
    assert learned(runtime, encode(runtime, messages)) == "<think>\neasy\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=conversations())
@settings(max_examples=30, deadline=None)
def test_the_tokens_before_the_last_answer_are_those_of_the_prompt(name: str, messages: list[dict[str, Any]]) -> None:
    runtime = runtime_of(TEMPLATES[name], train_on="last_turn")
    example = encode(runtime, messages)
    first = next(place for place, label in enumerate(example.labels) if label != IGNORE_INDEX)
    (prompt,) = runtime.encode({"messages": messages[:-1]}, "rows:1", target=False)
    assert example.inputs["input_ids"][:first] == prompt.inputs["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_begins_with_two_bos(name: str) -> None:
    example = encode(runtime_of(TEMPLATES[name]), ROUNDS)
    assert example.inputs["input_ids"].count(1) <= 1


ROUNDS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def weighted(*weights: float | None) -> list[dict[str, Any]]:
    """The two rounds, their answers with these weights."""
    turns = iter(weights)
    return [
        turn | ({"weight": weight} if turn["role"] == "assistant" and (weight := next(turns)) is not None else {})
        for turn in ROUNDS
    ]


@pytest.mark.parametrize(
    ("train_on", "messages", "text"),
    [
        ("completion", ROUNDS, "two<|im_end|>four<|im_end|>"),
        ("assistant", ROUNDS, "two<|im_end|>four<|im_end|>"),
        ("last_turn", ROUNDS, "four<|im_end|>"),
        ("completion", weighted(0.0, None), "four<|im_end|>"),
        ("completion", weighted(1.0, 0.0), "two<|im_end|>"),
        ("last_turn", weighted(0.0, 0.5), "four<|im_end|>"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["prefixes", "blocks"])
def test_train_on_and_weights_choose_the_turns(template: str, train_on: str, messages: Any, text: str) -> None:
    runtime = runtime_of(template, train_on=train_on)
    assert learned(runtime, encode(runtime, messages)) == text


def test_a_weight_counts_the_tokens_of_its_turn() -> None:
    runtime = runtime_of(CHATML)
    plain, half = encode(runtime, ROUNDS), encode(runtime, weighted(0.5, 2.0))
    assert half.weights is not None
    assert {weight for weight in half.weights if weight} == {0.5, 2.0}
    numbers = [len(runtime.tokenizer(f"{word}<|im_end|>", add_special_tokens=False)["input_ids"]) for word in ("two", "four")]
    assert half.num_targets == 0.5 * numbers[0] + 2.0 * numbers[1]
    assert (plain.num_targets, plain.num_target_tokens, half.num_target_tokens) == (sum(numbers),) * 3


def test_all_tokens_are_learned_where_that_is_wanted() -> None:
    example = encode(runtime_of(CHATML, train_on="all"), ROUNDS)
    assert example.labels == example.inputs["input_ids"]


@pytest.mark.parametrize(
    ("stated", "row", "words"),
    [
        ({"train_on": "all"}, {"messages": weighted(0.5, None)}, "has no effect with `train_on: all`"),
        ({"train_on": "assistant"}, {"prompt": "a", "completion": "b"}, "no assistant turns"),
        ({"train_on": "assistant"}, {"text": "a"}, "no assistant turns"),
        ({"train_on": "all"}, {"segments": [{"text": "a", "train": True}]}, "the row itself says what is learned"),
        ({"train_on": "last_turn"}, {"messages": weighted(None, 0.0)}, "no token is left to learn"),
    ],
)
def test_what_would_learn_nothing_or_have_no_effect_is_refused(stated: Any, row: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        runtime_of(CHATML, **stated).encode(row, "rows:1")


def test_a_template_that_renders_earlier_turns_differently_is_refused_but_for_the_last_turn() -> None:
    with pytest.raises(RowError, match=r"turn 2 \(assistant\) cannot be told from the rest.*train_on: last_turn"):
        encode(runtime_of(THINK), ROUNDS)


GREETING = [{"role": "assistant", "content": "hello"}, *ROUNDS[:2]]


def test_an_answer_to_nothing_is_learned_where_the_template_marks_it() -> None:
    runtime = runtime_of(GENERATION)
    assert learned(runtime, encode(runtime, GREETING)) == "hello<|im_end|>two<|im_end|>"
    assert learned(runtime, encode(runtime, GREETING[:1])) == "hello<|im_end|>"


def test_an_answer_to_nothing_is_refused_elsewhere_with_what_to_do() -> None:
    with pytest.raises(RowError, match=r"turn 1 is an assistant turn that answers nothing.*`train: false`"):
        encode(runtime_of(CHATML), GREETING)
    runtime = runtime_of(CHATML)
    assert learned(runtime, encode(runtime, [GREETING[0] | {"weight": 0.0}, *GREETING[1:]])) == "two<|im_end|>"


def test_blocks_that_are_not_one_for_each_answer_are_refused() -> None:
    template = GENERATION.replace("{% for message", "{% generation %}x{% endgeneration %}{% for message", 1)
    with pytest.raises(RowError, match=r"marks 3 part\(s\) .* which has 2 assistant turn"):
        encode(runtime_of(template), ROUNDS)


def test_a_block_after_another_text_than_the_prompt_is_noted() -> None:
    template = GENERATION.replace("{% generation %}", "<think>\n\n</think>\n\n{% generation %}")
    assert "after another text" in str(encode(runtime_of(template), ROUNDS).notes)
    assert encode(runtime_of(GENERATION), ROUNDS).notes == ()


def test_an_answer_without_an_end_is_noted() -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    assert "no end token" in str(encode(runtime_of(template), ROUNDS[:2]).notes)


def test_tools_and_calls_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        ROUNDS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        ROUNDS[3],
    ]
    runtime = runtime_of(None)
    example = encode(runtime, messages, tools=tools)
    assert '"name": "add", "parameters"' in runtime.tokenizer.decode(example.inputs["input_ids"])
    assert learned(runtime, example) == '{"name": "add", "arguments": {"a": 1}}</s>four</s>'


DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}" + CHATML


def test_a_template_that_writes_the_date_writes_the_stated_one() -> None:
    runtime = runtime_of(DATED)
    assert says_date(runtime.tokenizer)
    freeze_date(runtime.tokenizer, "2024-07-26")
    assert runtime.rendering({"messages": ROUNDS})["text"].startswith("26 Jul 2024\n")
    freeze_date(runtime.tokenizer, None)
    assert not runtime.rendering({"messages": ROUNDS})["text"].startswith("26 Jul 2024\n")


def test_the_variables_of_a_template_are_found() -> None:
    assert template_variables(THINK) == {"messages", "add_generation_prompt", "enable_thinking"}
    assert "generation" not in template_variables(GENERATION)


def test_a_long_conversation_can_be_split() -> None:
    runtime = Runtime(template_tokenizer(CHATML), Encoding(12, truncation="split"))
    examples = runtime.encode({"messages": ROUNDS}, "rows:1")
    whole = encode(runtime_of(CHATML), ROUNDS)
    assert all(example.length <= 12 and example.num_targets for example in examples)
    assert sum(example.num_targets for example in examples) >= whole.num_targets - len(examples)
    assert dataclasses.replace(examples[0], notes=()).num_tokens == whole.num_tokens
