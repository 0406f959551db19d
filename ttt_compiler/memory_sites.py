"""Fast weights in a plan of memory: sites of one shape, and the formula of what one takes.

May be changed here: how it is said. What a site takes belongs to ``runtime/tables.py``, which allocates it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ttt_compiler.codegen.layout import COLUMNS, NORMS, WIDE_COLUMNS, WIDE_NORMS, spread_tokens
from ttt_compiler.runtime.tables import bytes_per_sequence
from ttt_compiler.spec import SiteSpec, state_dtype

# What runtime/tables.py allocates per site and sequence; a test evaluates this text against it.
FORMULA = "D F a + (C + R + S)(F + Dt) e + C ceil((R + S) / C) D e + m a + 8 n"
SHARED = " + 4 (C + R + S)"


@dataclass(frozen=True)
class SiteKind:
    """Fast weights of the same shape.

    Attributes:
        sites: how many.
        d_model, d_ff, d_target, chunk: D, F, Dt and C.
        revocable: R.
        spread: S, tokens over which a write may be spread; 0 on a GPU, and where it cannot.
        state_itemsize, itemsize: a and e, bytes of one number of the state and of the model.
        nbytes: of one site and sequence.
    """

    sites: int
    d_model: int
    d_ff: int
    d_target: int
    chunk: int
    revocable: int
    spread: int
    state_itemsize: int
    itemsize: int
    nbytes: int

    @property
    def name(self) -> str:
        """D x F."""
        return f"{self.d_model} x {self.d_ff}"

    @property
    def variables(self) -> dict[str, int]:
        """The variables of :data:`FORMULA`."""
        names = {"D": self.d_model, "F": self.d_ff, "Dt": self.d_target, "C": self.chunk}
        names |= {"R": self.revocable, "S": self.spread, "a": self.state_itemsize, "e": self.itemsize}
        m, n = (WIDE_NORMS, WIDE_COLUMNS) if self.spread else (NORMS, COLUMNS)
        return {**names, "m": m, "n": n}


def site_kinds(
    specs: Sequence[SiteSpec], dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[SiteKind, ...]:
    """Sites by their shape; ``options`` are those of ``bytes_per_sequence``."""
    shapes: Counter[tuple[int, int, int, int, int, int]] = Counter()
    sizes = {}
    for s in specs:
        spread = spread_tokens(s) if options["spread"] else 0
        shape = (s.d_model, s.d_ff, s.d_target, s.chunk, options["revocable"], spread)
        shapes[shape] += 1
        # Without what a sequence takes once, however many sites it has.
        sizes[shape] = bytes_per_sequence([s], dtype, **options) - bytes_per_sequence([], dtype, **options)
    itemsizes = (state_dtype(dtype).itemsize, dtype.itemsize)
    return tuple(SiteKind(count, *shape, *itemsizes, sizes[shape]) for shape, count in shapes.items())
