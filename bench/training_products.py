"""The products of a training step and nothing else, by ours' calls: what is around them costs the rest.

Left out are autograd, convolutions, norms, copies of what is kept, and new memory for results. No limit for a
form with fewer FLOPs. May be changed here: which products, together with ``codegen/cpu/scan.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.layer import Layer
from ttt_compiler.codegen.cpu import gemm, kept
from ttt_compiler.codegen.cpu.scan import tail_chunks
from ttt_compiler.spec import state_dtype


class TrainingProducts:
    """Of one step of ``layer``, into buffers that exist; dy is t, which is not convolved."""

    def __init__(self, layer: Layer) -> None:
        s, self.layer = layer.shape, layer
        self.y, self.v, self.dv, self.dc = (torch.empty_like(layer.t) for _ in range(4))
        self.dh = torch.empty_like(layer.h)
        self.spans = [slice(i, min(i + s.chunk, s.tokens)) for i in range(0, s.tokens, s.chunk)]
        self.written = slice(0, s.written(state=False) * s.chunk)
        self.tail = tail_chunks(s.chunk, s.d, s.f)
        count, chunks = kept.count(s.batch, s.tokens, s.chunk, s.d, layer.dtype), len(self.spans)
        self.borders = [(0, *marks, chunks) for marks in kept.places([chunks] * s.batch, count, self.tail)]
        self.w, self.s, self.dp = (
            gemm.FastMatrix(
                base, torch.empty(size, dtype=state_dtype(layer.dtype)), layer.dtype, name=name, turns=True
            )
            for base, size, name in (
                (layer.w0, layer.w0.shape, "scan.w"),
                (None, layer.w0.shape, "scan.s"),
                (None, layer.proj.shape, "project.d"),
            )
        )

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """dh ``[B, T, F]``."""
        self.dp.reset()
        for b, borders in enumerate(self.borders):
            t, v, dv, dc = (x[b, self.written] for x in (self.layer.t, self.v, self.dv, self.dc))
            gemm.project(t, self.layer.proj, v, "project")
            self._recurrence(b, (0, len(self.spans)), back=False)
            self._recurrence(b, borders, back=True)
            self._reverse(b)
            gemm.project(dv, self.layer.proj.t(), dc, "project")
            self.dp.write(t, dv)
        return self.dh

    def _recurrence(self, b: int, borders: Sequence[int], *, back: bool) -> None:
        """W of every chunk, applied to h, or turned to dy: from W0, and at a border from what is there."""
        h, t, v = self.layer.h[b], self.layer.t[b], self.v[b]
        self.w.reset()
        for start, stop in itertools.pairwise(borders):
            first = max(start, stop - self.tail)
            for i, rows in enumerate(self.spans[start:stop], start):
                # The last chunks read each other.
                waiting = slice(self.spans[first].start, rows.start) if i > first else None
                if back:
                    self.w.apply_transposed(t[rows], self.dh[b, rows])
                    if waiting:
                        gemm.add_product(t[rows], v[waiting], h[waiting], self.dh[b, rows], "scan.tail")
                else:
                    self.w.apply(h[rows], None, self.y[b, rows])
                    if waiting:
                        gemm.add_product(h[rows], h[waiting], v[waiting], self.y[b, rows], "scan.tail")
                if i < first:
                    self.w.write(v[rows], h[rows])

    def _reverse(self, b: int) -> None:
        """S of every chunk, from the last one."""
        h, t, v = self.layer.h[b], self.layer.t[b], self.v[b]
        self.s.reset()
        for rows in reversed(self.spans):
            if not self.s.is_zero:
                self.s.apply_transposed(v[rows], self.dh[b, rows], accumulate=True)
                self.s.apply(h[rows], None, self.dv[b, rows])
            self.s.write(t[rows], h[rows])
