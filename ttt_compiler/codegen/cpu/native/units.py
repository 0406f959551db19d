"""v of a chunk ahead of its end, unit by unit.

A unit is so small that a step has time for it: some tokens, and a part of P's columns. Reading P and the
tokens is what it costs beside its products, and the convolution, which the units of the same tokens share.
Measured for P of 1024 x 1024: MKL and oneDNN, which pack P first, take twice as long; and what finds the
tokens took as long again in Python, so a step makes its units itself (``decode.cpp``). May be changed here:
which tokens and columns a unit has; v does not depend on when it is made.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.layout import VALUES, StateTensors
from ttt_compiler.spec import SiteSpec

# Tokens of a unit, and how many units share them: the first one is their convolution, the others have so many
# columns that as little is read of P as of the tokens. A chunk's last tokens come late: many columns of few.
_SPANS, _LAST = ((64, 1 + 16), (32, 1 + 8)), (4, 2)
# Elements of W from which on more than one thread reads it, and makes v: together with op.cpp.
_MANY = 1 << 16


class Unit(NamedTuple):
    """Tokens of a chunk and a part of what makes their v: part 0 of many tokens is their convolution alone.

    Attributes:
        first: the first token.
        stop: the token behind the last one.
        part: which part.
        parts: of how many.
    """

    first: int
    stop: int
    part: int
    parts: int


@functools.cache
def units(chunk: int) -> tuple[Unit, ...]:
    """The units of a chunk of so many tokens, in the order in which they are made."""
    found: list[Unit] = []
    first = 0
    for tokens, parts in _SPANS:
        # At least as many tokens follow: their room in v holds the convolution meanwhile.
        while chunk - first >= 2 * tokens:
            found += [Unit(first, first + tokens, part, parts) for part in range(parts)]
            first += tokens
    tokens, parts = _LAST
    for i in range(first, chunk, tokens):
        found += [Unit(i, min(i + tokens, chunk), part, parts) for part in range(parts)]
    return tuple(found)


@functools.cache
def table_of(chunk: int) -> ctypes.Array[ctypes.c_int64]:
    """:func:`units` as C++ reads them."""
    numbers = [x for unit in units(chunk) for x in unit]
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def bits_of(x: float) -> int:
    """A double as C++ finds it in an int64."""
    return int(struct.unpack("q", struct.pack("d", x))[0])


def material_of(state: StateTensors, conv: Tensor, proj: Tensor | None, spec: SiteSpec) -> array[int]:
    """``struct Material``: what makes v of a site's rows, as pointers and sizes.

    The operands must outlive it: conv ``[Dt, 1, K]``, proj ``[Dt, D]`` or None. Where they have another dtype
    than the tail, or are not contiguous, there are no units: v is left to :func:`make_units` at the border.
    """
    _, d, f = state.w.shape
    fits = all(x.dtype == state.tail_h.dtype and x.is_contiguous() for x in (conv, proj) if x is not None)
    return array(
        "q",
        (
            state.tail_h.data_ptr(),
            state.tail_t.data_ptr(),
            state.tail_v.data_ptr(),
            state.lanes.data_ptr() if state.lanes.shape[1] else 0,
            state.norms.data_ptr(),
            conv.data_ptr(),
            0 if proj is None else proj.data_ptr(),
            ctypes.addressof(table_of(spec.chunk)),
            len(units(spec.chunk)) if fits else 0,
            state.norms.shape[1],
            d,
            f,
            state.tail_t.shape[2],
            spec.chunk,
            state.tail_h.shape[1],
            state.tail_v.stride(0),
            conv.shape[-1],
            bits_of(spec.write_scale),
            torch.get_num_threads() if d * f >= _MANY else 1,
        ),
    )


def make_units(
    counts: list[int],
    row: int,
    state: StateTensors,
    conv: Tensor,
    proj: Tensor | None,
    spec: SiteSpec,
    most: int,
) -> None:
    """The next units of the incomplete or just completed chunk of a row; there must be a compiler.

    Args:
        counts: its row of the table, where VALUES is counted on.
        row: which one.
        state: the site's tensors; v and its norms are changed.
        conv: ``[Dt, 1, K]``.
        proj: ``[Dt, D]`` or None.
        spec: the site's constants.
        most: how many units at most; fewer where the tokens that they see are not there.
    """
    dtype = state.tail_h.dtype
    function = native.function("units", dtype)
    assert function is not None, "v of a few tokens is made in C++"
    conv = conv.to(dtype).contiguous()
    proj = None if proj is None else proj.to(dtype).contiguous()
    me, material = array("q", counts), material_of(state, conv, proj, spec)
    function(material.buffer_info()[0], me.buffer_info()[0], row, most)
    counts[VALUES] = me[VALUES]
