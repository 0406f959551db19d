"""Where a running sequence's numbers stand in the tensors of its site's state.

A site's state is a table of L rows that own L slots and L lanes: a row is one sequence, ``w[slot]`` is the
matrix it reads, ``lane`` is where an entry of its incomplete chunk lies. Rows refer to slots and lanes by
number, so beams and forks share them, and since there are as many slots as rows, a row that must not
overwrite what another one reads always finds a free slot. May be changed here: the layout, together with
``fast_weight_step`` and the snapshot format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_compiler.spec import SiteSpec

# Columns of ``rows``:
SEEN = 0  # tokens since the document began
DONE = 1  # complete chunks that are dealt with: written, skipped, or of a site that writes nothing
WRITES = 2  # chunks that are in the matrix; 0 means that the row reads W0
FACTORED = 3  # tokens kept as factored rows in the slot; 0 means that the slot holds W
SLOT = 4
SKIPPED = 5  # chunks whose write was left out because it was not finite
CLIPPED = 6  # chunks whose write was scaled down
CACHED = 7  # complete chunks not dealt with yet whose v stands in ``tail_v``
COLUMNS = 8
# And of tables whose writes may be spread over steps (CPU; see :func:`spread_tokens`), behind those:
LEFT = 8  # columns of W that the write of chunk DONE - 1 has not reached yet
VALUES = 9  # units of v of the incomplete chunk that stand in ``tail_v`` already, or:
NOT_AHEAD = -1  # none is made before the chunk's end, and its write is not spread
WIDE_COLUMNS = 10

# Columns of ``norms``: Frobenius norms of writes since the document began.
LAST, PEAK, TOTAL = range(3)
NORMS = 3
# And behind them, of tokens whose v stands in ``tail_v`` already: of v, and of h.
OF_V, OF_H = 3, 4
WIDE_NORMS = 5


class StateTensors(NamedTuple):
    """State of one site.

    Attributes:
        w: ``[L, D, F]`` in the state's dtype: per slot W itself, or its storage filled with the rows
            ``h [n, F]`` and ``v [n, D]`` of the ``n`` tokens written so far (see :func:`factored_rows`).
        tail_h: ``[L, C + R + S, F]`` hidden rows that may still be needed: of the incomplete chunk, of
            complete ones that are younger than R tokens, and of one whose write is in progress, for S tokens.
            Token p of a document lies in column p mod (C + R + S).
        tail_t: ``[L, C + R + S, Dt]`` their target rows.
        tail_v: ``[L, C * ceil(R / C), D]`` v of complete chunks that are not written yet; with S > 0 C rows
            more, which hold ``[D, C]``: v of the chunk that is being written, or next will be, transposed.
            Until v of a token is made, its column may hold what v of tokens before it is made of.
        lanes: int32 ``[L, C + R + S]``, which lane holds a row's entry; ``[L, 0]`` while every row uses its
            own.
        rows: int64 ``[L, 8]``, the columns above; ``[L, 10]`` with S > 0.
        norms: ``[L, 3]`` in the state's dtype; ``[L, 5]`` with S > 0.
    """

    w: Tensor
    tail_h: Tensor
    tail_t: Tensor
    tail_v: Tensor
    lanes: Tensor
    rows: Tensor
    norms: Tensor

    @property
    def capacity(self) -> int:
        """Columns of the tail, C + R + S."""
        return self.tail_h.shape[1]

    @property
    def spreads(self) -> bool:
        """Whether a write may be spread over steps."""
        return self.rows.shape[1] > COLUMNS

    def revocable(self, spec: SiteSpec) -> int:
        """R, of tables of this site."""
        return self.capacity - spec.chunk - (spread_tokens(spec) if self.spreads else 0)

    def forget_values(self, rows: Tensor | int) -> None:
        """v of tokens that are not written yet must be made again; of a write in progress it stays."""
        self.rows[rows, CACHED] = 0
        if self.spreads:
            self.rows[rows, VALUES] = 0

    def spread_values(self, row: int, chunk: int) -> Tensor:
        """v of the chunk whose write is spread, ``[D, C]``."""
        return self.tail_v[row, -chunk:].view(self.w.shape[1], chunk)


TENSORS = StateTensors._fields


def factored_capacity(d_model: int, d_ff: int) -> int:
    """N* = D F / (D + F): tokens whose (h, v) rows take no more room, and no more FLOPs, than W."""
    return d_model * d_ff // (d_model + d_ff)


def factored_limit(d_model: int, d_ff: int, batch: int) -> int:
    """Tokens up to which a row of a batch stays factored, where writes are not spread.

    In a batch of B all rows read W0 once and their own rows, so factored is cheaper while
    ``N < (1 - 1/B) D F / (D + F)``. A sequence alone reads one matrix either way, and its W costs the same
    as W0: it is never factored.
    """
    return factored_capacity(d_model, d_ff) * (batch - 1) // batch


def factored_rows(slot: Tensor, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """Views of the factored rows in a slot ``[D, F]``: h ``[tokens, F]`` and v ``[tokens, D]``."""
    d, f = slot.shape
    flat = slot.view(-1).view(dtype)
    start = factored_capacity(d, f) * f
    return flat[: tokens * f].view(tokens, f), flat[start : start + tokens * d].view(tokens, d)


def cached_rows(chunk: int, revocable: int) -> int:
    """Rows of ``tail_v``: whole chunks that can be complete and younger than ``revocable`` tokens."""
    return -(-revocable // chunk) * chunk


def spread_tokens(spec: SiteSpec) -> int:
    """S: over how many tokens the write of a chunk may be spread; 0 where a write cannot be split.

    Three eighths of a chunk: a step then writes its share and reads the keys that are not written yet in less
    than twice the time of its own read of W, for C up to 512. A norm of the whole write must be known before
    a limited one begins, decay changes what is not written too, and a derived W0 is at hand in a call alone.
    """
    rule = spec.rule
    splits = not rule.limited and rule.keys != "unit" and rule.decay == 1.0
    writes = spec.lr != 0.0 and not spec.derived and not spec.inner
    return spec.chunk * 3 // 8 if splits and writes else 0


def live_start(counts: Sequence[int], chunk: int) -> int:
    """The first token of the document that a row's tail must keep, of its row of ``rows``."""
    writing = len(counts) > COLUMNS and counts[LEFT] > 0
    return (counts[DONE] - writing) * chunk
