"""The loops in C++ against the torch operations that they stand for, and products in a wider dtype."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tolerances import relative_error
from ttt_compiler.codegen.cpu import conv, gemm, native
from ttt_compiler.codegen.cpu.gemm import FastMatrix, product_dtype
from ttt_compiler.codegen.cpu.native import blocks, products, squares
from ttt_compiler.codegen.cpu.native.blocks import _run as run
from ttt_compiler.codegen.cpu.native.conv import MAX_TAPS, convolve, taps_gradient
from ttt_compiler.compat import processor

BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture
def without_compiler():
    with native.unused():
        yield


def shifted(src, taps):
    """In fp64, tap by tap."""
    out = torch.zeros(src.shape, dtype=torch.float64)
    for k in range(len(taps)):
        for i in range(src.shape[-2]):
            j = i + k - len(taps) // 2
            if 0 <= j < src.shape[-2]:
                out[..., i, :] += taps[k].double() * src[..., j, :].double()
    return out


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kernel", [1, 4, 5, 9])
@pytest.mark.parametrize("size", [(7, 3), (2, 1, 65), (2, 3, 6, 130)])
def test_convolution(dtype, kernel, size):
    src, taps = torch.randn(size).to(dtype), torch.randn(kernel, size[-1])
    out = torch.full(size, float("nan"), dtype=dtype)
    assert convolve(src, taps, out)
    assert relative_error(out.double(), shifted(src, taps)) < BOUNDS[dtype]


def test_nan_and_inf_pass_through():
    src = torch.randn(8, 70).bfloat16()
    src[2, 3], src[6, 69] = float("nan"), float("inf")
    out = torch.empty_like(src)
    assert convolve(src, torch.ones(3, 70), out)
    assert out.isnan().nonzero().tolist() == [[i, 3] for i in (1, 2, 3)]
    assert out.isinf().nonzero().tolist() == [[i, 69] for i in (5, 6, 7)]


def test_what_it_cannot_do_is_left_to_torch():
    src, taps, out = torch.randn(6, 8), torch.randn(3, 8), torch.empty(6, 8)
    assert not convolve(torch.randn(8, 6).t(), taps, out)
    assert not convolve(src, torch.randn(MAX_TAPS + 2, 8), out)
    assert not convolve(src.int(), taps, out.int())
    assert convolve(src[:0], taps, out[:0])


@pytest.mark.parametrize("kernel", [3, 11])
def test_without_a_compiler_the_result_is_the_same(kernel, without_compiler):
    src, taps, out = torch.randn(2, 9, 8), torch.randn(kernel, 8), torch.empty(2, 9, 8)
    conv.convolve(src, taps, out)
    assert relative_error(out.double(), shifted(src, taps)) < 1e-6


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, gemm.SHADOW_MIN_ROWS, gemm.WIDE_MIN_ROWS])
def test_a_matrix_on_either_kind_of_processor(monkeypatch, wide, dtype, rows):
    """With a unit for 16-bit products and without: applied before and after two writes, both ways round."""
    monkeypatch.setattr(gemm, "product_dtype", lambda d: torch.float32 if wide else d)
    w0, x, bias = torch.randn(24, 40).to(dtype), torch.randn(rows, 40).to(dtype), torch.randn(24).to(dtype)
    v, h = torch.randn(rows, 24).to(dtype), torch.randn(rows, 40).to(dtype)
    matrix = FastMatrix(w0, torch.full((24, 40), float("nan")), dtype, name="test.w")
    exact = w0.double()
    for _ in range(3):
        out, back = torch.empty(rows, 24, dtype=dtype), torch.ones(rows, 40, dtype=dtype)
        matrix.apply(x, bias, out)
        assert relative_error(out.double(), x.double() @ exact.t() + bias.double()) < 2 * BOUNDS[dtype]
        matrix.apply_transposed(v, back, accumulate=True)
        assert relative_error(back.double(), v.double() @ exact + 1) < 3 * BOUNDS[dtype]
        matrix.write(v, h)
        exact = exact + v.double().t() @ h.double()
        assert relative_error(matrix.master.double(), exact) < BOUNDS[dtype]


def test_products_of_wide_operands_stay_as_they_are():
    assert product_dtype(torch.float32) == torch.float32
    assert product_dtype(torch.float64) == torch.float64
    assert product_dtype(torch.bfloat16) in (torch.bfloat16, torch.float32)


# --- products and writes by oneDNN -----------------------------------------------------------------------

NARROW = [torch.float32, torch.bfloat16, torch.float16]
# Of up to 8208 terms in fp32, one after the other.
SUMS = 3e-6
# The last ones are summed in pieces.
SIZES = [
    (1, 1, 1),
    (7, 5, 9),
    (64, 33, 300),
    (33, 300, 257),
    (512, 96, 520),
    (40, 130, 608),
    (6205, 33, 70),
    (8208, 64, 64),
]


def has_blocks(dtype):
    if not blocks.there_are_blocks(dtype):
        pytest.skip("this processor's oneDNN makes no block products")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("tokens", "d", "f"), SIZES)
def test_a_write_in_blocks(tokens, d, f, dtype, threads):
    """From a base, from zero, and upon what is there; the copy is W rounded once."""
    has_blocks(dtype)
    v, h, base = (torch.randn(s).to(dtype) for s in ((tokens, d), (tokens, f), (d, f)))
    w, copy = torch.full((d, f), float("nan")), torch.empty(d, f, dtype=dtype)
    exact = v.double().t() @ h.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert blocks.write(v, h, w, base, copy, written=False)
        assert relative_error(w.double(), base.double() + exact) < SUMS
        assert torch.equal(copy, w.to(dtype))
        assert blocks.write(v, h, w, base, copy, written=True)
        assert relative_error(w.double(), base.double() + 2 * exact) < SUMS
        assert torch.equal(copy, w.to(dtype))
        assert blocks.write(v, h, w, None, None, written=False)
        assert relative_error(w.double(), exact) < SUMS
    finally:
        torch.set_num_threads(before)


def test_a_write_that_blocks_do_not_take_changes_nothing():
    v, h, w = torch.randn(6, 8), torch.randn(6, 10), torch.zeros(8, 10)
    for operands in (
        (v.double(), h.double(), w),
        (v, h.bfloat16(), w),
        (v[:, ::2], h, w[:4]),
        (v, h, w.double()),
    ):
        assert not blocks.write(*operands, None, None, written=True)
    assert not blocks.write(v[:0], h[:0], w, None, None, written=True)
    assert not w.any()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_write_by_torch_alone(dtype, monkeypatch, without_compiler):
    monkeypatch.setattr(blocks, "_function", lambda _: None)
    v, h, w0 = torch.randn(9, 6).to(dtype), torch.randn(9, 7).to(dtype), torch.randn(6, 7).to(dtype)
    matrix = FastMatrix(w0, torch.full((6, 7), float("nan")), dtype, name="test.w")
    for count in (1, 2):
        matrix.write(v, h)
        exact = w0.double() + count * (v.double().t() @ h.double())
        assert relative_error(matrix.master.double(), exact) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 7, 3), (64, 96, 33)])
def test_products(m, k, n, accumulate, dtype):
    if not products._there(dtype):
        pytest.skip("this processor's oneDNN makes no such product")
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    exact = a.double() @ b.double()
    for x in (a, a.t().contiguous().t()):
        for y in (b, b.t().contiguous().t()):
            out = torch.ones(m, n, dtype=dtype)
            assert products.multiply(x, y, out, accumulate=accumulate)
            assert relative_error(out.double(), exact + accumulate) < BOUNDS[dtype]


def test_products_that_onednn_does_not_take():
    out = torch.zeros(2, 4)
    assert not products.multiply(torch.randn(2, 3).double(), torch.randn(3, 4).double(), out.double())
    assert not products.multiply(torch.randn(2, 3), torch.randn(3, 4).bfloat16(), out)
    assert not products.multiply(torch.randn(2, 0), torch.randn(0, 4), out)
    assert not products.multiply(torch.randn(4, 6)[::2, ::2], torch.randn(3, 4), out)
    assert not products.multiply(torch.randn(1, 3).expand(2, 3), torch.randn(3, 4), out)
    assert not products.multiply(torch.randn(2, 3), torch.randn(3, 4), out.new_zeros(4, 2).t())
    assert not out.any()


@pytest.mark.parametrize("amd", [False, True])
def test_either_library_makes_the_same_product(amd, monkeypatch):
    monkeypatch.setattr(gemm, "is_amd", lambda: amd)
    a, b, bias = torch.randn(40, 12), torch.randn(12, 9), torch.randn(9)
    out = torch.full((40, 9), float("nan"))
    gemm.product(a, b, out)
    assert relative_error(out.double(), a.double() @ b.double()) < 1e-6
    gemm.product(a, b, out, accumulate=True)
    assert relative_error(out.double(), 2 * a.double() @ b.double()) < 1e-6
    gemm.apply(a, b.t().contiguous(), bias, out, "test")
    assert relative_error(out.double(), a.double() @ b.double() + bias.double()) < 1e-6


@pytest.mark.parametrize("dtype", BOUNDS)
def test_norms(dtype):
    x = torch.randn(300, 257).to(dtype)
    assert squares.norm(x) == pytest.approx(float(x.double().norm()), rel=1e-6)
    assert squares.norm(x.t()) == pytest.approx(float(x.double().norm()), rel=1e-3)
    assert squares.norm(x[:0]) == 0.0
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[299, 256] = bad
        assert not math.isfinite(squares.norm(x))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (16, 7, 3), (300, 33, 700), (20, 600, 65), (40, 6205, 70)]
)
def test_a_product_in_blocks(m, k, n, threads):
    has_blocks(torch.float32)
    a, b = torch.randn(m, k), torch.randn(k, n)
    exact = a.double() @ b.double()
    out = torch.full((m, n), float("nan"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert blocks.product(a, b, out)
        assert relative_error(out.double(), exact) < SUMS
        assert blocks.product(a, b, out, accumulate=True)
        assert relative_error(out.double(), 2 * exact) < SUMS
    finally:
        torch.set_num_threads(before)
    assert not blocks.product(a, torch.randn(n, k).t(), out) or 1 in (n, k)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kernel", [1, 4, 5, 9])
@pytest.mark.parametrize("size", [(7, 3), (2, 1, 65), (2, 3, 6, 130)])
def test_gradient_of_the_taps(dtype, kernel, size):
    grad, src = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    taps = torch.zeros(kernel, size[-1], dtype=torch.float64, requires_grad=True)
    rows = size[-2]
    out = torch.zeros(size, dtype=torch.float64)
    for k in range(kernel):
        shift = k - kernel // 2
        first, last = max(0, -shift), min(rows, rows - shift)
        if first < last:
            moved = src.double()[..., first + shift : last + shift, :]
            out = out + torch.nn.functional.pad(taps[k] * moved, (0, 0, first, rows - last))
    out.backward(grad.double())
    got = torch.zeros(kernel, size[-1], dtype=torch.float64)
    assert taps_gradient(grad, src, got)
    assert relative_error(got, taps.grad) < 1e-6
    assert not taps_gradient(grad, src[..., :1, :].expand(size), got) or rows == 1


def test_a_narrow_copy_keeps_nan_and_inf():
    has_blocks(torch.bfloat16)
    v, h = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(2, 64, dtype=torch.bfloat16)
    w, copy = torch.randn(64, 64), torch.empty(64, 64, dtype=torch.bfloat16)
    w[0, 3], w[5, 40], w[63, 63] = float("nan"), float("inf"), -float("inf")
    assert blocks.write(v, h, w, None, copy, written=True)
    assert torch.equal(copy.isnan(), w.isnan())
    assert torch.equal(copy.isinf(), w.isinf())


def test_norms_beyond_the_dtype_of_the_state_are_infinite():
    """So that a write whose products would overflow is refused."""
    x = torch.full((1 << 16,), 1e18)
    assert squares.norm(x) == math.inf
    assert squares.norm(x.double()) == pytest.approx(2.56e20)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_remainder_goes_through_the_loop_too(batch, monkeypatch):
    """In every batch, so that a row's result does not depend on its neighbours."""
    calls = []
    monkeypatch.setattr(conv, "by_loop", lambda *args: calls.append(convolve(*args)) or calls[-1])
    t, taps = torch.randn(batch, 11, 6).bfloat16(), torch.randn(6, 1, 5).bfloat16()
    out = conv.chunk_conv(t, taps, None, 4)
    assert all(calls)
    for b in range(batch):
        assert torch.equal(out[b : b + 1], conv.chunk_conv(t[b : b + 1], taps, None, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_upon_any_base_go_in_blocks(dtype, monkeypatch):
    """A transposed one (Conv1D), and one in a wider dtype (autocast)."""
    has_blocks(dtype)
    monkeypatch.setattr(gemm, "is_amd", lambda: True)
    done = []
    monkeypatch.setattr(
        gemm.blocks, "_run", lambda *args, **named: done.append(run(*args, **named)) or done[-1]
    )
    v, h, base = torch.randn(6, 8).to(dtype), torch.randn(6, 10).to(dtype), torch.randn(8, 10)
    for w0 in (base.to(dtype).t().contiguous().t(), base.double()):
        matrix = FastMatrix(w0, torch.empty(8, 10), dtype, name="test.w")
        for count in (1, 2):
            matrix.write(v, h)
            exact = w0.double() + count * (v.double().t() @ h.double())
            assert relative_error(matrix.master.double(), exact) < 1e-6
    assert done == [True] * 4


def test_a_compiler_that_cannot_build_the_loops_is_said_once(tmp_path, monkeypatch):
    bad = tmp_path / "g++"
    bad.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\necho "error: no _Float16" >&2; exit 1\n'
    )
    bad.chmod(0o755)
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(bad),)}),
        pytest.warns(RuntimeWarning, match="slower operations"),
    ):
        assert processor.build_cpp(f'extern "C" int never_built() {{ return {id(bad)}; }}') is None
