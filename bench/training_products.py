"""The products of a training step and nothing else, by ours' calls: what is around them costs the rest.

Left out are autograd, convolutions, norms, and new memory for results. No limit for a form with fewer FLOPs.
May be changed here: which products, together with ``codegen/cpu/scan.py``.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bench.layer import Layer
from ttt_compiler.codegen.cpu import gemm, kept
from ttt_compiler.codegen.cpu.target_values import BLOCK
from ttt_compiler.spec import state_dtype


class TrainingProducts:
    """Of one step of ``layer``, into buffers that exist; dy is t, which is not convolved."""

    def __init__(self, layer: Layer) -> None:
        s, self.layer = layer.shape, layer
        self.y, self.v, self.dv, self.dc = (torch.empty_like(layer.t) for _ in range(4))
        self.dh = torch.empty_like(layer.h)
        self.spans = [slice(i, min(i + s.chunk, s.tokens)) for i in range(0, s.tokens, s.chunk)]
        written, step = s.written(state=False) * s.chunk, max(1, BLOCK // s.chunk) * s.chunk
        self.blocks = [slice(i, min(i + step, written)) for i in range(0, written, step)]
        self.tail = kept.tail_chunks(s.chunk, s.d, s.f)
        count, chunks = kept.count(s.batch, s.tokens, s.chunk, s.d, s.f, layer.dtype), len(self.spans)
        self.borders = [[0, *marks, chunks] for marks in kept.places([chunks] * s.batch, count, self.tail)]
        self.w, self.s, self.dp = (
            gemm.FastMatrix(
                base, torch.empty(size, dtype=state_dtype(layer.dtype)), layer.dtype, name=name, turns=True
            )
            for base, size, name in (
                (layer.w0, layer.w0.shape, "scan.w"),
                (None, layer.w0.shape, "scan.s"),
                (None, layer.proj.shape, "values.d"),
            )
        )

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """dh ``[B, T, F]``."""
        self.dp.reset()
        for b, borders in enumerate(self.borders):
            t, v, dv, dc = (x[b] for x in (self.layer.t, self.v, self.dv, self.dc))
            for rows in self.blocks:
                gemm.project(t[rows], self.layer.proj, v[rows], "project")
            self._recurrence(b, 0, len(self.spans), back=False)
            self.s.reset()
            for start, stop in reversed([*itertools.pairwise(borders)]):
                self._recurrence(b, start, stop, back=True)
                self._reverse(b, start, stop)
            for rows in self.blocks:
                self.dp.write(t[rows], dv[rows])
                gemm.project(dv[rows], self.layer.proj.t(), dc[rows], "project")
        return self.dh

    def _recurrence(self, b: int, start: int, stop: int, *, back: bool) -> None:
        """W of chunks, applied to h, or turned to dy: from W0."""
        h, t, v = self.layer.h[b], self.layer.t[b], self.v[b]
        self.w.reset()
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

    def _reverse(self, b: int, start: int, stop: int) -> None:
        """S of chunks, from the last one, behind what is there."""
        h, t, v = self.layer.h[b], self.layer.t[b], self.v[b]
        for rows in reversed(self.spans[start:stop]):
            if not self.s.is_zero:
                self.s.apply_transposed(v[rows], self.dh[b, rows], accumulate=True)
                self.s.apply(h[rows], None, self.dv[b, rows])
            self.s.write(t[rows], h[rows])
