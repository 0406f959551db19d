"""How the step's kernels share out their work on a device.

May be changed here: tiles, with a measurement or the proofs of :mod:`ttt_compiler.codegen.offline`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.codegen.kernels.tiles import INTERPRETED, SHIPPED, Tile, operand_bytes
from ttt_compiler.errors import UnsupportedDeviceError


def tile_for(x: Tensor) -> Tile:
    """The tile of W that a program of the scan, or of a write, holds.

    Raises:
        UnsupportedDeviceError: none is shipped for the device.
    """
    if x.device.type == "cpu":
        return INTERPRETED
    arch = "gfx942" if torch.version.hip else "sm_{}{}".format(*torch.cuda.get_device_capability(x.device))
    if arch not in SHIPPED:
        raise UnsupportedDeviceError(
            f"no fast-weight schedule is shipped for {arch}; there are some for {', '.join(SHIPPED)}"
        )
    return SHIPPED[arch][operand_bytes(x.dtype)][0]


def programs_per_row(x: Tensor) -> int:
    """Programs that one row of the batch gets in kernels which mostly exit at once."""
    return (
        2 if x.device.type == "cpu" else 2 * torch.cuda.get_device_properties(x.device).multi_processor_count
    )
