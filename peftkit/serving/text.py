"""Text of an answer as its tokens come: whole characters only, and nothing of what may become a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """What can be handed out of an answer so far.

    Args:
        decode: token ids to text.
        stop: texts before which the answer ends.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens before `start` need not be decoded again; those before `read` are decoded
        self._held = ""  # text that may be the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """A token more; the text that is certain now."""
        self._ids.append(token)
        # A token's text depends on those before it (white space, bytes of one character): both are decoded with them.
        before, text = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._certain(text[len(before) :])

    def rest(self) -> str:
        """What is left when no token comes any more."""
        before, text = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        certain = "" if self.stopped else self._certain(text[len(before) :])
        held, self._held = self._held, ""
        return certain if self.stopped else certain + held

    def _certain(self, new: str) -> str:
        self._held += new
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop text begins with."""
    return next((count for count in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:count])), 0)
