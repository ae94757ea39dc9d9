"""A chat template as a Go template, which Ollama renders: the pieces around messages, found by rendering probes.

Most chat templates write a start, each message between two pieces by its role, and a generation prompt. Whether a template is
of that kind is not guessed from its text: the pieces must put together again what it renders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

Messages = Sequence[dict[str, str]]
Render = Callable[[Messages, bool], str]  # messages, whether the generation prompt is added

_S, _U, _A = "Xsystem0X", "Xuser{}X", "Xanswer{}X"


class UnlikePiecesError(ValueError):
    """A template that writes more than pieces around messages; the message is the end of a sentence."""


@dataclass(frozen=True)
class Pieces:
    """What a template writes around messages.

    Attributes:
        start: in front of a conversation without a system message.
        system: before and after a system message, which comes first; None where the template refuses one.
        user: before and after a user's message.
        assistant: before and after an answer.
        generation: where the next answer begins.
        system_opens_user: whether the system message is part of the first user's turn (Llama 2), whose beginning it replaces.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    system_opens_user: bool = False

    def render(self, messages: Messages) -> str:
        """What the Go template of these pieces writes, the generation prompt included."""
        text, is_open = "", False
        for place, message in enumerate(messages):
            role, content = message["role"], message["content"]
            before, after = getattr(self, role) or ("", "")
            if role == "user" and is_open:
                before, is_open = "", False
            if role == "system":
                is_open = self.system_opens_user
            text += (self.start if place == 0 and role != "system" else "") + before + content + after
        return text + self.generation

    def without(self, beginning: str) -> Pieces:
        """The same without what every text begins with (BOS, where an engine adds it)."""
        system = self.system and (self.system[0].removeprefix(beginning), self.system[1])
        changed = replace(self, start=self.start.removeprefix(beginning), system=system)
        if self.start or not self.user[0].startswith(beginning):
            return changed
        # Llama 2 begins every turn with it: what follows an answer then ends with it.
        user, answered = self.user[0].removeprefix(beginning), self.assistant[1] + beginning
        return replace(changed, user=(user, self.user[1]), assistant=(self.assistant[0], answered))

    def go(self) -> str:
        """The Go template, which reads the `.Messages` that Ollama hands it."""
        system, before_user, opened = self.system or ("", ""), _literal(self.user[0]), ""
        if self.system_opens_user:
            opened = "{{ $open = true }}"
            before_user = "{{ if $open }}{{ $open = false }}{{ else }}" + before_user + "{{ end }}"
        parts = [
            "{{ $open := false }}{{ range $place, $message := .Messages }}",
            '{{ if eq .Role "system" }}' + _around_content(system) + opened + "{{ else }}",
            "{{ if eq $place 0 }}" + _literal(self.start) + "{{ end }}",
            '{{ if eq .Role "user" }}' + before_user + "{{ .Content }}" + _literal(self.user[1]),
            '{{ else if eq .Role "assistant" }}' + _around_content(self.assistant) + "{{ end }}",
            "{{ end }}{{ end }}" + _literal(self.generation),
        ]
        return "".join(parts)


def find_pieces(render: Render) -> Pieces:
    """The pieces of a template.

    Args:
        render: renders it.

    Raises:
        UnlikePiecesError: pieces do not put together what it renders.
    """
    user, answer, again = _message("user", 1), _message("assistant", 1), _message("user", 2)
    start_user, after_user = _around(render([user], False), user)
    _, prompt = _around(render([user], True), user)
    whole = render([user, answer, again], True)
    between = _around(_around(whole, user)[1], answer)
    _, after_answer = _around(render([user, answer], False), answer)
    before_again = _around(between[1], again)[0]
    generation = _rest(prompt, after_user)
    before_user = _rest(before_again, after_answer)
    pieces = Pieces(
        start=start_user.removesuffix(before_user),
        system=None,
        user=(before_user, after_user),
        assistant=(_rest(between[0], after_user), after_answer),
        generation=generation,
    )
    pieces = _with_system(render, pieces, user)
    _prove(render, pieces)
    return pieces


def _with_system(render: Render, pieces: Pieces, user: dict[str, str]) -> Pieces:
    """The pieces around a system message added, where the template takes one."""
    system = {"role": "system", "content": _S}
    try:
        before, rest = _around(render([system, user], True), system)
    except UnlikePiecesError:
        return pieces
    after = _around(rest, user)[0]
    opens = not after.endswith(pieces.user[0])
    after = after if opens else after[: len(after) - len(pieces.user[0])]
    return replace(pieces, system=(before, after), system_opens_user=opens)


def _prove(render: Render, pieces: Pieces) -> None:
    """Raise where the pieces do not give what the template renders of conversations of other lengths."""
    turns = [_message("assistant" if number % 2 else "user", number) for number in range(5)]
    with_system = [{"role": "system", "content": _S}, *turns] if pieces.system else turns
    for messages in (turns[:1], turns[:3], turns, with_system[:2], with_system):
        if messages[-1]["role"] == "user" and pieces.render(messages) != render(messages, True):
            raise UnlikePiecesError("writes more than a piece before and after each message, by its role")


def _message(role: str, number: int) -> dict[str, str]:
    return {"role": role, "content": (_U if role == "user" else _A).format(number)}


def _around(text: str, message: dict[str, str]) -> tuple[str, str]:
    before, found, after = text.partition(message["content"])
    if not found:
        raise UnlikePiecesError(f"leaves out a message of the role {message['role']}")
    return before, after


def _rest(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise UnlikePiecesError("ends a message in one way before another one and in another way at the end")
    return text[len(beginning) :]


def _around_content(pieces: tuple[str, str]) -> str:
    return _literal(pieces[0]) + "{{ .Content }}" + _literal(pieces[1])


def _literal(text: str) -> str:
    """Text for a Go template, which takes two braces for the beginning of an action."""
    return text.replace("{{", '{{ "{{" }}')
