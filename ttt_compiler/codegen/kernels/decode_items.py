"""From the plan of a token to the chunks it concerns, and from a row's tokens to entries of the ring.

Shared by the kernels that compute v. May be changed here: together with the columns of the plan
(:mod:`.decode_plan`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_of(plan, i_n, CACHE: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr):
    """Whether item n is a chunk, its row of the tables, its first token, and where its v goes."""
    row = plan + (i_n // PLACES).to(tl.int64) * 14
    member = tl.load(row + 12)
    first = tl.load(row + 4)
    if CACHE:
        i_c = i_n % PLACES
        index = first // CHUNK + i_c
        active = (i_c < tl.load(row + 5)) & (index >= tl.load(row + 11))
        first += i_c * CHUNK
        to = member * PLACES + index % PLACES
    else:
        active = tl.load(row + 9) != 0
        to = i_n.to(tl.int64)
    return active, member, first, to


@triton.jit
def entries(lanes, member, token, A, mask, HAS_LANES: tl.constexpr):
    """Where tokens of a row stand in the ring."""
    column = token % A
    if HAS_LANES:
        lane = tl.load(lanes + member * A + column, mask=mask, other=0).to(tl.int64)
    else:
        lane = member + tl.zeros_like(column)
    return lane * A + column
