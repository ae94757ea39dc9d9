"""Conversations as tokens: the tokenizer's own chat template renders, and which tokens are learned is proven, never guessed."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from peftkit.formats.base import RowError
from peftkit.tasks.encoding import Encoding

# For tokenizers without a template; stored with the adapter, so that inference renders the same.
DEFAULT_CHAT_TEMPLATE = (
    "{% if tools %}{{ '### Tools:\\n' + tools | tojson + '\\n\\n' }}{% endif %}"
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ call['function'] | tojson }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_LONGEST_EMPTY_THOUGHT = 16  # tokens


def default_chat_template(tokenizer: Any) -> str:
    """The template for a tokenizer without one; it starts with BOS where the tokenizer starts every text with it."""
    first = tokenizer("a")["input_ids"][:1]
    starts_with_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return "{{ bos_token }}" * starts_with_bos + DEFAULT_CHAT_TEMPLATE


def is_default_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has the template of `default_chat_template`."""
    return str(tokenizer.chat_template).endswith(DEFAULT_CHAT_TEMPLATE)


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        text: what the template wrote.
        ids: its tokens.
        weights: of every token: 0 where it is not learned.
        notes: what the audit should tell of the row.
    """

    text: str
    ids: list[int]
    weights: list[float]
    notes: tuple[str, ...] = ()


@dataclass
class _Turn:
    """An assistant turn that is learned: its number among the messages, its weight, and its tokens from `start` to `end`."""

    number: int
    weight: float
    start: int = 0
    end: int = 0


@dataclass
class ChatRenderer:
    """Renders conversations by a tokenizer's chat template, under the settings that are stored with the adapter."""

    tokenizer: Any
    settings: Encoding
    _notes: list[str] = field(default_factory=list)

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The text that a model is asked with: the messages and the beginning of its answer."""
        return self._text(row["messages"], row.get("tools"), add_generation_prompt=True)

    def conversation(self, row: Mapping[str, Any]) -> Rendered:
        """A whole conversation, with the weights of the tokens that are learned.

        Raises:
            RowError: the template refuses it, or which tokens are an answer cannot be told exactly.
        """
        messages, tools = row["messages"], row.get("tools")
        self._notes = []
        if self.settings.train_on == "all":
            return self._everything(messages, tools)
        turns = self._learned_turns(messages)
        if self._has_generation_blocks(tools):
            text, ids = self._by_blocks(messages, tools, turns)
        else:
            text, ids = self._by_prefixes(messages, tools, turns)
        weights = [0.0] * len(ids)
        thinks = "<think>" in text
        for turn in turns:
            start = self._after_empty_thought(ids, turn) if thinks else turn.start
            weights[start : turn.end] = [turn.weight] * (turn.end - start)
        return Rendered(text, ids, weights, tuple(dict.fromkeys(self._notes)))

    def ids(self, text: str) -> list[int]:
        """Tokens of a rendered text; the template has written the special tokens itself: adding them again would double BOS."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _everything(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Rendered:
        if any("weight" in message for message in messages):
            raise RowError("a turn states a weight (or `train`), which has no effect with `train_on: all`")
        text = self._text(messages, tools)
        ids = self.ids(text)
        return Rendered(text, ids, [1.0] * len(ids))

    def _learned_turns(self, messages: Sequence[Mapping[str, Any]]) -> list[_Turn]:
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.settings.train_on == "last_turn":
            answers = answers[-1:]
        weighted = [_Turn(number, float(messages[number].get("weight", 1.0))) for number in answers]
        return [turn for turn in weighted if turn.weight > 0]

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Any, *, add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                _for_template(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.settings.chat_template_kwargs,
            )
        except Exception as error:  # a template raises whatever it likes, most often jinja2.TemplateError
            raise RowError(f"the chat template refuses these messages: {error}") from error
        return text

    def _has_generation_blocks(self, tools: Any) -> bool:
        return self.tokenizer.is_fast and bool(_GENERATION.search(self.tokenizer.get_chat_template(None, tools)))

    def _by_blocks(self, messages: Sequence[Mapping[str, Any]], tools: Any, turns: list[_Turn]) -> tuple[str, list[int]]:
        """Turns found by the template's own `{% generation %}` blocks, one for each assistant turn."""
        text, blocks = self._blocks(messages, tools)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(blocks) != len(answers):
            raise RowError(
                f"the chat template marks {len(blocks)} part(s) of this conversation as generated, which has {len(answers)} "
                "assistant turn(s): which tokens are an answer cannot be told; use another `model.chat_template`"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        for turn in turns:
            first, last = blocks[answers.index(turn.number)]
            turn.start, turn.end = _tokens_between(offsets, first, last, turn.number)
            following = ids[turn.end : turn.end + 1]
            if ids[turn.end - 1] not in self._special and self._special.intersection(following):
                turn.end += 1  # a block that stops short of its end token: without it nothing learns to stop
        if turns and turns[-1].number:
            self._compare_prompt(messages, tools, turns[-1], ids)
        return text, ids

    def _blocks(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the characters of its generated blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, blocks = render_jinja_template(
                conversations=[_for_template(messages)],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.settings.chat_template_kwargs},
            )
        except Exception as error:  # as above
            raise RowError(f"the chat template refuses these messages: {error}") from error
        return texts[0], blocks[0]

    def _compare_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any, turn: _Turn, ids: list[int]) -> None:
        prompt = self.ids(self._text(messages[: turn.number], tools, add_generation_prompt=True))
        if ids[: turn.start] != prompt:
            self._notes.append(
                "what comes before the answer is not what a model would be asked with (the generation prompt): it learns "
                "after another text than it will serve"
            )

    def _by_prefixes(self, messages: Sequence[Mapping[str, Any]], tools: Any, turns: list[_Turn]) -> tuple[str, list[int]]:
        """Turns found by rendering up to them and through them, each proven to be a prefix of the whole, token by token."""
        text = self._text(messages, tools)
        ids = self.ids(text)
        for turn in turns:
            if turn.number == 0:
                raise RowError(
                    "turn 1 is an assistant turn that answers nothing: where it begins cannot be told, since a template "
                    "renders no empty conversation; give it `train: false`, or set `train_on: last_turn`"
                )
            before = self._text(messages[: turn.number], tools, add_generation_prompt=True)
            is_last = turn.number == len(messages) - 1
            through = text if is_last else self._text(messages[: turn.number + 1], tools)
            prompt, tokens = self.ids(before), ids if is_last else self.ids(through)
            turn.start, turn.end = len(prompt), self._end_of_turn(tokens, len(prompt))
            # White space after the end token is no part of the turn, and the next one may change its tokens.
            if ids[: turn.start] != prompt or ids[: turn.end] != tokens[: turn.end]:
                raise RowError(_why_not_told(turn, text.startswith(before) and text.startswith(through)))
        return text, ids

    def _end_of_turn(self, through: list[int], start: int) -> int:
        """The end of the turn, without the white space that a template writes after its end token."""
        last = next((place for place in range(len(through) - 1, start - 1, -1) if through[place] in self._special), None)
        if last is None or self.tokenizer.decode(through[last + 1 :]).strip():
            self._notes.append("the chat template writes no end token after the answer: nothing teaches the model to stop")
            return len(through)
        return last + 1

    def _after_empty_thought(self, ids: list[int], turn: _Turn) -> int:
        """Where the turn starts behind an empty think block, which the template has written and nobody wants learned."""
        first = ids[turn.start : turn.start + _LONGEST_EMPTY_THOUGHT]
        if not _EMPTY_THOUGHT.match(self.tokenizer.decode(first)):
            return turn.start
        ends = [n for n in range(1, len(first) + 1) if _EMPTY_THOUGHT.fullmatch(self.tokenizer.decode(first[:n]))]
        if not ends:
            return turn.start
        self._notes.append(
            "an empty think block is not learned; where prompts shall end with it, set `data.chat_template_kwargs` "
            "(`enable_thinking: false` for many templates)"
        )
        return min(turn.start + ends[-1], turn.end)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(self.tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def _why_not_told(turn: _Turn, text_is_whole: bool) -> str:
    """Why the tokens of a turn are not known, with what to do."""
    cause = "the chat template renders the beginning of the conversation differently from the whole"
    if text_is_whole:
        cause = "the tokenizer makes other tokens of the prompt's end when the answer follows (white space before it, mostly)"
    return (
        f"the tokens of turn {turn.number + 1} (assistant) cannot be told from the rest: {cause}; set `train_on: last_turn` or "
        "`train_on: all`, or another `model.chat_template`"
    )


def _for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without what is ours alone."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _tokens_between(offsets: Sequence[tuple[int, int]], first: int, last: int, number: int) -> tuple[int, int]:
    """The tokens of the characters from `first` to `last`, none of which reaches beyond them."""
    inside = [place for place, (a, b) in enumerate(offsets) if a < last and b > first]
    if not inside or offsets[inside[0]][0] < first or offsets[inside[-1]][1] > last:
        raise RowError(f"a token of turn {number + 1} (assistant) reaches beyond what the chat template marks as generated")
    return inside[0], inside[-1] + 1


def template_variables(template: str) -> frozenset[str]:
    """Variables that a chat template reads and does not set."""
    import jinja2.ext
    from jinja2 import meta, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` is a block like any other here."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, jinja2.ext.loopcontrols])
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def freeze_date(tokenizer: Any, date: str | None) -> None:
    """Let the template's `strftime_now` say a date (ISO), so that a rendering is the same on every day; None: the time it is.

    transformers gives templates no other way to set it (5.23): what is passed in by that name is made plain data.
    """
    from transformers.utils import chat_template_utils

    def say(form: str) -> str:
        return (datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()).strftime(form)

    for template in _templates(tokenizer) if says_date(tokenizer) else ():
        compiled = chat_template_utils._compile_jinja_template(template)
        compiled.environment.globals["strftime_now"] = say


def says_date(tokenizer: Any) -> bool:
    """Whether the chat template writes the date of today."""
    return any("strftime_now" in template for template in _templates(tokenizer))


def _templates(tokenizer: Any) -> list[str]:
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [template] if template else []
