"""Which of the MLPs that were found become fast weights, by ``TTTConfig.layers``.

May be changed here: selectors, together with the check in ``config.py``. Indices are block indices as the
model numbers its blocks; a wrong index raises, it is never dropped.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from ttt_compiler.config import TTTConfig
from ttt_compiler.discovery.found import FoundMLP
from ttt_compiler.errors import LayerSelectionError

_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def block_indices(keys: Sequence[str]) -> list[int]:
    """Block index per weight name: the first number in it, or its order when names carry none.

    ``keys`` are in graph order.
    """
    found = [_INDEX.search(key) for key in keys]
    if all(found):
        return [int(m[1]) for m in found if m]
    return list(range(len(keys)))


def choose_layers(config: TTTConfig, mlps: Sequence[FoundMLP]) -> tuple[FoundMLP, ...]:
    """The chosen MLPs, in graph order.

    Raises:
        LayerSelectionError: an index or pattern that matches nothing, with what exists.
    """
    keys = [m.weight for m in mlps]
    blocks = block_indices(keys)
    every = config.every()
    if callable(config.layers):
        chosen = {m.weight for m in mlps if config.layers(m)}
    elif config.layers == "all":
        chosen = set(keys)
    elif every is not None:
        chosen = {
            k for k, b in zip(keys, blocks, strict=True) if b >= every[1] and (b - every[1]) % every[0] == 0
        }
    else:
        chosen = set()
        for selector in config.layers:
            if isinstance(selector, int):
                hits = {k for k, b in zip(keys, blocks, strict=True) if b == selector}
                known = f"blocks with an MLP: {_ranges(blocks)}"
            else:
                hits = set(fnmatch.filter(keys, selector))
                known = f"weights: {', '.join(keys)}"
            if not hits:
                raise LayerSelectionError(f"layers={selector!r} matches no MLP of this model; {known}")
            chosen |= hits
    if not chosen:
        raise LayerSelectionError(
            f"layers={config.layers!r} selects none of the {len(keys)} MLPs; blocks with an MLP: "
            f"{_ranges(blocks)}"
        )
    return tuple(m for m in mlps if m.weight in chosen)


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``"0-2, 5"``."""
    out: list[list[int]] = []
    for n in sorted(set(numbers)):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)
