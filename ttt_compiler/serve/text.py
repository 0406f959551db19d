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
        self._tokenizer, self._stop = tokenizer, tuple(stop)
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
        found = [at for at in (pending.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = pending[: min(found)], ""
        else:
            keep = 0 if last else self._possible_stop(pending)
            shown, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += shown
        return shown

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                return size
        return 0

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
