"""Which library call multiplies, and the fast matrix that is applied and written by two GEMMs per chunk.

May be changed here: the choice of call, with a measurement. The rule in force: results land in buffers
that exist already (fresh large tensors cost about eight times their fill in page faults); fp32 GEMMs of
many rows go to oneDNN on AMD processors, where MKL takes slower kernels (measured 0.74-0.96 of MKL's
time), and to MKL elsewhere; a write is ``addmm`` in place.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from ttt_compiler.compat import onednn_linear

ONEDNN_MIN_ROWS = 256
# Below this many rows a low-precision apply reads the fp32 state itself: one pass over it is cheaper
# than refreshing a low-precision copy.
SHADOW_MIN_ROWS = 16


_local = threading.local()


def workspace(slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer that outlives the call, one per thread and slot; its content is undefined.

    Only the last size per slot is kept, so what is held is one site of the model used last.
    """
    held: dict[str, Tensor] = _local.__dict__.setdefault("held", {})
    buffer = held.get(slot)
    if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
        # A buffer made under inference mode could not be written by a later call outside of it.
        with torch.inference_mode(False):
            buffer = held[slot] = torch.empty(shape, dtype=dtype)
    return buffer


@functools.cache
def is_amd() -> bool:
    """Whether this machine's processor is AMD's."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def apply(h: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = h @ w.T (+ bias)``. h ``[m, F]``, w ``[D, F]`` of the same dtype, out ``[m, D]``."""
    if (
        h.dtype == torch.float32
        and h.shape[0] >= ONEDNN_MIN_ROWS
        and w.is_contiguous()
        and h.is_contiguous()
        and is_amd()
        and torch.backends.mkldnn.is_available()
    ):
        out.copy_(onednn_linear(h, w, bias))
    elif bias is None:
        torch.mm(h, w.t(), out=out)
    else:
        torch.addmm(bias, h, w.t(), out=out)


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
        master: ``[D, F]`` storage in :func:`state_dtype`; its content counts only when ``written``.
        dtype: operand dtype.
        name: workspace slot of the low-precision copy; distinct for matrices used side by side.
        written: whether ``master`` already holds W.
    """

    def __init__(
        self,
        base: Tensor | None,
        master: Tensor,
        dtype: torch.dtype,
        *,
        name: str,
        written: bool = False,
    ) -> None:
        self.base = base
        self.master = master
        self.dtype = dtype
        self.name = name
        self.written = written
        self._shadow: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Whether W is known to be zero, so that products with it can be left out."""
        return self.base is None and not self.written

    def reset(self) -> None:
        """Back to ``base``."""
        self.written = False
        self._shadow = None

    def operand(self, rows: int) -> Tensor:
        """W to multiply ``rows`` rows with: operand dtype, or the fp32 master for a few rows."""
        if not self.written:
            assert self.base is not None, "a zero matrix has no operand; check is_zero first"
            return self.base
        if self.master.dtype == self.dtype or rows < SHADOW_MIN_ROWS:
            return self.master
        if self._shadow is None:
            self._shadow = workspace(f"{self.name}.shadow", tuple(self.master.shape), self.dtype)
            self._shadow.copy_(self.master)
        return self._shadow

    def apply(self, h: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """``out = h @ W.T (+ bias)``. h ``[m, F]``, out ``[m, D]``."""
        w = self.operand(h.shape[0])
        if w.dtype == h.dtype:
            apply(h, w, bias, out)
        else:
            y = h.to(w.dtype) @ w.t()
            out.copy_(y if bias is None else y + bias)

    def apply_transposed(self, x: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """``out = x @ W``, or ``out += x @ W``. x ``[m, D]``, out ``[m, F]``."""
        w = self.operand(x.shape[0])
        if w.dtype != x.dtype:
            y = x.to(w.dtype) @ w
            out.copy_(y + out if accumulate else y)
        elif accumulate:
            out.addmm_(x, w)
        else:
            torch.mm(x, w, out=out)

    def decay(self, factor: float) -> None:
        """``W = W0 + factor (W - W0)``, in place."""
        if self.written and factor != 1.0:
            self.master.mul_(factor)
            if self.base is not None:
                self.master.add_(self.base, alpha=1.0 - factor)
            self._shadow = None

    def write(self, v: Tensor, h: Tensor) -> None:
        """``W += v.T @ h`` with fp32 accumulation. v ``[m, D]``, h ``[m, F]``."""
        if self.master.dtype == self.dtype:
            if self.written:
                self.master.addmm_(v.t(), h)
            elif self.base is None:
                torch.mm(v.t(), h, out=self.master)
            else:
                torch.addmm(self.base, v.t(), h, out=self.master)
        else:
            # A chunk's increment may be rounded to the operand dtype (that error does not grow over
            # chunks); the sum may not: a bf16 state loses most of what is written.
            if not self.written:
                self.master.zero_() if self.base is None else self.master.copy_(self.base)
            # fp16 increments can overflow where their sum would not, so those are made in fp32.
            if self.dtype == torch.float16:
                v, h = v.to(self.master.dtype), h.to(self.master.dtype)
            self.master.add_(torch.mm(v.t(), h))
        self.written = True
        self._shadow = None
