"""How the step's kernels share out their work on a device.

May be changed here: tiles, with a measurement or the proofs of :mod:`ttt_compiler.offline`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.kernels.tiles import DECAY, INTERPRETED, RUNNING, Tile, architecture, shipped


def tile_for(x: Tensor, decay: float = 1.0) -> Tile:
    """The tile of W that a program of the scan, or of a write, holds.

    Args:
        x: operands.
        decay: gamma.

    Raises:
        UnsupportedDeviceError: none is shipped for the device.
    """
    if x.device.type == "cpu":
        return INTERPRETED
    return shipped(architecture(x.device), x.dtype, RUNNING if decay == 1.0 else DECAY)[0]


def groups_for(x: Tensor, tile: Tile, outer: int) -> int:
    """Programs that share the columns of W, so that all rows together fill the device.

    Args:
        x: ``[B, T, I]`` operands.
        tile: of the scan.
        outer: O.
    """
    rows = max(1, x.shape[0])
    programs = 2 if x.device.type == "cpu" else _processors(x)
    return tile.groups(outer, x.shape[2], -(-programs // rows))


def _processors(x: Tensor) -> int:
    count: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return count


def programs_per_row(x: Tensor) -> int:
    """Programs that one row of the batch gets in kernels which mostly exit at once."""
    return 2 if x.device.type == "cpu" else 2 * _processors(x)
