"""This machine's processor as a :class:`Device`: a few GEMMs and one stream, about a second, once a process.

Rates are of torch's current number of threads. One thread is timed by its own processor time, which a busy
machine does not stretch; several by the wall. May be changed here: what is measured, together with the forms
of :mod:`ttt_compiler.codegen.forms_cpu` that read it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ttt_compiler.codegen.cpu.gemm import is_amd, writes_blocks
from ttt_compiler.codegen.cpu.native.blocks import write
from ttt_compiler.codegen.cpu.native.products import multiply
from ttt_compiler.codegen.devices import GB, KIB, MIB, Device, Fraction

# A GEMM as the scan makes it: a chunk of tokens against a matrix beyond the private caches.
_ROWS, _D, _F = 512, 1024, 3072
_STREAM = 16 * MIB  # elements of fp32
_ROUNDS = 3
_MEASURED = Fraction(1.0, "measured, not a peak")


@functools.cache
def this_cpu() -> Device:
    """The processor that runs this process, measured on the first call."""
    with torch.inference_mode():
        return _measure()


def _measure() -> Device:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(_ROWS, _F, generator=generator)
    v = torch.randn(_ROWS, _D, generator=generator)
    w = torch.randn(_D, _F, generator=generator) * 0.02
    y = torch.empty(_ROWS, _D)
    flops = 2.0 * _ROWS * _D * _F
    h16, v16, w16 = (x.bfloat16() for x in (h, v, w))
    y16, dw16 = torch.empty(_ROWS, _D, dtype=torch.bfloat16), torch.empty(_D, _F, dtype=torch.bfloat16)
    h64, v64, w64, y64 = h.double(), v.double(), w.double(), y.double()
    variants = {
        "float32 apply": flops / _seconds(lambda: torch.mm(h, w.t(), out=y)),
        "float32 write": flops / _seconds(lambda: w.addmm_(v.t(), h, alpha=1e-6)),
        "bfloat16 apply": flops / _seconds(lambda: torch.mm(h16, w16.t(), out=y16)),
        "bfloat16 write": flops / _seconds(lambda: torch.mm(v16.t(), h16, out=dw16)),
        "float64 apply": flops / _seconds(lambda: torch.mm(h64, w64.t(), out=y64)),
        "float64 write": flops / _seconds(lambda: w64.addmm_(v64.t(), h64, alpha=1e-6)),
    }
    if multiply(h, w.t(), y):
        variants["float32 apply onednn"] = flops / _seconds(lambda: multiply(h, w.t(), y))
    w32 = w.clone()
    if writes_blocks(torch.float32):
        variants["float32 write"] = flops / _seconds(lambda: write(v, h, w32, None, None, written=True))
    if writes_blocks(torch.bfloat16):
        variants["bfloat16 write"] = flops / _seconds(lambda: write(v16, h16, w32, None, w16, written=True))
    stream = torch.zeros(_STREAM)
    bandwidth = stream.nbytes / _seconds(stream.sum)
    tiny = torch.zeros(2, 2)
    calls = 200
    host = _seconds(lambda: [torch.mm(tiny, tiny, out=tiny) for _ in range(calls)]) / calls
    cores = torch.get_num_threads()
    return Device(
        name="cpu",
        arch="amd" if is_amd() else "x86",
        peaks={
            torch.float32: variants["float32 apply"],
            torch.bfloat16: variants["bfloat16 apply"],
            torch.float64: variants["float64 apply"],
        },
        memory=0,
        hbm=bandwidth,
        l2=_private_cache(),
        l2_rate=bandwidth,
        sms=cores,
        clock=1 * GB,
        shared=0,
        shared_block=0,
        shared_rate=0,
        registers=0,
        registers_thread=0,
        warp=1,
        mma_rows=1,
        launch=0.0,
        host=host,
        step=0.0,
        gemm=_MEASURED,
        scan=_MEASURED,
        attention=_MEASURED,
        hbm_part=_MEASURED,
        l2_part=_MEASURED,
        overlaps=False,
        variants=variants,
        sources=f"measured with {cores} thread(s)",
    )


def _private_cache() -> int:
    """Bytes of a core's second cache; 0 where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * KIB
    except (OSError, ValueError):
        return 0


def _seconds(call: Callable[[], object]) -> float:
    """Median of a few calls after one that does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    seconds = []
    for _ in range(_ROUNDS):
        start = clock()
        call()
        seconds.append(clock() - start)
    return sorted(seconds)[_ROUNDS // 2]
