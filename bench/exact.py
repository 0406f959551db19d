"""What a layer's fast weights must be after a text that is read in parts, in fp64: the gate of decode.

W of many rows after a long text would be too dear in fp64, so W is held by its products with some columns X:
``W X = W0 X + lr P^T sum conv(t)^T (h X)``, for every row and any number of tokens. Of a short text all of W
is there as well, by the specification. May be changed here: how long a short text is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen import reference

# Tokens up to which the text itself is kept.
SHORT = 1536


class Exact:
    """Rows of one layer: columns ``[B, F, k]``, w0 ``[D, F]``, conv ``[D, 1, 5]``, proj ``[D, D]``."""

    def __init__(
        self, w0: Tensor, conv: Tensor, proj: Tensor, lr: float, chunk: int, columns: Tensor
    ) -> None:
        self.w0, self.conv, self.proj = w0.double(), conv.double(), proj.double()
        self.lr, self.chunk, self.columns = lr, chunk, columns.double()
        self.sums = torch.zeros(len(columns), len(w0), columns.shape[-1], dtype=torch.float64)
        self.seen = 0
        # What is read: of the incomplete chunk, and of a short text from its start.
        self.open: list[tuple[Tensor, Tensor]] = []
        self.text: list[tuple[Tensor, Tensor]] = []

    def read(self, h: Tensor, t: Tensor) -> None:
        """The next tokens, h ``[B, m, F]`` and t ``[B, m, D]``, none of them beyond the end of the chunk.

        They must not be changed later.
        """
        assert self.seen % self.chunk + h.shape[1] <= self.chunk
        self.seen += h.shape[1]
        self.open.append((h, t))
        if self.seen <= SHORT:
            self.text.append((h, t))
        else:
            self.text.clear()
        if self.seen % self.chunk == 0:
            h, t = (torch.cat(parts, 1) for parts in zip(*self.open, strict=True))
            self.open.clear()
            for b, row in enumerate(t.unbind()):
                taps = reference.target(row.double(), self.conv, None)
                self.sums[b] += taps.t() @ (h[b].double() @ self.columns[b])

    def products(self) -> Tensor:
        """``W X``, ``[B, D, k]``."""
        return self.w0 @ self.columns + self.lr * (self.proj.t() @ self.sums)

    def weight(self, row: int) -> Tensor | None:
        """W ``[D, F]`` of a row; None where the text is too long."""
        if self.seen > SHORT:
            return None
        if not self.text:
            return self.w0
        h, t = (torch.cat(parts, 1)[row].double() for parts in zip(*self.text, strict=True))
        return reference.chunked(h, t, self.w0, self.conv, self.proj, self.lr, self.chunk)[1]
