"""A bf16 copy of W in the order in which oneDNN's block product reads it, and products of many rows with it.

torch's product of ``h`` and ``W.T`` puts W into that order first, in every call. A write makes the copy
anyway (:mod:`.blocks`), while a block of W is in the cache: in this order it costs no more, and products are
faster by what the ordering took. Measured on an AMD EPYC, D=1024 F=3072, GF/s by torch and here: 128 rows 193
and 216, 256 rows 209 and 222, 512 rows 213 and 225. May be changed here: the order, with ``panels.cpp``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native.blocks import there_are_blocks
from ttt_compiler.compat.processor import block_product, product_dtype

# Rows of a panel, and columns of what is put into order at once.
_ROWS, _COLUMNS = 64, 32


def shape_of(w: Tensor, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Of a copy of ``w`` ``[D, F]``: D / 64 panels of F / 2 rows of 64 pairs. None: there is none."""
    return _shape(*w.shape) if _there(dtype) and w.dtype == torch.float32 and w.is_contiguous() else None


def shape_of_turned(p: Tensor) -> tuple[int, ...] | None:
    """The same of a copy of ``W = p.T``, for products ``h @ p``; p ``[F, D]`` in the copy's dtype."""
    return _shape(*p.shape[::-1]) if _there(p.dtype) and p.is_contiguous() else None


def _shape(d: int, f: int) -> tuple[int, ...] | None:
    return None if d % _ROWS or f % _COLUMNS else (d // _ROWS, f // 2, _ROWS, 2)


def pack(w: Tensor, panels: Tensor) -> None:
    """Fill ``panels`` (:func:`shape_of`) with ``w``, fp32 ``[D, F]`` in one piece."""
    native.function("pack", panels.dtype)(w.data_ptr(), panels.data_ptr(), *w.shape, torch.get_num_threads())


def pack_turned(p: Tensor, panels: Tensor) -> None:
    """Fill ``panels`` (:func:`shape_of_turned`) with ``p`` ``[F, D]``, turned."""
    function = native.function("pack_turned", panels.dtype)
    function(p.data_ptr(), panels.data_ptr(), *p.shape, torch.get_num_threads())


def apply(h: Tensor, panels: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """``out = h @ W.T + bias`` of W in ``panels``, summed in fp32; all bf16.

    Args:
        h: ``[m, F]``.
        panels: see :func:`shape_of`.
        bias: ``[D]`` or None.
        out: ``[m, D]``.

    Returns:
        Whether it was done; if not, nothing has changed.
    """
    operands = [h, out] if bias is None else [h, out, bias]
    if not all(x.dtype == panels.dtype and x.is_contiguous() for x in operands):
        return False
    of_bias = None if bias is None else bias.data_ptr()
    addresses = block_product(panels.dtype)
    function = native.function("panels", panels.dtype)
    assert addresses is not None, "there are panels"
    sizes = len(h), out.shape[1], h.shape[1], torch.get_num_threads()
    if not function(*addresses, h.data_ptr(), panels.data_ptr(), of_bias, out.data_ptr(), *sizes):
        raise RuntimeError(f"oneDNN made a block product once and failed now, {tuple(h.shape)}")
    return True


def _there(dtype: torch.dtype) -> bool:
    """Whether this processor makes products of such operands itself, block by block."""
    return dtype == torch.bfloat16 == product_dtype(dtype) and there_are_blocks(dtype)
