"""Tiles of the scan kernel: what one program holds, and how many programs share a row of W.

The shipped ones are compiled for every architecture in the tests: no spills, shared memory within the limit
(``docs/kernels.md``). May be changed here: tiles, together with that page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """A schedule of :mod:`ttt_compiler.codegen.kernels.chunk_scan`.

    Attributes:
        tokens: BM, tokens that are read at once.
        outer: BO, rows of W in a tile.
        inner: BI, columns of W in a tile.
        warps: of a program.
        stages: of the software pipeline.
        fill: programs that fill the device; decides how the columns of W are shared out.
    """

    tokens: int
    outer: int
    inner: int
    warps: int
    stages: int
    fill: int = 132

    def groups(self, outer: int, inner: int, batch: int) -> int:
        """S: programs along I. Not 1 unless there is one tile: a sum over S must remain.

        Args:
            outer: O.
            inner: I.
            batch: B.
        """
        tiles = -(-inner // self.inner)
        rows = -(-outer // self.outer) * batch
        return min(tiles, max(2, -(-self.fill // rows)))


_SMALL = (Tile(16, 16, 16, 4, 1), Tile(32, 32, 64, 4, 2))
# By architecture and bytes of an operand: best first for a large W.
SHIPPED: dict[str, dict[int, tuple[Tile, ...]]] = {
    "sm_80": {2: (Tile(32, 64, 128, 8, 2, fill=108),), 4: (Tile(32, 64, 64, 8, 2, fill=108),)},
    "sm_90": {
        2: (Tile(64, 64, 256, 8, 2), Tile(64, 128, 128, 8, 2), Tile(64, 64, 128, 8, 3)),
        4: (Tile(64, 64, 64, 8, 2),),
    },
    "sm_100": {2: (Tile(64, 64, 128, 8, 3, fill=148),), 4: (Tile(64, 64, 64, 8, 2, fill=148),)},
    "gfx942": {2: (Tile(32, 64, 64, 8, 2, fill=304),), 4: (Tile(32, 32, 64, 8, 2, fill=304),)},
}
INTERPRETED = Tile(16, 16, 32, 4, 1, fill=2)


def operand_bytes(dtype: torch.dtype) -> int:
    """Key of ``SHIPPED``. Products of float64 do not exist on these devices."""
    return dtype.itemsize
