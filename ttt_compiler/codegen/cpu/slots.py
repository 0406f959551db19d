"""The matrix that one row of a batch reads and writes: W0, factored rows, or a matrix of its own.

``y = h W0^T + (h H^T) V`` while few tokens are written, ``y = h W^T`` after. The switch is exact: W becomes
``W0 + V^T H``. May be changed here: when a row switches, and how it finds a free slot; where things stand is
:mod:`ttt_compiler.codegen.layout`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import gemm
from ttt_compiler.codegen.cpu.gemm import FastMatrix
from ttt_compiler.codegen.cpu.native import blocks
from ttt_compiler.codegen.cpu.workspaces import workspace
from ttt_compiler.codegen.layout import FACTORED, SLOT, WRITES, factored_rows


class RowMatrix:
    """One row's W.

    Args:
        table: ``rows`` as Python ints; changed here, written back by the caller.
        row: which of them.
        w: ``[L, D, F]`` slots.
        w0: ``[D, F]``.
        dtype: of the operands of this call.
        stored: dtype of factored rows.
    """

    def __init__(
        self,
        table: list[list[int]],
        row: int,
        w: Tensor,
        w0: Tensor,
        dtype: torch.dtype,
        stored: torch.dtype,
    ) -> None:
        self.table, self.row, self.me = table, row, table[row]
        self.w, self.w0 = w, w0
        self.dtype, self.stored = dtype, stored
        self._dense: FastMatrix | None = None

    def reset(self) -> None:
        """Back to W0."""
        self.me[WRITES] = self.me[FACTORED] = 0
        self._dense = None

    @property
    def reads_base(self) -> bool:
        """Whether the product with W0 is a part of what this row computes."""
        return self.me[WRITES] == 0 or self.me[FACTORED] > 0

    def apply(self, h: Tensor, bias: Tensor | None, out: Tensor, *, base_done: bool = False) -> None:
        """``out = h @ W.T + bias``. h ``[m, F]``, out ``[m, D]``.

        With ``base_done``, ``out`` holds ``h @ W0.T + bias`` already.
        """
        if not self.reads_base:
            self.dense().apply(h, bias, out)
            return
        if not base_done:
            gemm.apply(h, self.w0, bias, out, "step.w")
        if self.me[FACTORED]:
            keys, values = self._factored()
            add_factored(h, keys, values, out)

    def dense(self) -> FastMatrix:
        """W as a matrix, for a row whose slot holds one."""
        if self._dense is None:
            self._dense = FastMatrix(
                self.w0, self.w[self.me[SLOT]], self.dtype, name="step.w", written=self.me[WRITES] > 0
            )
        return self._dense

    def write(self, v: Tensor, h: Tensor, decay: float, *, factored: bool) -> None:
        """``W = W0 + decay (W - W0) + v.T @ h``. v ``[C, D]``, h ``[C, F]``.

        Args:
            v: eta folded in.
            h: the chunk's hidden rows.
            decay: gamma.
            factored: whether the row may keep its tokens factored.
        """
        self.own_slot()
        if factored and self.reads_base:
            self.decay(decay)
            done = self.me[FACTORED]
            keys, values = factored_rows(self.w[self.me[SLOT]], self.stored, done + len(h))
            keys[done:], values[done:] = h, v
            self.me[FACTORED] += len(h)
        else:
            if self.me[FACTORED]:
                self._unfold()
            dense = self.dense()
            dense.decay(decay)
            dense.write(v, h)
        self.me[WRITES] += 1

    def decay(self, factor: float) -> None:
        """``W = W0 + factor (W - W0)``; of a slot that is this row's own (see :meth:`own_slot`)."""
        if factor == 1.0 or self.me[WRITES] == 0:
            return
        if self.me[FACTORED]:
            self._factored()[1].mul_(factor)
        else:
            self.dense().decay(factor)

    def forget(self, decay: float) -> None:
        """A chunk passes without a write: what was written decays all the same."""
        if decay != 1.0 and self.me[WRITES]:
            self.own_slot()
            self.decay(decay)

    def _factored(self) -> tuple[Tensor, Tensor]:
        return factored_rows(self.w[self.me[SLOT]], self.stored, self.me[FACTORED])

    def _unfold(self) -> None:
        """Factored rows become a matrix, in the same slot."""
        keys, values = self._factored()
        slot = self.w[self.me[SLOT]]
        # The rows lie in the slot that the matrix will take: it is made beside it.
        made = workspace("step.unfold", tuple(slot.shape), slot.dtype)
        if not (
            gemm.writes_blocks(self.stored) and blocks.write(values, keys, made, self.w0, None, written=False)
        ):
            torch.mm(values.to(slot.dtype).t(), keys.to(slot.dtype), out=made)
            made.add_(self.w0)
        slot.copy_(made)
        self.me[FACTORED] = 0

    def own_slot(self) -> None:
        """A slot that no other row reads, with what this row has written so far."""
        others = {r[SLOT] for r in self.table if r is not self.me and r[WRITES]}
        here = self.me[SLOT]
        if here not in others:
            return
        there = next(s for s in range(len(self.table)) if s not in others)
        if self.me[FACTORED]:
            old, new = (factored_rows(self.w[s], self.stored, self.me[FACTORED]) for s in (here, there))
            for source, copy in zip(old, new, strict=True):
                copy.copy_(source)
        elif self.me[WRITES]:
            self.w[there].copy_(self.w[here])
        self.me[SLOT] = there
        self._dense = None


def add_factored(h: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """``out += (h @ keys.T) @ values``. h ``[m, F]``, keys ``[n, F]``, values ``[n, D]``, out ``[m, D]``."""
    gemm.add_product(h, keys.to(h.dtype), values.to(h.dtype), out, "step.factored")
