"""One fast-weight layer on a GPU, forward and training: correctness, then time against everything else.

    python -m bench.gpu                      # what `nox -s gpu` runs after the tests on the device
    python -m bench.gpu --shape 2560,9728,8192,512 --rounds 5
    python -m bench.gpu --device cpu --quick # the same code on a processor, to see that it works

Competitors, interleaved in one process: the static projection; the official training form (all chunks'
weights stacked) in torch and under torch.compile; the official loop over chunks; fla's nearest kernel (linear
attention with chunked state, an eighth of the state's FLOPs) where fla is installed. Writes a record to
``bench/results`` and, with matplotlib, a plot beside it. Times on a GPU are of events, after a warm-up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.competitors import stacked
from ttt_compiler.codegen import ops, reference  # noqa: F401

RESULTS = Path(__file__).parent / "results"
# D, F, T, C: small, Qwen3-4B, Llama-3.1-8B.
SHAPES = (
    (1024, 3072, 8192, 256),
    (1024, 3072, 8192, 512),
    (2560, 9728, 8192, 512),
    (2560, 9728, 8192, 1024),
    (2560, 9728, 32768, 1024),
    (4096, 14336, 8192, 256),
    (4096, 14336, 8192, 1024),
    (4096, 14336, 32768, 2048),
)
QUICK = ((64, 160, 96, 32), (48, 80, 100, 25))
LR = 0.3
# A narrow result may err so many times more than plain torch in the same dtype does, plus a band.
FACTOR, BAND = 3.0, {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds of one call."""
    if device.type != "cuda":

        def on_host(fn: Callable[[], object]) -> float:
            start = time.perf_counter()
            fn()
            return time.perf_counter() - start

        return on_host

    def on_device(fn: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    return on_device


def paired(competitors: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds, ratios to the first competitor with quartiles, peak bytes."""
    clock, names = timer(device), list(competitors)
    for _ in range(3):
        for name in names:
            competitors[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            seconds[name].append(clock(competitors[name]))
    out = {}
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds[names[0]], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        entry = {"seconds": statistics.median(seconds[name]), "ratio": statistics.median(ratios)}
        out[name] = {**entry, "low": low, "high": high, "peak_bytes": peak(competitors[name], device)}
    return out


def peak(fn: Callable[[], object], device: torch.device) -> int | None:
    """Bytes above what is held before; None where the allocator does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    return int(torch.cuda.max_memory_allocated() - before)


def loop(h: Tensor, t: Tensor, w0: Tensor, conv: Tensor, proj: Tensor, lr: float, chunk: int) -> Tensor:
    """The official inference loop, from its description."""
    w, out = w0, []
    for start in range(0, h.shape[1], chunk):
        part, keys = t[:, start : start + chunk], h[:, start : start + chunk]
        out.append(keys @ w.t())
        if keys.shape[1] == chunk:
            width = part.shape[-1]
            taps = functional.conv1d(part.transpose(1, 2), conv, padding=conv.shape[-1] // 2, groups=width)
            w = w + lr * (taps.transpose(1, 2)[0] @ proj).t() @ keys[0]
    return torch.cat(out, 1)


def ours(h: Tensor, t: Tensor, w0: Tensor, conv: Tensor, proj: Tensor, lr: float, chunk: int) -> Tensor:
    """What the rewrite pass makes of a layer."""
    v = torch.ops.ttt.chunk_conv(t, conv, None, chunk) @ (proj * lr)
    return torch.ops.ttt.chunk_scan(h, v, w0, None, None, chunk)


def nearest_of_fla(h: Tensor, w0: Tensor, chunk: int) -> Callable[[], object] | None:
    """fla's chunked linear attention, F in heads of 128 with values of D / 8 columns: an eighth of the FLOPs.

    None without fla.
    """
    if importlib.util.find_spec("fla") is None or h.device.type != "cuda":
        return None
    from fla.ops.linear_attn import chunk_linear_attn

    heads = h.shape[-1] // 128
    q = h[..., : heads * 128].reshape(*h.shape[:2], heads, 128).contiguous()
    v = torch.randn(*h.shape[:2], heads, w0.shape[0] // 8, dtype=h.dtype, device=h.device)
    return lambda: chunk_linear_attn(q, q, v, normalize=False)


def one_layer(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """All competitors on one layer's forward, and training step."""
    d, f, length, chunk = shape
    make = {"dtype": dtype, "device": device}
    h, t = torch.randn(1, length, f, **make), torch.randn(1, length, d, **make)
    w0, proj = torch.randn(d, f, **make) * 0.02, torch.randn(d, d, **make) * 0.01
    conv = torch.randn(d, 1, 5, **make) * 0.1
    args = (h, t, w0, conv, proj, LR, chunk)
    import ttt_compiler.codegen.lowering  # noqa: F401

    # Every shape has graphs of its own; beyond Dynamo's limit they would run uncompiled, and be timed so.
    torch._dynamo.reset()
    compiled, by_chunk, all_at_once = (torch.compile(x, dynamic=False) for x in (ours, loop, stacked))
    errors = gate(compiled, args)
    whole = length % chunk == 0
    with torch.no_grad():
        runs: dict[str, Callable[[], object]] = {
            "static": lambda: functional.linear(h, w0),
            "ours": lambda: compiled(*args),
            "official loop": lambda: loop(*args),
            "official loop, compiled": lambda: by_chunk(*args),
        }
        if whole:
            runs["official training form"] = lambda: stacked(*args)
            runs["official training form, compiled"] = lambda: all_at_once(*args)
        if (fla := nearest_of_fla(h, w0, chunk)) is not None:
            runs["fla linear attention (another function, 1/8 of the FLOPs)"] = fla
        forward = paired(runs, rounds, device)
    train = paired(
        {
            "static": lambda: step(lambda h, t, w0, *_: functional.linear(h, w0), args),
            "ours": lambda: step(compiled, args),
            **({"official training form": lambda: step(stacked, args)} if whole else {}),
        },
        rounds,
        device,
    )
    return {"D": d, "F": f, "T": length, "C": chunk, "errors": errors, "forward": forward, "train": train}


def step(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    """Forward and backward of one layer."""
    tensors = [x.detach().requires_grad_() for x in args[:5]]
    fn(*tensors, *args[5:]).sum().backward()


def gate(compiled: Callable[..., Tensor], args: tuple[Any, ...]) -> dict[str, float]:
    """No number from a wrong result: errors of ours and of plain torch against fp64, on part of a text."""
    h, t, w0, conv, proj, lr, chunk = args
    length = min(h.shape[1], 3 * chunk + chunk // 2)
    part = (h[:, :length].contiguous(), t[:, :length].contiguous(), w0, conv, proj)
    with torch.no_grad():
        wide = [x.double().cpu() for x in part]
        exact = reference.chunked(wide[0][0], wide[1][0], *wide[2:], lr=lr, chunk=chunk)[0]
        got = compiled(*part, lr, chunk)[0].double().cpu()
        plain = loop(*part, lr, chunk)[0].double().cpu()
    scale = exact.abs().max()
    errors = {"ours": float((got - exact).abs().max() / scale)}
    errors["plain torch"] = float((plain - exact).abs().max() / scale)
    budget = FACTOR * errors["plain torch"] + BAND[h.dtype]
    assert errors["ours"] <= budget, f"{errors}: beyond {budget:.1e}, no timing"
    return errors


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a figure depends on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found = importlib.util.find_spec("triton")
    triton = __import__("triton").__version__ if found else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Ratios to the static projection."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for ax, what in zip(axes, ("forward", "train"), strict=True):
        labels = [f"{x['D']}x{x['F']}\nT={x['T']} C={x['C']}" for x in record["layers"]]
        names = dict.fromkeys(n for x in record["layers"] for n in x[what])
        for name in names:
            ax.plot(labels, [x[what].get(name, {}).get("ratio") for x in record["layers"]], "o-", label=name)
        ax.set(title=what, ylabel="time / static", yscale="log")
        ax.tick_params(axis="x", labelsize=7)
    axes[0].legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shape", action="append", help="D,F,T,C instead of the usual ones")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    a = parser.parse_args()
    device = torch.device(a.device)
    torch.manual_seed(0)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    layers = []
    given = [tuple(int(n) for n in shape.split(",")) for shape in a.shape or ()]
    for shape in given or (QUICK if a.quick else SHAPES):
        layers.append(one_layer(shape, getattr(torch, a.dtype), device, 3 if a.quick else a.rounds))
        x = layers[-1]
        print(f"\nD={x['D']} F={x['F']} T={x['T']} C={x['C']} {a.dtype}, errors {x['errors']}")
        for what in ("forward", "train"):
            for name, y in x[what].items():
                spread = f"[{y['low']:.2f}, {y['high']:.2f}]"
                print(f"  {what:8} {name:40} {y['seconds'] * 1e3:9.3f} ms  {y['ratio']:.2f} {spread}")
    record = {"environment": environment(device), "dtype": a.dtype, "layers": layers}
    a.out.mkdir(parents=True, exist_ok=True)
    stamp = record["environment"]["date"].replace(":", "").partition("+")[0]
    path = a.out / f"gpu-{stamp}.json"
    path.write_text(json.dumps(record, indent=1))
    if importlib.util.find_spec("matplotlib"):
        plot(record, path.with_suffix(".png"))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
