"""What our GPU kernel costs: a tile of W stays in registers for a whole scan.

One program owns a tile ``[BD, BF]`` of W in fp32 registers over all T tokens. The grid is
``ceil(D/BD) x S x B``: each of the S groups walks its F tiles one after another and adds into its own fp32
partial output ``[B, T, D]`` (the first tile stores, later ones load, add and store); a second, pointwise
kernel adds the S partials. Per chunk the tile is rounded once to the operands' dtype into shared memory; per
subtile of BM tokens one tile of h ``[BM, BF]`` and one of v ``[BM, BD]`` are read once and serve apply and
write.

So W moves once per scan, h is read ceil(D/BD) times, v ceil(F/BF) times, and a partial output is touched
ceil(F/BF) times. May be changed here: the count, together with the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.forms import L2_SHARE, ScanShape
from ttt_compiler.codegen.kernels.tiles import SHIPPED, Tile, shipped
from ttt_compiler.codegen.phases import Phase, stream

# Registers of a thread besides its part of W and of the output tile: addresses, operand fragments, masks.
_OTHER_REGISTERS = 40
# Rows of one matrix instruction as far as reads of shared memory go: each block of so many rows of the first
# operand reads all of the second.
_ROW_BLOCK = 64


@dataclass(frozen=True)
class ScanConfig:
    """Tiles of the kernel.

    Attributes:
        bm: tokens of a subtile.
        bd: rows of W of a program.
        bf: columns of W of a program.
        warps: of a program.
        groups: S, how many programs share the columns of W.
        stages: subtiles of h and v in shared memory at a time.
    """

    bm: int
    bd: int
    bf: int
    warps: int = 8
    groups: int = 1
    stages: int = 2


def config_of(tile: Tile, groups: int) -> ScanConfig:
    """A tile with a number of programs that share the columns of W."""
    return ScanConfig(tile.tokens, tile.outer, tile.inner, tile.warps, groups, tile.stages)


def shipped_configs(arch: str, dtype: torch.dtype, use: str, inner: int) -> tuple[ScanConfig, ...]:
    """The tiles that are shipped for a use, with every choice of groups; none for processors.

    Args:
        arch: of a GPU, or of a processor.
        dtype: of the operands.
        use: of the tiles.
        inner: columns of W.
    """
    tiles = shipped(arch, dtype, use) if arch in SHIPPED else ()
    return tuple(config_of(t, groups) for t in tiles for groups in t.group_choices(inner))


def workspace_bytes(config: ScanConfig, shape: ScanShape) -> int:
    """Bytes of the partial outputs."""
    return config.groups * shape.batch * shape.tokens * shape.d_model * 4


def shared_bytes(config: ScanConfig, shape: ScanShape) -> int:
    """Shared memory of a program: the rounded tile of W, and subtiles of h and v under way."""
    subtile = config.bm * (config.bf * (1 + shape.apart) + config.bd)
    return (config.bd * config.bf + config.stages * subtile) * shape.dtype.itemsize


def thread_registers(config: ScanConfig, device: Device) -> int:
    """32-bit registers of a thread: its part of the fp32 tile of W and of the output, and the rest."""
    tile = config.bd * config.bf + config.bm * config.bd
    return math.ceil(tile / (config.warps * device.warp)) + _OTHER_REGISTERS


def why_not(config: ScanConfig, shape: ScanShape, device: Device) -> str | None:
    """Why a configuration cannot run on a device, or None."""
    if not device.overlaps:
        return f"{device.name} runs no GPU kernel"
    for name in ("bm", "bd", "bf"):
        size = getattr(config, name)
        if size < 16 or size & (size - 1):
            return f"{name}={size} must be a power of two of at least 16"
    if config.groups > math.ceil(shape.d_ff / config.bf):
        return f"{config.groups} groups share {math.ceil(shape.d_ff / config.bf)} tiles"
    shared = shared_bytes(config, shape)
    if shared > device.shared_block:
        return f"{shared:,} bytes of shared memory, {device.name} has {device.shared_block:,} for a program"
    registers = thread_registers(config, device)
    if registers > device.registers_thread:
        return f"{registers} registers per thread, {device.name} has {device.registers_thread}"
    return None


def resident(config: ScanConfig, shape: ScanShape, device: Device) -> int:
    """Programs that fit an SM at a time."""
    by_shared = device.shared // shared_bytes(config, shape)
    threads = config.warps * device.warp
    by_registers = device.registers // (threads * thread_registers(config, device))
    return max(1, min(by_shared, by_registers))


def on_chip(shape: ScanShape, device: Device, config: ScanConfig) -> tuple[Phase, ...]:
    """The scan by our kernel, and the sum of its partial outputs.

    Raises:
        ValueError: the configuration cannot run; see :func:`why_not`.
    """
    reason = why_not(config, shape, device)
    if reason is not None:
        raise ValueError(f"{config}: {reason}")
    item, batch = shape.dtype.itemsize, shape.batch
    d_tiles, f_tiles = math.ceil(shape.d_model / config.bd), math.ceil(shape.d_ff / config.bf)
    rounds = math.ceil(f_tiles / config.groups)
    keys = batch * shape.tokens * shape.d_ff * item * (1 + shape.apart)
    targets = batch * shape.tokens * shape.d_model * item
    outputs = batch * shape.tokens * shape.d_model * 4
    partials = 2 * f_tiles * outputs - config.groups * outputs
    running = device.sms * resident(config, shape, device)
    cache = L2_SHARE * device.l2
    # Programs that run at the same time read the same keys at about the same time: one trip from memory.
    trips = math.ceil(d_tiles / min(d_tiles, running))
    matrix = shape.d_model * shape.d_ff * item + (shape.matrix * shape.state_itemsize if shape.final else 0)
    hbm = keys * trips + matrix
    hbm += targets if targets <= cache else targets * rounds
    in_cache = config.groups * outputs <= cache
    hbm += 0 if in_cache else partials
    l2 = keys * d_tiles + targets * f_tiles + partials
    scan = Phase(
        "scan", shape.flops, _busy(shape, device, config, d_tiles * config.groups * batch, rounds), hbm, l2
    )
    result = batch * shape.tokens * shape.d_model * item
    return (scan, stream("sum of partials", result + (0 if in_cache else config.groups * outputs)))


def _busy(shape: ScanShape, device: Device, config: ScanConfig, programs: int, rounds: int) -> float:
    """Seconds of the SM with most programs, each of which takes its steps one after another."""
    bm, bd, bf = config.bm, config.bd, config.bf
    item = shape.dtype.itemsize
    rate = device.peak(shape.dtype) * device.scan.value / device.sms
    # An instruction takes so many rows of its first operand, whether they are there or not.
    rows, least = max(bm, device.mma_rows), device.mma_rows
    apply, write = 2.0 * rows * bd * bf / rate, 2.0 * max(bd, least) * bf * bm / rate
    reads = math.ceil(bm / _ROW_BLOCK) * (_ROW_BLOCK + bd) * bf
    reads += math.ceil(bd / _ROW_BLOCK) * (_ROW_BLOCK + bf) * bm
    tiles = bm * (bf * (1 + shape.apart) + bd) + bd * bf * min(1.0, bm / shape.chunk)
    shared = (reads + tiles) * item / (device.shared_rate * device.clock)
    one = max(apply + write, shared)
    whole, rest = divmod(shape.tokens, shape.chunk)
    steps = whole * math.ceil(shape.chunk / bm) + math.ceil(rest / bm)
    here, fit = math.ceil(programs / device.sms), resident(config, shape, device)
    full, left = divmod(here, fit)
    step = full * max(fit * one, device.step) + (max(left * one, device.step) if left else 0.0)
    return rounds * steps * step
