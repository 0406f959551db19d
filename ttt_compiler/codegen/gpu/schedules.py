"""How the step's kernels share out their work on a device.

May be changed here: tiles, with a measurement or the proofs of :mod:`ttt_compiler.offline`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.kernels.decode_controls import Blocks
from ttt_compiler.codegen.kernels.tiles import DECAY, INTERPRETED, RUNNING, Tile, architecture, shipped


def tile_for(x: Tensor, decay: float = 1.0) -> Tile:
    """The tile of W that a program of the scan, or of a write, holds.

    Args:
        x: operands.
        decay: gamma.

    Raises:
        UnsupportedDeviceError: none is shipped for the device.
    """
    if interpreted(x):
        return INTERPRETED
    return shipped(architecture(x.device), x.dtype, RUNNING if decay == 1.0 else DECAY)[0]


def write_tile_for(x: Tensor) -> Tile:
    """The tile of W that a program of a write holds: smaller, since its loads are gathers."""
    return INTERPRETED if interpreted(x) else shipped(architecture(x.device), x.dtype, DECAY)[0]


def groups_for(x: Tensor, tile: Tile, outer: int) -> int:
    """Programs that share the columns of W, so that all rows together fill the device.

    Args:
        x: ``[B, T, I]`` operands.
        tile: of the scan.
        outer: O.
    """
    rows = max(1, x.shape[0])
    programs = 2 if interpreted(x) else _processors(x)
    return tile.groups(outer, x.shape[2], -(-programs // rows))


def blocks_for(x: Tensor, kept: Tensor) -> Blocks:
    """How v of one chunk is shared out.

    Args:
        x: operands.
        kept: tokens of the tail, wider than x under autocast.
    """
    programs = programs_per_row(x)
    if interpreted(x):
        return Blocks(16, 32, 32, programs, 4)
    edge = block_for(x if x.dtype.itemsize >= kept.dtype.itemsize else kept)
    return Blocks(edge, edge, edge, programs, warps_for(x))


def block_for(x: Tensor) -> int:
    """Edge of the square tiles of a product with W0."""
    return 64 if not interpreted(x) and _has_room(x) else 32


def warps_for(x: Tensor) -> int:
    """Warps of a program that multiplies square tiles.

    Products of fp32 take registers for all of their operands; sm_100 reads sums back from tensor memory into
    registers, and spills with four warps.
    """
    if interpreted(x):
        return 4
    return 8 if x.dtype == torch.float32 or architecture(x.device) == "sm_100" else 4


def _has_room(x: Tensor) -> bool:
    """Whether three stages of tiles with an edge of 64 fit shared memory: 16-bit ones, on NVIDIA's."""
    return x.dtype.itemsize == 2 and architecture(x.device).startswith("sm_")


def interpreted(x: Tensor) -> bool:
    """Whether kernels on these operands run in the interpreter, which is quicker on small tiles."""
    return x.device.type == "cpu"


def _processors(x: Tensor) -> int:
    count: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return count


def programs_per_row(x: Tensor) -> int:
    """Programs that one row of the batch gets in kernels which mostly exit at once."""
    return 2 if interpreted(x) else 2 * _processors(x)
