"""Errors of the interpreted GPU ops against fp64, beside those of plain torch in the same dtype.

    python -m bench.kernel_errors            # a minute; prints a table

The budget of a narrow result is three times the error of plain torch plus a band. Nothing here is timed.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch import Tensor

from bench.gpu import BAND, FACTOR
from ttt_compiler.codegen import ops  # noqa: F401
from ttt_compiler.codegen.cpu import controls as cpu_controls
from ttt_compiler.codegen.cpu import conv as cpu_conv
from ttt_compiler.codegen.cpu import scan as cpu_scan
from ttt_compiler.codegen.cpu.step import fast_weight_step as cpu_step
from ttt_compiler.codegen.gpu import controls, conv, scan
from ttt_compiler.codegen.gpu.step import fast_weight_step
from ttt_compiler.offline import interpreter
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, WriteRule

B, T, F, D, CHUNK = 2, 53, 67, 37, 12
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = torch.cat([torch.full((3,), -1), torch.arange(20), torch.arange(T - 23)])[None]


def operands() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"h": (B, T, F), "v": (B, T, D), "dy": (B, T, D), "w0": (D, F), "conv": (D, 1, 5), "proj": (D, D)}
    return {name: torch.randn(size, generator=g, dtype=torch.float64) for name, size in sizes.items()}


def running(step: object, x: dict[str, Tensor], size: int) -> Tensor:
    """All tokens of a sequence, ``size`` at a time, under every control."""
    rule = WriteRule(keys="unit", max_norm=2.0, decay=0.9)
    spec = SiteSpec("w", D, F, D, CHUNK, 0.3, "hidden_states", True, 5, "m", rule=rule)
    state = FastWeightState.zeros([spec], B, x["h"].dtype, torch.device("cpu"), revocable=5)
    out = []
    for start in range(0, T, size):
        part = (y[:, start : start + size] for y in (x["h"], x["v"]))
        out.append(
            step(*part, x["w0"], None, x["conv"], x["proj"], None, spec, state.sites["w"], state.batch)
        )
    return torch.cat(out, 1)


def cases(module: dict[str, object]) -> dict[str, object]:
    conv_, scan_, controls_, step = (module[n] for n in ("conv", "scan", "controls", "step"))
    limit = torch.tensor(40.0)
    return {
        "chunk_conv": lambda x: [conv_.chunk_conv(x["v"], x["conv"], POSITIONS, CHUNK)],
        "chunk_conv, gradient of the taps": lambda x: [
            conv_.chunk_conv_dweight(x["dy"], x["v"], POSITIONS, CHUNK, 5)
        ],
        "limit_writes": lambda x: [controls_.limit_writes(x["v"], x["h"], limit, POSITIONS, CHUNK, True)],
        "chunk_scan": lambda x: [scan_.chunk_scan(x["h"], x["v"], x["w0"], None, None, CHUNK)],
        "chunk_scan, documents and decay": lambda x: [
            scan_.chunk_scan(x["h"], x["v"], x["w0"], None, POSITIONS, CHUNK, 0.9)
        ],
        "chunk_scan_backward": lambda x: scan_.chunk_scan_backward(
            x["dy"], x["h"], x["v"], x["w0"], None, CHUNK
        ),
        "chunk_scan_backward, documents and decay": lambda x: scan_.chunk_scan_backward(
            x["dy"], x["h"], x["v"], x["w0"], POSITIONS, CHUNK, 0.9
        ),
        "fast_weight_step, one token at a time": lambda x: [running(step, x, 1)],
        "fast_weight_step, 17 tokens at a time": lambda x: [running(step, x, 17)],
    }


def main() -> None:
    interpreter.install()
    torch.set_num_threads(1)
    ours = cases({"conv": conv, "scan": scan, "controls": controls, "step": fast_weight_step})
    plain = cases({"conv": cpu_conv, "scan": cpu_scan, "controls": cpu_controls, "step": cpu_step})
    print(f"B={B} T={T} F={F} D={D} C={CHUNK}; error = largest difference from fp64 / largest value\n")
    print("| op | dtype | ours | plain torch | budget | of it |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for name, run in ours.items():
        for dtype in DTYPES:
            x = {k: y.to(dtype) for k, y in operands().items()}
            exact = plain[name]({k: y.double() for k, y in x.items()})
            errors = [
                max(
                    float((a.double() - b).abs().max() / b.abs().max())
                    for a, b in zip(got, exact, strict=True)
                )
                for got in (run(x), plain[name](x))
            ]
            budget = FACTOR * errors[1] + BAND[dtype]
            worst = max(worst, errors[0] / budget)
            cells = (f"{e:.1e}" for e in (*errors, budget))
            print(
                f"| {name} | {str(dtype)[6:]} | {' | '.join(cells)} | {errors[0] / budget:.2f} |", flush=True
            )
    assert worst <= 1.0, f"{worst:.2f} of a budget"


if __name__ == "__main__":
    main()
