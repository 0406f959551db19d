"""Time and peak memory of one fast-weight layer's forward.

Against the official training forward's algorithm (every chunk's weight stacked, cumulative sum) and the
static linear layer. A correctness gate comes first: no number without agreement with the fp64 reference.

    python -m bench.layer_forward            # D=1024 F=3072 T=8192 C=512, fp32
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure import paired, peak_bytes
from ttt_compiler.codegen import ops, reference  # noqa: F401


def stacked(h: Tensor, t: Tensor, w0: Tensor, conv: Tensor, proj: Tensor, lr: float, chunk: int) -> Tensor:
    """The stacked algorithm, written from its description: O(T/C) weights in memory at once."""
    batch, length, width = h.shape
    n = length // chunk
    hc = h.view(batch, n, chunk, width)
    tc = t.view(batch * n, chunk, -1).transpose(1, 2)
    tc = functional.conv1d(tc, conv, padding=conv.shape[-1] // 2, groups=t.shape[-1]).transpose(1, 2)
    v = tc.reshape(batch, n, chunk, -1)[:, :-1] @ proj
    delta = lr * torch.einsum("bncd,bncf->bndf", v, hc[:, :-1])
    weights = torch.cat([w0.expand(batch, 1, *w0.shape), delta], 1).cumsum(1)
    return torch.einsum("bncf,bndf->bncd", hc, weights).reshape(batch, length, -1)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("D", 1024), ("F", 3072), ("T", 8192), ("C", 512), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    lr = 0.3
    h, t = torch.randn(1, a.T, a.F), torch.randn(1, a.T, a.D)
    w0 = torch.randn(a.D, a.F) * 0.02
    conv, proj = torch.randn(a.D, 1, 5) * 0.1, torch.randn(a.D, a.D) * 0.01

    def ours_eager() -> Tensor:
        v = torch.ops.ttt.chunk_conv(t, conv, None, a.C) @ (proj * lr)
        return torch.ops.ttt.chunk_scan(h, v, w0, None, None, a.C)

    import ttt_compiler.codegen.lowering  # noqa: F401

    ours = torch.compile(ours_eager, fullgraph=True)
    with torch.no_grad():
        competitors = {
            "static linear": lambda: functional.linear(h, w0),
            "ours": ours,
            "stacked (official algorithm)": lambda: stacked(h, t, w0, conv, proj, lr, a.C),
        }
        exact = reference.chunked(*(x.double() for x in (h[0], t[0], w0, conv, proj)), lr=lr, chunk=a.C)[0]
        scale = exact.abs().max()
        for name in ("ours", "stacked (official algorithm)"):
            error = float((competitors[name]()[0].double() - exact).abs().max() / scale)
            assert error < 1e-5, f"{name}: error {error:.1e} against fp64: no timing"
            print(f"error against fp64, {name}: {error:.1e}")
        times = paired(competitors, a.rounds)
        n = a.T // a.C
        floor = 1 + (n - 1) / n * (1 + a.D / a.F)
        print(f"\nD={a.D} F={a.F} T={a.T} C={a.C} fp32, {a.threads} threads, {a.rounds} rounds")
        print("| | median ms | ratio to static [quartiles] | peak MiB above inputs |")
        print("|---|---|---|---|")
        for name, fn in competitors.items():
            x = times[name]
            print(
                f"| {name} | {x.seconds * 1e3:.0f} | {x.ratio:.2f} [{x.low:.2f}, {x.high:.2f}] "
                f"| {peak_bytes(fn) / 2**20:.0f} |"
            )
        print(f"FLOP floor of the fast-weight forward: {floor:.2f} x static")
        workspace = a.D * a.F * 4 / 2**20
        print(f"ours keeps a workspace of {workspace:.0f} MiB between calls, not counted above")


if __name__ == "__main__":
    main()
