"""From token ids to text that may be shown: unfinished characters and stop strings are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"


class TextStream:
    """Decodes one answer incrementally and looks for stop strings.

    A byte-level tokenizer can split a character over tokens, and a stop string over many: text is
    released only when no continuation could take it back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...]) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._settled = 0  # ids whose text is complete
        self._context = 0  # ids before it that are decoded along, because spacing depends on them
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """The answer so far, without the stop string."""
        return self._text

    def push(self, token_id: int) -> str:
        """Add one token; returns what may be shown now. Sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._settled])
        now = self._decode(self._ids[self._context :])
        if not now.endswith(_UNFINISHED):
            self._append(now[len(before) :])
            self._context, self._settled = self._settled, len(self._ids)
        return self._release(len(self._text) - self._held_back())

    def finish(self) -> str:
        """The answer is over: what was held back, an unfinished character included."""
        if not self.stopped:
            before = self._decode(self._ids[self._context : self._settled])
            self._append(self._decode(self._ids[self._context :])[len(before) :])
        return self._release(len(self._text))

    def _append(self, text: str) -> None:
        searched_from = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += text
        ends = [at for stop in self._stop if (at := self._text.find(stop, searched_from)) >= 0]
        if ends:
            self._text = self._text[: min(ends)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that could be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max((_overlap(self._text, stop) for stop in self._stop), default=0)

    def _release(self, upto: int) -> str:
        piece = self._text[self._shown : upto]
        self._shown = max(self._shown, upto)
        return piece


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
