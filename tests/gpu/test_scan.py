"""The scan kernel on a device, with the tiles shipped for it, against its naive reference in fp64."""

from __future__ import annotations

import os

import pytest
import torch

from tests.tolerances import SEGMENTATION, assert_within_budget, relative_error
from ttt_compiler.codegen.cpu import scan as cpu_scan
from ttt_compiler.codegen.gpu import controls, conv, scan
from ttt_compiler.codegen.gpu.library import chunk_scan_library
from ttt_compiler.codegen.kernels.chunk_scan import Carried, chunk_scan_partial, naive_chunk_scan
from ttt_compiler.codegen.kernels.chunk_table import chunk_table
from ttt_compiler.codegen.kernels.tiles import DECAY, GRADIENT, RUNNING, SCAN, architecture, shipped

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0",
    reason="needs a CUDA device and TRITON_INTERPRET=0",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# B, T, I, O: prime, smaller than a tile, several tiles that are not full, multiples of everything.
SIZES = [(2, 37, 50, 23), (1, 1, 1, 1), (3, 141, 397, 153), (2, 256, 1024, 256)]
PACKED = torch.stack(
    [
        torch.cat([torch.full((3,), -1), torch.arange(81), torch.arange(57)]),
        torch.cat([torch.arange(102), torch.full((39,), -1)]),
        torch.arange(141) + 5,
    ]
)


def operands(sizes, dtype, *, shared=True, base=True):
    batch, length, inner, outer = sizes
    q = torch.randn(batch, length, inner).to(dtype)
    k = q if shared else torch.randn(batch, length, inner).to(dtype)
    v = (0.1 * torch.randn(batch, length, outer)).to(dtype)
    return q, k, v, torch.randn(outer, inner).to(dtype) if base else None


def close(ours, plain, exact):
    """Narrow results within the budget; of fp32, which plain torch sums in blocks, another order of sums."""
    if ours.dtype == torch.float32:
        assert relative_error(ours, exact) < SEGMENTATION
    else:
        assert_within_budget(ours, plain, exact)


def there(x):
    return None if x is None else x.cuda()


def check(sizes, chunk, dtype, use=SCAN, *, pos=None, shared=True, base=True, carried=False, **kwargs):
    """Every shipped tile of the use with the most programs per row of W, the first one with the least too."""
    q, k, v, w0 = operands(sizes, dtype, shared=shared, base=base)
    table = None if pos is None else chunk_table(pos, chunk)
    slots = torch.tensor([-1, 2, 0][: sizes[0]], dtype=torch.int32)
    before = torch.randn(4, sizes[3], sizes[2])

    def states(to, where):
        if not carried:
            return {}
        init = Carried(before.to(to).to(where), slots.to(where))
        final = Carried(torch.zeros_like(init.states), torch.tensor([3, -1, 1], dtype=torch.int32).to(where))
        return {"init": init, "final": final}

    def naive(to):
        given = [None if x is None else x.to(to) for x in (q, k, v, w0)]
        made = states(to, "cpu")
        return naive_chunk_scan(*given, table, chunk, **made, **kwargs), made

    (plain, _), (exact, kept) = naive(dtype), naive(torch.float64)
    on_device = there(q)
    given = (on_device, on_device if shared else there(k), there(v), there(w0), there(table), chunk)
    for place, tile in enumerate(shipped(architecture(on_device.device), dtype, use)):
        choices = tile.group_choices(sizes[2])
        for groups in {choices[-1], choices[0 if place == 0 else -1]}:
            made = states(torch.float32, "cuda")
            first, *again = (
                chunk_scan_partial(*given, tile, groups, **made, **kwargs).sum(0) for _ in range(3)
            )
            assert all(torch.equal(first, x) for x in again), "another result at another time"
            close(first.cpu().to(dtype), plain, exact)
            if carried:
                got, want = made["final"].states.cpu(), kept["final"].states
                close(got.to(dtype), naive(dtype)[1]["final"].states, want)
                assert not bool(got[[0, 2]].any())


@DTYPES
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk", [16, 100])
def test_forward(sizes, chunk, dtype):
    check(sizes, chunk, dtype)


@DTYPES
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_that_divide_nothing(chunk, dtype):
    check(SIZES[2], chunk, dtype)


@DTYPES
@pytest.mark.parametrize("sizes", SIZES[::2])
def test_gradients_are_scans(sizes, dtype):
    check(sizes, 24, dtype, GRADIENT, shared=False)
    check(sizes, 24, dtype, GRADIENT, shared=False, base=False, reverse=True)


@DTYPES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("decay", "use"), [(1.0, GRADIENT), (0.9, DECAY)])
def test_documents(reverse, decay, use, dtype):
    check(SIZES[2], 24, dtype, use, pos=PACKED, reverse=reverse, base=not reverse, shared=False, decay=decay)


@DTYPES
@pytest.mark.parametrize(("decay", "use"), [(1.0, RUNNING), (0.9, DECAY)])
def test_states(decay, use, dtype):
    check(SIZES[2], 24, dtype, use, pos=PACKED, carried=True, decay=decay)


@DTYPES
@pytest.mark.parametrize("form", ["on_chip", "library"])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_gradients_of_the_op(monkeypatch, form, decay, dtype):
    batch, length, inner, outer = 2, 141, 397, 153
    h, v, dy = (torch.randn(batch, length, n).to(dtype) for n in (inner, outer, outer))
    v, w0 = v * 0.1, torch.randn(outer, inner).to(dtype)
    monkeypatch.setattr(scan, "gradient_form", lambda *_: form)
    rest = (None, 24, decay, "raise")
    ours = scan.chunk_scan_backward(*(x.cuda() for x in (dy, h, v, w0)), *rest)
    plain = cpu_scan.chunk_scan_backward(dy, h, v, w0, *rest)
    exact = cpu_scan.chunk_scan_backward(*(x.double() for x in (dy, h, v, w0)), *rest)
    for a, b, c in zip(ours, plain, exact, strict=True):
        close(a.cpu(), b, c)


@DTYPES
@pytest.mark.parametrize("span", [24, 96])
def test_library_products(span, dtype):
    h, _, v, w0 = operands(SIZES[2], dtype)
    exact = naive_chunk_scan(*(x.double() for x in (h, h, v, w0)), None, 24)
    plain = naive_chunk_scan(h, h, v, w0, None, 24)
    out = torch.empty(*v.shape, dtype=dtype, device="cuda")
    chunk_scan_library(h.cuda(), v.cuda(), w0.cuda(), chunk=24, span=span, decay=1.0, out=out)
    close(out.cpu(), plain, exact)


@pytest.mark.parametrize("pos", [None, PACKED])
def test_convolution_and_controls(pos):
    t, h, taps, dv = (torch.randn(s) for s in ((3, 141, 53), (3, 141, 97), (53, 1, 5), (3, 141, 53)))
    where = there(pos)
    assert (
        relative_error(
            conv.chunk_conv(t.cuda(), taps.cuda(), where, 24).cpu(), conv.chunk_conv(t, taps, pos, 24)
        )
        < 1e-5
    )
    ours = conv.chunk_conv_dweight(dv.cuda(), t.cuda(), where, 24, 5).cpu()
    assert relative_error(ours, conv.chunk_conv_dweight(dv, t, pos, 24, 5)) < 1e-5
    limit = torch.tensor(40.0)
    ours = controls.limit_writes(t.cuda(), h.cuda(), limit.cuda(), where, 24, True).cpu()
    assert relative_error(ours, controls.limit_writes(t, h, limit, pos, 24, True)) < 1e-5


def test_strides_beyond_int32_are_kept():
    length, inner = 20, 48
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device="cuda").as_strided(
        (2, length, inner), (2**31, inner, 1)
    )
    far[0], far[1] = torch.randn(length, inner), torch.randn(length, inner)
    v, w0 = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((2, length, 8), (8, inner)))
    near = far.clone(memory_format=torch.contiguous_format)
    tile = shipped(architecture(v.device), v.dtype, SCAN)[0]
    y, want = (chunk_scan_partial(x, x, v, w0, None, 8, tile, 1) for x in (far, near))
    assert torch.equal(y, want)
