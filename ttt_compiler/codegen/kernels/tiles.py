"""Tiles of the scan kernel: what one program holds, and how many programs share a row of W.

The shipped ones are compiled for every architecture in the tests: no spills, shared memory within the limit
(``docs/kernels.md``). May be changed here: tiles, together with that page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ttt_compiler.errors import UnsupportedDeviceError


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


# What a scan is used for; more arguments leave fewer registers for the tile.
SCAN, GRADIENT, RUNNING = "scan", "gradient", "running"


def _everywhere(*tiles: Tile) -> dict[str, tuple[Tile, ...]]:
    return dict.fromkeys((SCAN, GRADIENT, RUNNING), tiles)


# By architecture, bytes of an operand and use: best first for a large W.
SHIPPED: dict[str, dict[int, dict[str, tuple[Tile, ...]]]] = {
    "sm_80": {
        2: _everywhere(Tile(16, 64, 128, 8, 2, fill=108), Tile(32, 32, 128, 8, 2, fill=108)),
        4: _everywhere(Tile(16, 16, 16, 4, 1, fill=108)),
    },
    "sm_90": {
        2: {
            SCAN: (Tile(64, 64, 256, 8, 2), Tile(64, 128, 64, 8, 2), Tile(64, 64, 128, 8, 3)),
            GRADIENT: (Tile(64, 64, 128, 8, 3), Tile(64, 128, 64, 8, 2), Tile(64, 64, 64, 4, 2)),
            RUNNING: (Tile(64, 64, 256, 8, 2), Tile(64, 128, 64, 8, 2), Tile(64, 64, 128, 8, 3)),
        },
        4: _everywhere(Tile(16, 16, 16, 4, 1)),
    },
    "sm_100": {
        2: {
            SCAN: (Tile(64, 64, 128, 8, 3, fill=148), Tile(64, 64, 64, 8, 2, fill=148)),
            GRADIENT: (Tile(64, 64, 128, 8, 3, fill=148), Tile(64, 64, 64, 8, 2, fill=148)),
            RUNNING: (Tile(64, 64, 64, 8, 2, fill=148),),
        },
        4: _everywhere(Tile(16, 16, 16, 4, 1, fill=148)),
    },
    "gfx942": {
        2: _everywhere(Tile(32, 64, 32, 8, 2, fill=304)),
        4: _everywhere(Tile(32, 32, 64, 8, 2, fill=304)),
    },
}
INTERPRETED = Tile(16, 16, 32, 4, 1, fill=2)


def tiles_for(device: torch.device, dtype: torch.dtype, use: str) -> tuple[Tile, ...]:
    """Tiles for a device, best first.

    Args:
        device: where the operands are.
        dtype: of the operands.
        use: ``SCAN``, ``GRADIENT`` or ``RUNNING``.

    Raises:
        UnsupportedDeviceError: no tile was compiled for its architecture.
    """
    if device.type == "cpu":
        return (INTERPRETED,)
    return SHIPPED[architecture(device)][dtype.itemsize][use]


def architecture(device: torch.device) -> str:
    """The key of ``SHIPPED`` for a device.

    Raises:
        UnsupportedDeviceError: see :func:`tiles_for`.
    """
    if device.type == "cuda" and torch.version.hip:
        name = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    elif device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{major}{minor}"
    else:
        name = device.type
    if name not in SHIPPED:
        raise UnsupportedDeviceError(
            f"no fast-weight kernel was compiled and checked for {name} ({device}). Checked: "
            f"{', '.join(SHIPPED)}. Type model.to('cpu'), or add tiles to codegen/kernels/tiles.py"
        )
    return name
