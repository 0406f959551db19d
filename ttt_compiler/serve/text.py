"""Sampled tokens to text, piece by piece.

May be changed here: when a piece may be shown. A piece that was shown is never taken back, so two things
are held back: the bytes of an incomplete character, and what may be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"


class TextStream:
    """Text of one reply.

    Args:
        tokenizer: of transformers.
        stop: strings that end the reply and are no part of it.

    Attributes:
        text: what was shown.
        stopped: whether a stop string was met; later tokens show nothing.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [_Search(s) for s in stop]
        self._ids: list[int] = []
        # Tokens are decoded behind a few earlier ones: alone, a word would lose the space before it.
        self._context, self._decoded = 0, 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """What may be shown now that ``token`` was sampled; often empty."""
        self._ids.append(token)
        if self._decode(self._ids[self._context :]).endswith(INCOMPLETE):
            return ""
        return self._show(self._fresh(), last=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        return self._show(self._fresh(), last=True)

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._context : self._decoded])
        now = self._decode(self._ids[self._context :])
        if now != before:  # behind special tokens, which show nothing, a word would lose its space too
            self._context = self._decoded
        self._decoded = len(self._ids)
        return now[len(before) :]

    def _show(self, fresh: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        pending = self._held + fresh
        cut = None
        for at, character in enumerate(fresh, len(self._held) + 1):
            found = [at - len(s.wanted) for s in self._stop if s.push(character)]
            if found:
                cut = min(found)
                break
        if cut is None:
            cut = len(pending) - (0 if last else max((s.matched for s in self._stop), default=0))
        else:
            self.stopped = True
        shown, self._held = pending[:cut], "" if self.stopped else pending[cut:]
        self.text += shown
        return shown

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Search:
    """Looks for a string in characters that come one by one; each takes constant time on average.

    Attributes:
        matched: length of the longest end of what came that the string begins with.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted, self.matched = wanted, 0
        # Of each beginning of the string, the longest shorter one that it ends with (Knuth, Morris, Pratt);
        # computed no further than was matched, so a long string costs nothing.
        self._shorter = [0, 0]

    def push(self, character: str) -> bool:
        """Whether the string is complete with this character."""
        self.matched = self._longer(self.matched, character)
        if self.matched == len(self._shorter):
            self._shorter.append(self._longer(self._shorter[-1], character))
        return self.matched == len(self.wanted)

    def _longer(self, length: int, character: str) -> int:
        while length and self.wanted[length : length + 1] != character:
            length = self._shorter[length]
        return length + (self.wanted[length : length + 1] == character)
