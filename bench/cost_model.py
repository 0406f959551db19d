"""How well the cost model predicts this processor: the chunk scan of many shapes, measured and predicted.

The model is calibrated once (a second), then every shape is predicted before it is measured. Printed: one row
per shape, Spearman's rank correlation, and the median and largest error.

    python -m bench.cost_model               # one thread, its own processor time, about two minutes
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.measure import clock_of
from ttt_compiler.codegen import (
    forms_cpu,
    ops,  # noqa: F401
    reference,
)
from ttt_compiler.codegen.calibrate import this_cpu
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.phases import cost_of

# (D, F, T, C, dtype, B): skinny and large matrices, short and long chunks, one chunk alone, an odd tail.
SHAPES = (
    (256, 768, 2048, 32, "float32", 1),
    (256, 768, 4096, 256, "float32", 1),
    (576, 1536, 1024, 64, "float32", 1),
    (576, 1536, 1024, 256, "float32", 1),
    (576, 1536, 4096, 512, "float32", 1),
    (576, 1536, 2048, 512, "float32", 4),
    (576, 1536, 1024, 1024, "float32", 1),
    (896, 4864, 1500, 320, "float32", 1),
    (1024, 3072, 512, 16, "float32", 1),
    (1024, 3072, 1024, 64, "float32", 1),
    (1024, 3072, 2048, 256, "float32", 1),
    (1024, 3072, 4096, 512, "float32", 1),
    (1024, 3072, 4096, 1024, "float32", 1),
    (1024, 3072, 2048, 512, "float32", 2),
    (2048, 6144, 512, 128, "float32", 1),
    (2048, 6144, 2048, 512, "float32", 1),
    (2560, 9728, 512, 128, "float32", 1),
    (2560, 9728, 1024, 512, "float32", 1),
    (256, 768, 2048, 256, "bfloat16", 1),
    (576, 1536, 1024, 256, "bfloat16", 1),
    (576, 1536, 2048, 64, "bfloat16", 1),
    (1024, 3072, 1024, 256, "bfloat16", 1),
    (1024, 3072, 2048, 512, "bfloat16", 1),
    (2048, 6144, 512, 128, "bfloat16", 1),
    (576, 1536, 1024, 256, "float64", 1),
    (1024, 3072, 1024, 512, "float64", 1),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    gate()
    device = this_cpu()
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in device.variants.items())
    print(f"GFLOP/s: {rates}; {device.hbm / 1e9:.1f} GB/s; {device.host * 1e6:.1f} us per call")
    print("\n| D | F | T | C | B | dtype | measured ms | predicted ms | error | limit |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows, units = [], []
    for d, f, t, c, name, b in SHAPES:
        shape = ScanShape(t, d, f, c, b, getattr(torch, name))
        cost = cost_of(forms_cpu.recurrent(shape, device), device)
        seconds = measured(shape, a.rounds, clock_of(a.threads))
        error = cost.seconds / seconds - 1
        units.append(shape.unit)
        rows.append({"shape": [d, f, t, c, name, b], "measured": seconds, "predicted": cost.seconds})
        print(
            f"| {d} | {f} | {t} | {c} | {b} | {name} | {seconds * 1e3:.1f} | {cost.seconds * 1e3:.1f} "
            f"| {error:+.0%} | {cost.limit} |",
            flush=True,
        )
    pairs = [(r["measured"], r["predicted"]) for r in rows]
    errors = [abs(p / m - 1) for m, p in pairs]
    # Sizes differ by a factor of a hundred, so times rank well by themselves; time per FLOP does not.
    rates = [(m / u, p / u) for (m, p), u, n in zip(pairs, units, SHAPES, strict=True) if n[4] == "float32"]
    summary = {
        "shapes": len(rows),
        "spearman": spearman(*zip(*pairs, strict=True)),
        "spearman_per_flop_fp32": spearman(*zip(*rates, strict=True)),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
    }
    print(
        f"\n{summary['shapes']} shapes: rank correlation of times {summary['spearman']:.3f}, of fp32 times "
        f"per FLOP of the static projection {summary['spearman_per_flop_fp32']:.3f}; median |error| "
        f"{summary['median_error']:.1%}, largest {summary['largest_error']:.0%}"
    )
    if a.json is not None:
        a.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")


def gate() -> None:
    """The op that is timed computes what the specification says."""
    torch.manual_seed(0)
    h, v, w = torch.randn(1, 70, 24), torch.randn(1, 70, 16) * 0.1, torch.randn(16, 24)
    y = torch.ops.ttt.chunk_scan(h, v, w, None, None, 16)
    still = torch.zeros(16, 1, 5, dtype=torch.float64)
    still[:, :, 2] = 1  # a convolution that changes nothing: the target is v itself
    exact = reference.chunked(h[0].double(), v[0].double(), w.double(), still, None, lr=1.0, chunk=16)[0]
    assert torch.allclose(y[0].double(), exact, rtol=1e-4, atol=1e-4), "the scan is wrong: no timing"


def measured(shape: ScanShape, rounds: int, clock: Callable[[], float]) -> float:
    """Median seconds of the scan."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(shape.dtype)

    h = random(shape.batch, shape.tokens, shape.d_ff)
    v = random(shape.batch, shape.tokens, shape.d_model) * 1e-3
    w = random(shape.d_model, shape.d_ff) * 0.02
    seconds = []
    with torch.inference_mode():
        torch.ops.ttt.chunk_scan(h, v, w, None, None, shape.chunk)
        for _ in range(rounds):
            start = clock()
            torch.ops.ttt.chunk_scan(h, v, w, None, None, shape.chunk)
            seconds.append(clock() - start)
    return statistics.median(seconds)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of the ranks."""
    ranks = [[sorted(x).index(value) for value in x] for x in (a, b)]
    return statistics.correlation(*ranks)


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
