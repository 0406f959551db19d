"""What the kernels of a GPU cost one by one, launched by hand: the scan, its gradients, the step.

    python -m bench.gpu_parts --out record.json     # on a device, two minutes
    python -m bench.gpu_parts --part scan --tiles 64x64x256x8x3,64x128x128x8x3

``bench.gpu`` times whole layers under ``torch.compile``; this says where their time goes, and what other
tiles (tokens x rows x columns x warps x stages) would give, with as many programs per row of W, which stand
behind the tile in the record, as fill the card once. Times are medians of events, in turns, on random
operands; of steps also those of a recorded graph of many, which has no host time. FLOPs of a scan are
``4 T D F``, of the static projection ``2 T D F``. Results are checked against the library form first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu import LR, environment, timer
from ttt_compiler.codegen import ops  # noqa: F401
from ttt_compiler.codegen.choose import predicted_gradient_form, scan_plan
from ttt_compiler.codegen.devices import device_of
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.gpu import scan as gpu_scan
from ttt_compiler.codegen.gpu.library import chunk_scan_backward_library, chunk_scan_library
from ttt_compiler.codegen.kernels.chunk_scan import chunk_scan_partial
from ttt_compiler.codegen.kernels.tiles import SCAN, Tile, architecture, shipped
from ttt_compiler.codegen.layout import DONE, FACTORED, SEEN, SLOT, WRITES, factored_limit
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec

# D, F, C.
SCANS = ((1024, 3072, 256), (1024, 3072, 512), (2560, 9728, 512), (2560, 9728, 1024), (4096, 14336, 1024))
STEPS = ((1024, 3072), (4096, 14336))
BATCHES = (1, 4, 16)
LENGTH = 8192
# A narrow result against another narrow result: both are within half of it of the truth.
CLOSE = 2e-2
# Steps in one recorded graph: alone, starting it would take longer than the step.
REPEATS = 20


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of one call of each, in turns."""
    clock = timer(torch.device("cuda"))
    taken = [{name: clock(run) for name, run in runs.items()} for _ in range(rounds + 2)]
    return {name: statistics.median(one[name] for one in taken[2:]) for name in runs}


def ceilings(rounds: int) -> dict[str, float]:
    """What this card gives: FLOP/s of a large product, bytes/s of a large copy."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    found = medians({"product": lambda: a @ b, "copy": lambda: y.copy_(x)}, rounds)
    return {"flops": 2 * n**3 / found["product"], "bytes": 2 * x.nbytes / found["copy"]}


def one_scan(sizes: tuple[int, int, int], tiles: list[Tile], rounds: int) -> dict[str, Any]:
    """Forward: our kernel with the tile of the plan and with others, library products, the static layer."""
    d, f, chunk = sizes
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    h, v = torch.randn(1, LENGTH, f, **make), torch.randn(1, LENGTH, d, **make) * 0.01
    w0, out = torch.randn(d, f, **make) * 0.02, torch.empty(1, LENGTH, d, **make)
    shape = ScanShape(LENGTH, d, f, chunk, 1, h.dtype)
    plan = scan_plan(h.device, SCAN, shape, only_kernel=True)
    free = scan_plan(h.device, SCAN, shape, only_kernel=False)
    tried = {(t, plan.groups): None for t in shipped(architecture(h.device), h.dtype, SCAN)}
    processors = torch.cuda.get_device_properties(h.device).multi_processor_count
    tried |= {(t, max(1, min(-(-f // t.inner), processors // -(-d // t.outer)))): None for t in tiles}
    runs: dict[str, Callable[[], object]] = {"static": lambda: functional.linear(h, w0)}
    for span in sorted({chunk, 2 * chunk, 4 * chunk, *([free.span] if free.form == "library" else [])}):
        runs[f"library, span {span}"] = lambda span=span: chunk_scan_library(
            h, v, w0, chunk=chunk, span=span, decay=1.0, out=out
        )
    want = chunk_scan_library(h, v, w0, chunk=chunk, span=chunk, decay=1.0, out=torch.empty_like(out)).float()
    failed = {}
    for tile, groups in tried:
        name = "x".join(map(str, (*tile.schedule, groups)))

        def launch(tile: Tile = tile, groups: int = groups) -> Tensor:
            return chunk_scan_partial(h, h, v, w0, None, chunk, tile, groups)

        try:
            error = float((launch().sum(0) - want).abs().max() / want.abs().max())
        except Exception as e:  # a tile that does not fit this compiler or card
            failed[name] = f"{type(e).__name__}: {str(e)[:120]}"
            continue
        if error > CLOSE:
            failed[name] = f"error {error:.1e}"
            continue
        runs[f"kernel {name}"] = launch
    chosen = "x".join(map(str, (*plan.tiles[0].schedule, plan.groups)))
    runs["kernel of the plan and its sum"] = lambda: gpu_scan.chunk_scan(h, v, w0, None, None, chunk)
    seconds = medians(runs, rounds)
    flops = 4 * LENGTH * d * f
    rates = {n: (flops / 2 if n == "static" else flops) / s / 1e12 for n, s in seconds.items()}
    said = {"D": d, "F": f, "T": LENGTH, "C": chunk, "plan": chosen, "predicted form": free.form}
    said |= {"predicted seconds": free.seconds, "seconds": seconds, "TFLOP/s": rates, "failed": failed}
    return said


def one_gradient(sizes: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Backward of the scan: three of our scans, library products, and the static layer's two products."""
    d, f, chunk = sizes
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    h, v, dy = (torch.randn(1, LENGTH, n, **make) for n in (f, d, d))
    v, w0 = v * 0.01, torch.randn(d, f, **make) * 0.02
    shape = ScanShape(LENGTH, d, f, chunk, 1, h.dtype)
    model = device_of(torch.cuda.get_device_name())
    form = None if model is None else predicted_gradient_form(model, shape)

    def kernels() -> object:
        found, gpu_scan.gradient_form = gpu_scan.gradient_form, lambda *_: "on_chip"
        try:
            return gpu_scan.chunk_scan_backward(dy, h, v, w0, None, chunk)
        finally:
            gpu_scan.gradient_form = found

    runs: dict[str, Callable[[], object]] = {
        "static": lambda: (dy[0] @ w0, dy[0].t() @ h[0]),
        "kernels": kernels,
        "library": lambda: chunk_scan_backward_library(dy, h, v, w0, chunk, 1.0),
    }
    for a, b in zip(runs["kernels"](), runs["library"](), strict=True):  # type: ignore[call-overload]
        assert float((a.float() - b.float()).abs().max() / b.float().abs().max()) < CLOSE
    seconds = medians(runs, rounds)
    return {"D": d, "F": f, "T": LENGTH, "C": chunk, "predicted form": form, "seconds": seconds}


class Decoding:
    """A site in the middle of a text, whose state says what a step has to read; operands are random."""

    def __init__(self, d: int, f: int, batch: int, form: str, chunk: int = 256) -> None:
        make: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        self.spec = SiteSpec("w", d, f, d, chunk, LR, "hidden_states", True, 5, "m")
        self.state = FastWeightState.zeros([self.spec], batch, torch.bfloat16, torch.device("cuda"))
        self.site = self.state.sites["w"]
        for x in self.site[:3]:
            x.normal_(std=0.02)
        if form == "factored":
            self.site.w.view(-1).view(torch.bfloat16).normal_(std=0.02)
        written = {"W0": 0, "factored": chunk, "dense": 8 * chunk}[form]
        rows = self.site.rows
        rows[:, SEEN], rows[:, DONE], rows[:, WRITES] = written + 1, written // chunk, written // chunk
        rows[:, FACTORED] = written if form == "factored" else 0
        rows[:, SLOT] = torch.arange(batch, device="cuda")
        self.before = rows.clone()
        self.due = rows.clone()
        self.due[:, SEEN] = written + chunk - 1
        self.weights = [torch.randn(d, f, **make) * 0.02, None, torch.randn(d, 1, 5, **make) * 0.1]
        self.weights.append(torch.randn(d, d, **make) * 0.01)
        self.h, self.t = torch.randn(batch, 1, f, **make), torch.randn(batch, 1, d, **make)
        self.state.own()

    def step(self, rows: Tensor) -> Tensor:
        """One token from the same place each time."""
        self.site.rows.copy_(rows)
        return torch.ops.ttt.fast_weight_step(
            *(self.h, self.t, *self.weights, None, self.spec.encode()), *self.site, self.state.batch
        )


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """The same launches ``REPEATS`` times from a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    return graph.replay


def launches(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds on the device of every kernel of one call, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {f"{i} {e.name[:60]}": e.device_time for i, e in enumerate(events)}


def one_step(d: int, f: int, batch: int, form: str, rounds: int) -> dict[str, Any]:
    """A token, eager and recorded, inside of a chunk and at its end, beside the static product."""
    here = Decoding(d, f, batch, form)
    w0, h = here.weights[0], here.h
    assert w0 is not None
    inside, border = (lambda: here.step(here.before)), (lambda: here.step(here.due))
    runs: dict[str, Callable[[], object]] = {
        "static": lambda: functional.linear(h, w0),
        "static, recorded": recorded(lambda: functional.linear(h, w0)),
        "step": inside,
        "step, recorded": recorded(inside),
        "last step of a chunk": border,
        "last step of a chunk, recorded": recorded(border),
    }
    found, last = launches(inside), launches(border)
    read = {"W0": 2, "factored": 2, "dense": 4 * batch}[form] * d * f
    read += 2 * batch * (d + f) * here.spec.chunk if form == "factored" else 0
    said = {"D": d, "F": f, "C": here.spec.chunk, "B": batch, "form": form, "bytes": read}
    seconds = {n: s / (REPEATS if "recorded" in n else 1) for n, s in medians(runs, rounds).items()}
    return {**said, "seconds": seconds, "launches": len(found), "microseconds": found, "at the end": last}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=["scan", "gradient", "step"])
    parser.add_argument("--tiles", default="", help="further tiles for the scan")
    parser.add_argument("--sizes", action="append", help="D,F,C of scans instead of the usual ones")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    tiles = [Tile(*(int(n) for n in t.split("x"))) for t in a.tiles.split(",") if t]
    chosen = [tuple(int(n) for n in x.split(",")) for x in a.sizes or ()]
    torch.manual_seed(0)
    record: dict[str, Any] = {"environment": environment(torch.device("cuda")), "rounds": a.rounds}

    def keep(part: str, found: dict[str, Any]) -> None:
        record.setdefault(part, []).append(found)
        print(
            part,
            json.dumps({k: v for k, v in found.items() if k not in ("microseconds", "at the end")}),
            flush=True,
        )
        if a.out is not None:
            a.out.write_text(json.dumps(record, indent=1))

    keep("ceilings", ceilings(a.rounds))
    parts = a.part or ["scan", "step", "gradient"]
    with torch.no_grad():
        for part in parts:
            if part == "step":
                for d, f in STEPS:
                    for batch in BATCHES:
                        for form in ("W0", "factored", "dense"):
                            if form != "factored" or factored_limit(d, f, batch) >= 256:
                                keep(part, one_step(d, f, batch, form, a.rounds))
            for sizes in (chosen or SCANS) if part != "step" else ():
                run = one_scan(sizes, tiles, a.rounds) if part == "scan" else one_gradient(sizes, a.rounds)
                keep(part, run)


if __name__ == "__main__":
    main()
