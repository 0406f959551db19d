"""What computes a fast-weight layer: ours, the official algorithm in its published forms, the static layer.

The official forms are written from their description. May be changed here: competitors, if they compute the
same function; :meth:`bench.layer.Layer.gate` says whether they do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import ttt_compiler.codegen.lowering  # noqa: F401
from bench.layer import KEY, LR, Layer, Leaving, fresh_state
from bench.results import ORDERED, PRODUCTS
from ttt_compiler.codegen import ops  # noqa: F401
from ttt_compiler.codegen.cpu import gemm
from ttt_compiler.codegen.cpu.native import panels
from ttt_compiler.codegen.cpu.native.products import multiply
from ttt_compiler.compat.processor import product_dtype

Run = Callable[[], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]


def stacked(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor,
    lr: float,
    chunk: int,
    product: Product = torch.matmul,
) -> Tensor:
    """The official training form: every chunk's weight in memory at once, by a cumulative sum.

    Tokens are padded to a multiple of C; the last chunk's write is left out.
    """
    batch, length, width = h.shape
    short = -length % chunk
    if short:  # a pad of nothing is a copy
        h, t = (functional.pad(x, (0, 0, 0, short)) for x in (h, t))
    n = (length + short) // chunk
    hc = h.view(batch, n, chunk, width)
    tc = t.view(batch * n, chunk, -1).transpose(1, 2)
    tc = functional.conv1d(tc, conv, padding=conv.shape[-1] // 2, groups=t.shape[-1]).transpose(1, 2)
    v = product(tc.reshape(batch, n, chunk, -1)[:, :-1], proj)
    delta = lr * product(v.transpose(2, 3), hc[:, :-1])
    weights = torch.cat([w0.expand(batch, 1, *w0.shape), delta], 1).cumsum(1)
    return product(hc, weights.transpose(2, 3)).reshape(batch, length + short, -1)[:, :length]


def one_chunk(
    w: Tensor,
    h: Tensor,
    t: Tensor,
    conv: Tensor,
    proj: Tensor,
    lr: float,
    chunk: int,
    product: Product = torch.matmul,
) -> tuple[Tensor, Tensor]:
    """A chunk's part of the official inference loop: its output, and the weight that comes after."""
    y = product(h, w.t())
    if h.shape[1] == chunk:
        width = t.shape[-1]
        taps = functional.conv1d(t.transpose(1, 2), conv, padding=conv.shape[-1] // 2, groups=width)
        w = w + lr * product(product(taps.transpose(1, 2)[0], proj).t(), h[0])
    return y, w


def loop(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    conv: Tensor,
    proj: Tensor,
    lr: float,
    chunk: int,
    product: Product = torch.matmul,
    body: Callable[..., tuple[Tensor, Tensor]] = one_chunk,
) -> tuple[Tensor, Tensor]:
    """The official inference loop of one sequence: its output, and the weight that comes after."""
    w, out = w0.clone(), []
    for start in range(0, h.shape[1], chunk):
        part, keys = t[:, start : start + chunk], h[:, start : start + chunk]
        y, w = body(w, keys, part, conv, proj, lr, chunk, product)
        out.append(y)
    return torch.cat(out, 1), w


def same_library(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` by the library that ours calls, so that it is no advantage of ours."""
    out = x.new_empty(*x.shape[:-1], y.shape[-1])
    for i in itertools.product(*map(range, x.shape[:-2])):
        gemm.product(x[i], y[i[: y.dim() - 2]], out[i])
    return out


class _SameLibrary(torch.autograd.Function):
    """:func:`same_library` that can be differentiated; y has x's leading dimensions, or none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return same_library(x, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        of_x = same_library(g, y.transpose(-1, -2))
        if y.dim() == 2:
            x, g = x.flatten(0, -2), g.flatten(0, -2)
        return of_x, same_library(x.transpose(-1, -2), g)


def rewritten(h: Tensor, t: Tensor, w0: Tensor, conv: Tensor, proj: Tensor, lr: float, chunk: int) -> Tensor:
    """What the rewrite pass makes of a layer without a state."""
    v = torch.ops.ttt.chunk_values(t, conv * lr, proj, None, chunk)
    return torch.ops.ttt.chunk_scan(h, v, w0, None, None, chunk)


def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By Inductor, for static shapes."""
    return torch.compile(fn, dynamic=False, fullgraph=True)


def static(layer: Layer) -> Run:
    """The projection that a layer without fast weights has."""
    return lambda: functional.linear(layer.h, layer.w0)


def libraries(layer: Layer) -> dict[str, Run]:
    """The static projection by each GEMM library: the fastest one is the peak of this machine.

    Also with W in the order in which the product reads it, put there before: no layer's cost, but a peak.
    """
    shape = layer.shape
    flat = layer.h.view(-1, shape.f)
    out = torch.empty(len(flat), shape.d, dtype=layer.dtype)

    def onednn() -> Tensor:
        assert multiply(flat, layer.w0.t(), out), "oneDNN does not take this product any more: no timing"
        return out

    found: dict[str, Run] = {"torch.mm": lambda: torch.mm(flat, layer.w0.t(), out=out)}
    if layer.dtype == torch.float32 and multiply(flat, layer.w0.t(), out):
        found["oneDNN"] = onednn
    wide = layer.w0.float()
    if (size := panels.shape_of(wide, layer.dtype)) is not None:
        ordered = torch.empty(size, dtype=layer.dtype)
        panels.pack(wide, ordered)

        def in_order() -> Tensor:
            assert panels.apply(flat, ordered, None, out), (
                "oneDNN does not take this product any more: no timing"
            )
            return out

        found[ORDERED] = in_order
    return found


def products(layer: Layer, *, state: bool) -> dict[str, Run]:
    """The plain recurrent form's products and nothing else: what is around them costs the rest.

    No limit: a form with fewer FLOPs, or in another library's order of operands, is faster than these calls.
    In fp32, widened beforehand, where the processor has no unit for the dtype; into buffers that exist.
    ``state``: whether the last complete chunk is written too.
    """
    s, wide = layer.shape, product_dtype(layer.dtype)
    # Small, since nothing sets w back between rounds.
    h, t, w0, proj = (x.to(wide) for x in (layer.h, layer.t, layer.w0, layer.proj * 1e-6))
    w, y, v = (
        w0.clone(),
        torch.empty(s.batch, s.tokens, s.d, dtype=wide),
        torch.empty(s.chunk, s.d, dtype=wide),
    )
    written = s.written(state=state)

    def run() -> Tensor:
        for b in range(s.batch):
            for i, start in enumerate(range(0, s.tokens, s.chunk)):
                rows = slice(start, start + s.chunk)
                gemm.product(h[b, rows], w.t(), y[b, rows])
                if i < written:
                    gemm.product(t[b, rows], proj, v)
                    gemm.product(v.t(), h[b, rows], w, accumulate=True)
        return y

    return {PRODUCTS: run}


def forward(layer: Layer) -> dict[str, Run]:
    """Without a state: what training and scoring run forward."""
    args = (layer.h, layer.t, layer.w0, layer.conv, layer.proj, LR, layer.shape.chunk)
    ours, all_at_once = compiled(rewritten), compiled(stacked)
    found: dict[str, Run] = {
        "ours": lambda: ours(*args),
        "official training form": lambda: stacked(*args),
        "official training form, compiled": lambda: all_at_once(*args),
        "official inference loop": looping(layer),
        "official inference loop, compiled": _by_row(compiled(loop), args),
    }
    if other_library(layer):
        found["official training form, our library"] = lambda: stacked(*args, same_library)
    return found


def other_library(layer: Layer) -> bool:
    """Whether ours makes products by another library than torch's operations do."""
    rows = min(layer.shape.chunk, layer.shape.tokens)
    return layer.dtype == torch.float32 and gemm.is_amd() and rows >= gemm.ONEDNN_MIN_ROWS


def prefill(layer: Layer) -> dict[str, Leaving]:
    """With the state that comes after: what serving runs on a prompt."""
    args = (layer.h, layer.t, layer.w0, layer.conv, layer.proj, LR, layer.shape.chunk)
    found = {
        "ours": running(layer),
        "official inference loop": looping(layer),
        "official inference loop, compiled": _by_row(compiled(loop), args),
    }
    if other_library(layer):
        found["official inference loop, our library"] = _by_row(loop, (*args, same_library))
    return found


def looping(layer: Layer) -> Leaving:
    """The official inference loop, as it is published."""
    return _by_row(loop, (layer.h, layer.t, layer.w0, layer.conv, layer.proj, LR, layer.shape.chunk))


def by_compiled_chunks(layer: Layer) -> Leaving:
    """The official inference loop whose body is compiled: however long the text, that takes as long."""
    args = (layer.h, layer.t, layer.w0, layer.conv, layer.proj, LR, layer.shape.chunk)
    return _by_row(functools.partial(loop, body=compiled(one_chunk)), args)


def running(layer: Layer) -> Leaving:
    """The op of a running sequence, from a fresh state each time."""
    s = layer.shape
    state = fresh_state(s.d, s.f, s.chunk, s.batch, layer.dtype)
    site, constants = state.sites[KEY], state.specs[0].encode()
    fresh = site.rows.clone()

    def run() -> Tensor:
        site.rows.copy_(fresh)
        return torch.ops.ttt.fast_weight_step(
            *(layer.h, layer.t, layer.w0, None, layer.conv, layer.proj, None, constants, *site, state.batch)
        )

    def weights() -> Tensor:
        state.finish_writes(lambda _: layer.w0)
        return torch.stack([state.matrix(KEY, b, layer.w0) for b in range(s.batch)])

    return Leaving(run, weights)


def training(layer: Layer) -> dict[str, Callable[[], object]]:
    """Forward and backward, gradients of all operands; the static product's are none of the same function."""

    def saved(*args: Tensor) -> Tensor:
        return checkpoint(stacked, *args, use_reentrant=False)

    def linear(h: Tensor, t: Tensor, w0: Tensor, *_: object) -> Tensor:
        return functional.linear(h, w0)

    forms = {
        "static": linear,
        "ours": compiled(rewritten),
        "official training form": stacked,
        "official training form, compiled": compiled(stacked),
        "official training form, checkpointed": saved,
    }
    if other_library(layer):
        forms["official training form, our library"] = functools.partial(stacked, product=_SameLibrary.apply)
    return {name: functools.partial(gradients, form, layer) for name, form in forms.items()}


def gradients(fn: Callable[..., Tensor], layer: Layer) -> list[Tensor | None]:
    """Of the sum of ``fn``'s output times a fixed one, for h, t, w0, conv and proj."""
    given = (layer.h, layer.t, layer.w0, layer.conv, layer.proj)
    tensors = [x.detach().requires_grad_() for x in given]
    y = fn(*tensors, LR, layer.shape.chunk)
    y.backward(layer.t)
    return [x.grad for x in tensors]


def _by_row(fn: Callable[..., tuple[Tensor, Tensor]], args: tuple) -> Leaving:
    """The loop takes one sequence: a batch is read one by one."""
    h, t, *rest = args
    rows = [(h[b : b + 1], t[b : b + 1]) for b in range(len(h))]
    left: list[Tensor] = []

    def run() -> Tensor:
        out, after = [], []
        for row in rows:
            y, w = fn(*row, *rest)
            out.append(y)
            after.append(w)
        # What the call before has left is given up last, so that it hides nothing of this call's memory.
        left[:] = after
        return out[0] if len(out) == 1 else torch.cat(out)

    return Leaving(run, lambda: torch.stack(left))
