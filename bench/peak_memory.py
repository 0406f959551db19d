"""Peak memory of one call of one layer, by the process itself: a fresh one per point.

    python -m bench.peak_memory '{"what": "training", "who": "ours", "shape": {"d": 64, ...}}'

Linux counts the peak of a process (VmHWM), and the count can be put back before the call. All run op by op:
what a compiler needs is not what the call needs. ``bench/suite/test_memory.py`` starts them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from bench import competitors
from bench.layer import LR, Layer, Shape

Layered = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]


def _static(h: Tensor, t: Tensor, w0: Tensor, *_: object) -> Tensor:
    return functional.linear(h, w0)


FORMS: dict[str, Layered] = {
    "static": _static,
    "ours": competitors.rewritten,
    "official": competitors.stacked,
}


def call(what: str, who: str, layer: Layer) -> list[Tensor | None]:
    """A forward pass, or a training step with gradients of all operands; what it leaves behind."""
    if what == "training":
        return competitors.gradients(FORMS[who], layer)
    with torch.no_grad():
        return [FORMS[who](layer.h, layer.t, layer.w0, layer.conv, layer.proj, LR, layer.shape.chunk)]


def measured(what: str, who: str, shape: Shape) -> int:
    """Bytes above what the process held before the call, with what the call returns."""
    # Libraries and kernels are loaded by a call; workspaces of the size in question are not there yet.
    call(what, who, Layer(Shape(8, 16, 24, 8, dtype=shape.dtype)))
    layer = Layer(shape)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    held = call(what, who, layer)
    peak = _status("VmHWM")
    assert held[0] is not None  # and none of them is freed before the peak is read
    return peak - before


def fresh(what: str, who: str, shape: Shape) -> int:
    """The same, in a process of its own with one thread."""
    point = json.dumps({"what": what, "who": who, "shape": asdict(shape)})
    done = subprocess.run(
        [sys.executable, "-m", "bench.peak_memory", point],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    print(measured(asked["what"], asked["who"], Shape(**asked["shape"])))
