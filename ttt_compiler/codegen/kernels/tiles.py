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
    """

    tokens: int
    outer: int
    inner: int
    warps: int
    stages: int

    @property
    def schedule(self) -> tuple[int, int, int, int, int]:
        """All of it, as a key."""
        return self.tokens, self.outer, self.inner, self.warps, self.stages

    def group_choices(self, inner: int) -> list[int]:
        """Numbers of programs that may share the columns of W. Each has an fp32 output of its own.

        Args:
            inner: I.
        """
        tiles = -(-inner // self.inner)
        return [g for g in (1, 2, 3, 4, 6, 8) if g < tiles] + [tiles] * (tiles <= 8)

    def groups(self, outer: int, inner: int, programs: int = 2) -> int:
        """The least of :meth:`group_choices` that gives so many programs for one row of a batch."""
        rows = -(-outer // self.outer)
        choices = self.group_choices(inner)
        return next((g for g in choices if g * rows >= programs), choices[-1])


# What a scan is used for; more arguments leave fewer registers for the tile.
SCAN, DECAY, GRADIENT, RUNNING = "scan", "decay", "gradient", "running"


def _everywhere(*tiles: Tile) -> dict[str, tuple[Tile, ...]]:
    return dict.fromkeys((SCAN, DECAY, GRADIENT, RUNNING), tiles)


# By architecture, bytes of an operand and use: best first for a large W.
SHIPPED: dict[str, dict[int, dict[str, tuple[Tile, ...]]]] = {
    "sm_80": {
        2: _everywhere(Tile(16, 64, 128, 8, 2), Tile(32, 32, 128, 8, 2)),
        4: _everywhere(Tile(16, 16, 32, 4, 1)),
    },
    "sm_90": {
        2: {
            SCAN: (Tile(64, 64, 256, 8, 3), Tile(64, 64, 128, 8, 3)),
            DECAY: (Tile(64, 64, 128, 8, 3),),
            GRADIENT: (Tile(64, 64, 128, 8, 3),),
            RUNNING: (Tile(64, 64, 256, 8, 3), Tile(64, 64, 128, 8, 3)),
        },
        4: _everywhere(Tile(16, 16, 32, 4, 1)),
    },
    "sm_100": {
        2: {
            SCAN: (Tile(64, 64, 128, 8, 3), Tile(64, 64, 64, 8, 2)),
            DECAY: (Tile(64, 64, 64, 8, 2),),
            GRADIENT: (Tile(64, 64, 128, 8, 3), Tile(64, 64, 64, 8, 2)),
            RUNNING: (Tile(64, 64, 64, 8, 2),),
        },
        4: _everywhere(Tile(16, 16, 32, 4, 1)),
    },
    "gfx942": {
        2: {
            SCAN: (Tile(32, 64, 32, 8, 2), Tile(32, 64, 32, 8, 1)),
            DECAY: (Tile(16, 32, 32, 8, 1),),
            GRADIENT: (Tile(32, 64, 32, 8, 1), Tile(32, 32, 32, 8, 2)),
            RUNNING: (Tile(32, 64, 32, 8, 2), Tile(32, 64, 32, 8, 1)),
        },
        4: _everywhere(Tile(16, 32, 32, 8, 1)),
    },
}
INTERPRETED = Tile(16, 16, 32, 4, 1)


def shipped(arch: str, dtype: torch.dtype, use: str) -> tuple[Tile, ...]:
    """Tiles that were compiled and checked.

    Args:
        arch: key of ``SHIPPED``.
        dtype: of the operands.
        use: ``SCAN``, ``DECAY``, ``GRADIENT`` or ``RUNNING``.

    Raises:
        UnsupportedDeviceError: the matrix units have no products of ``dtype``.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedDeviceError(
            f"fast weights in {dtype} do not run on {arch}: its matrix units have no such products. Use "
            "float32, bfloat16 or float16 there, or model.to('cpu')"
        )
    return SHIPPED[arch][dtype.itemsize][use]


def architecture(device: torch.device) -> str:
    """The key of ``SHIPPED`` for a device.

    Raises:
        UnsupportedDeviceError: no tile was compiled for its architecture.
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
