"""Read a document through a window that is shorter than the document.

Keys and values outside of the window are dropped, positions go on counting, fast weights stay. May
be changed here: how the window moves.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt_compiler.conversion import disabled
from ttt_compiler.runtime.cache import evict
from ttt_compiler.runtime.session import Session


@dataclass(frozen=True)
class Window:
    """Which keys and values stay after a call: the first ``sink`` tokens and the last ``keep``."""

    keep: int
    sink: int


class WindowedReader:
    """One pass through a document, with the bits of every token but the first.

    Args:
        model: converted and compiled.
        window: what stays of the keys and values after each call.
        session: fast weights, and where to go on; None reads with the base model, ordinary cache.

    Attributes:
        position: of the next token.
        bits: ``-log2 p`` of every token that followed a token this reader was fed.
        last: logits after the last token; None before the first.
        seconds: time in the model.
    """

    def __init__(self, model: nn.Module, window: Window, session: Session | None = None) -> None:
        self.model, self.window, self.session = model, window, session
        self.position = 0 if session is None else session.tokens_seen[0]
        self.bits: list[float] = []
        self.last: Tensor | None = None
        self.seconds = 0.0
        self._cache = _plain_cache(model) if session is None else session.cache

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Read ``ids [n]``; returns their logits ``[n, vocabulary]``."""
        # A slice's offset into its storage is part of what a graph is compiled for.
        ids = ids.clone()
        positions = torch.arange(self.position, self.position + len(ids))[None]
        started = time.perf_counter()
        with disabled(self.model) if self.session is None else contextlib.nullcontext():
            out = self.model(
                input_ids=ids[None],
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        evict(self._cache.layers, self.window.keep, self.window.sink)
        self.seconds += time.perf_counter() - started
        logits: Tensor = out.logits[0]
        if self.last is not None:
            self.bits += _bits(self.last[None], ids[:1])
        self.bits += _bits(logits[:-1], ids[1:])
        self.last = logits[-1].clone()
        self.position += len(ids)
        return logits

    def generate(self, token: int, count: int) -> tuple[list[int], Tensor]:
        """``token`` and what follows it greedily: ``count`` tokens, and the logits after each."""
        tokens, rows = [token], []
        for _ in range(count):
            rows.append(self.feed(torch.tensor(tokens[-1:]))[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens[:-1], torch.stack(rows)


def _plain_cache(model: nn.Module) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _bits(logits: Tensor, targets: Tensor) -> list[float]:
    nll = F.cross_entropy(logits.float(), targets, reduction="none")
    bits: list[float] = (nll / math.log(2)).tolist()
    return bits
