"""Which library call multiplies, and the fast matrix that is applied and written by two GEMMs per chunk.

May be changed here: the choice of call, with a measurement. The rule in force: results land in buffers
that exist already (fresh large tensors cost about eight times their fill in page faults); fp32 products of
more than a few rows go to oneDNN on AMD processors, where MKL takes slower kernels (measured 0.74-0.96 of
MKL's time), and to MKL elsewhere; a write goes block by block there and wherever the processor multiplies the
operands' 16-bit dtype itself (:mod:`.native.blocks`), else it is ``addmm`` in place; products of 16-bit
operands are made in fp32 where the processor has no unit for them (measured 4.8 times as fast for bf16, 10
times for fp16).
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.native import blocks, panels
from ttt_compiler.codegen.cpu.native.products import multiply
from ttt_compiler.codegen.cpu.workspaces import workspace
from ttt_compiler.compat.processor import product_dtype

# Measured at D=1024 F=3072: 16 rows 68 GF/s by oneDNN, 54 by MKL; one row 24 and 25.
ONEDNN_MIN_ROWS = 16
# Below this many rows a low-precision apply reads the fp32 state itself: one pass over it is cheaper
# than refreshing a low-precision copy.
SHADOW_MIN_ROWS = 16
# From so many rows on it pays to widen W0 for a product.
WIDE_MIN_ROWS = 32


@functools.cache
def is_amd() -> bool:
    """Whether this machine's processor is AMD's."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def widened(x: Tensor, dtype: torch.dtype, slot: str) -> Tensor:
    """``x`` itself, or its copy in ``dtype`` in a workspace."""
    return x if x.dtype == dtype else workspace(slot, tuple(x.shape), dtype).copy_(x)


def apply(h: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, name: str) -> None:
    """``out = h @ w.T (+ bias)``, in the wider dtype of h and w, or in fp32 where that is faster.

    Args:
        h: ``[m, F]``.
        w: ``[D, F]``.
        bias: ``[D]`` or None.
        out: ``[m, D]`` of h's dtype.
        name: workspace slots of what is widened begin so.
    """
    dtype = _dtype_of(h) if w.dtype == h.dtype else w.dtype
    if dtype == h.dtype:
        _apply(h, w, bias, out)
        return
    y = workspace(f"{name}.y", tuple(out.shape), dtype)
    wide = None if bias is None else bias.to(dtype)
    _apply(widened(h, dtype, f"{name}.h"), widened(w, dtype, f"{name}.base"), wide, y)
    out.copy_(y)


def _apply(h: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same in one dtype."""
    if bias is None:
        product(h, w.t(), out)
    elif _by_onednn(h):
        product(h, w.t(), out.copy_(bias.expand_as(out)), accumulate=True)
    else:
        torch.addmm(bias, h, w.t(), out=out)


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``, of one dtype, by the faster library."""
    if _by_onednn(a):
        # Blocks are faster unless b is transposed, and then they do not take it.
        for way in (blocks.product, multiply):
            if way(a, b, out, accumulate=accumulate):
                return
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _by_onednn(a: Tensor) -> bool:
    return a.dtype == torch.float32 and len(a) >= ONEDNN_MIN_ROWS and is_amd()


def writes_blocks(dtype: torch.dtype) -> bool:
    """Whether a write of operands of ``dtype`` goes block by block, by the compiled loop."""
    return (is_amd() or product_dtype(dtype) == dtype != torch.float32) and blocks.there_are_blocks(dtype)


def _dtype_of(x: Tensor) -> torch.dtype:
    """In which dtype a product of x's rows is made."""
    return product_dtype(x.dtype) if len(x) >= WIDE_MIN_ROWS else x.dtype


def project(x: Tensor, p: Tensor, out: Tensor, name: str) -> Tensor:
    """``out = x @ p``, in fp32 where that is faster. x ``[m, K]``, p ``[K, N]``, out ``[m, N]``."""
    dtype = _dtype_of(x)
    if dtype == x.dtype:
        product(x, p, out)
        return out
    y = workspace(f"{name}.y", tuple(out.shape), dtype)
    product(widened(x, dtype, f"{name}.x"), widened(p, dtype, f"{name}.p"), y)
    return out.copy_(y)


def add_product(h: Tensor, keys: Tensor, values: Tensor, out: Tensor, name: str) -> None:
    """``out += (h @ keys.T) @ values``, one dtype; in fp32 where that is faster, or fp16 could overflow.

    Args:
        h: ``[m, F]``.
        keys: ``[n, F]``.
        values: ``[n, D]``.
        out: ``[m, D]``.
        name: workspace slots begin so.
    """
    dtype = torch.float32 if h.dtype == torch.float16 else _dtype_of(h)
    scores = workspace(f"{name}.scores", (len(h), len(keys)), dtype)
    product(widened(h, dtype, f"{name}.h"), widened(keys, dtype, f"{name}.keys").t(), scores)
    if dtype == h.dtype:
        product(scores, values, out, accumulate=True)
    else:
        y = widened(out, dtype, f"{name}.y")
        product(scores, widened(values, dtype, f"{name}.values"), y, accumulate=True)
        out.copy_(y)


def static_apply(h: Tensor, w0: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """The base model's own projection, by the very call that Inductor emits for it.

    Same library, same shape ``[B*T, F]``, same strides: the result is the base model's bit for bit.
    h ``[..., F]``, w0 ``[D, F]`` (any strides), bias ``[D]`` or None; returns ``[..., D]``.
    """
    flat = h.reshape(-1, h.shape[-1])
    y = h.new_empty(*h.shape[:-1], w0.shape[0]) if out is None else out
    if bias is None:
        torch.mm(flat, w0.t(), out=y.view(-1, w0.shape[0]))
    else:
        torch.addmm(bias, flat, w0.t(), out=y.view(-1, w0.shape[0]))
    return y


class FastMatrix:
    """``W [D, F]``: starts as ``base`` without a copy, becomes its own fp32 matrix at the first write.

    Args:
        base: ``[D, F]`` the slow weight, or None for a matrix that starts at zero.
        master: ``[D, F]`` in :func:`state_dtype`, where W goes; its content counts only when ``written``.
        dtype: operand dtype.
        name: workspace slot of the low-precision copy; distinct for matrices used side by side.
        written: whether ``master`` already holds W.
        turns: whether ``apply_transposed`` is called, too: both read one copy then.
    """

    def __init__(
        self,
        base: Tensor | None,
        master: Tensor,
        dtype: torch.dtype,
        *,
        name: str,
        written: bool = False,
        turns: bool = False,
    ) -> None:
        self.base = base
        # What W is as long as nothing is written.
        self.start = base
        self.master = master
        self.dtype = dtype
        self.name = name
        self.written = written
        self.turns = turns
        self._shadow: Tensor | None = None
        self._panels: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether W is known to be zero, so that products with it can be left out."""
        return self.start is None and not self.written

    def reset(self) -> None:
        """Back to ``base``."""
        self.begin(self.base)

    def begin(self, w: Tensor | None) -> None:
        """``W = w``, which is read where it lies and stays as it is: ``[D, F]``, or None for zero."""
        self.start, self.written = w, False
        self._forget_copies()

    def leave(self, master: Tensor) -> None:
        """Go on in another matrix: W stays where it is, and the next write goes to ``master``."""
        if self.written:
            self.start, self.written = self.master, False
        self.master = master

    @property
    def now(self) -> Tensor:
        """W as it lies in memory: in the state's dtype, or ``base``."""
        if self.written:
            return self.master
        assert self.start is not None, "a zero matrix lies nowhere; check is_zero first"
        return self.start

    def operand(self, rows: int) -> Tensor:
        """W to multiply ``rows`` rows with: operand dtype, or the fp32 master for a few rows."""
        w = self.now
        if w is self.base or not self._needs_shadow or rows < SHADOW_MIN_ROWS:
            return w
        if self._shadow is None:
            self._shadow = self._new_shadow().copy_(w)
        return self._shadow

    @property
    def _needs_shadow(self) -> bool:
        """Whether products of many rows read a copy of W in a narrower dtype."""
        return self.master.dtype not in (self.dtype, product_dtype(self.dtype))

    def _new_shadow(self) -> Tensor:
        return workspace(f"{self.name}.shadow", tuple(self.master.shape), self.dtype)

    def _new_panels(self) -> Tensor | None:
        """Room for the copy as :meth:`apply` reads it fastest, if there is such a one."""
        shape = panels.shape_of(self.master, self.dtype) if self._needs_shadow and not self.turns else None
        return None if shape is None else workspace(f"{self.name}.panels", shape, self.dtype)

    def _forget_copies(self) -> None:
        self._shadow = self._panels = None

    def apply(self, h: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out = h @ W.T (+ bias)``. h ``[m, F]``, out ``[m, D]``."""
        if self.now is not self.base and len(h) >= SHADOW_MIN_ROWS:
            if self._panels is None and (made := self._new_panels()) is not None:
                panels.pack(self.now, made)
                self._panels = made
            if self._panels is not None and panels.apply(h, self._panels, bias, out):
                return
        apply(h, self.operand(h.shape[0]), bias, out, self.name)

    def apply_transposed(self, x: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """``out = x @ W``, or ``out += x @ W``. x ``[m, D]``, out ``[m, F]``."""
        w = self.operand(x.shape[0])
        dtype = _dtype_of(x) if w.dtype == x.dtype else w.dtype
        if dtype != x.dtype:
            y = workspace(f"{self.name}.back", tuple(out.shape), dtype)
            w = widened(w, dtype, f"{self.name}.base")
            product(widened(x, dtype, f"{self.name}.x"), w, y)
            out.copy_(y.add_(out) if accumulate else y)
        else:
            product(x, w, out, accumulate=accumulate)

    def decay(self, factor: float) -> None:
        """``W = W0 + factor (W - W0)``, in place."""
        if factor != 1.0 and (self.written or self.start is not self.base):
            self.settle()
            self.master.mul_(factor)
            if self.base is not None:
                self.master.add_(self.base, alpha=1.0 - factor)
            self._forget_copies()

    def write(self, v: Tensor, h: Tensor) -> None:
        """``W += v.T @ h`` with fp32 accumulation. v ``[m, D]``, h ``[m, F]``."""
        if writes_blocks(self.dtype) and self._write_blocks(v, h):
            return
        if self.master.dtype == self.dtype:
            if self.is_zero:
                torch.mm(v.t(), h, out=self.master)
            elif self.written:
                self.master.addmm_(v.t(), h)
            else:
                torch.addmm(self.now, v.t(), h, out=self.master)
        else:
            # A chunk's increment may be rounded to the operand dtype (that error does not grow over
            # chunks); the sum may not: a bf16 state loses most of what is written.
            self.settle()
            # fp16 increments can overflow where their sum would not, so those are made in fp32.
            if self.dtype == torch.float16 or product_dtype(self.dtype) == self.master.dtype:
                wide = self.master.dtype
                v, h = widened(v, wide, f"{self.name}.v"), widened(h, wide, f"{self.name}.h")
                self.master.addmm_(v.t(), h)
            else:
                self.master.add_(torch.mm(v.t(), h))
        self.written = True
        self._forget_copies()

    def settle(self) -> None:
        """Bring W where it goes, by a copy if nothing was written."""
        if not self.written:
            self.master.zero_() if self.start is None else self.master.copy_(self.start)
            self.written = True

    def _write_blocks(self, v: Tensor, h: Tensor) -> bool:
        """The same block by block, if that can be; the copy for the next apply is made on the way."""
        start = None if self.written else self.start
        if start is not None and not (start.dtype == v.dtype and start.is_contiguous()):
            self.settle()
        in_panels = self._new_panels()
        copy = self._new_shadow() if self._needs_shadow and in_panels is None else None
        into = copy if in_panels is None else in_panels
        done = blocks.write(v, h, self.master, None if self.written else start, into, written=self.written)
        if done:
            self.written, self._shadow, self._panels = True, copy, in_panels
        return done
