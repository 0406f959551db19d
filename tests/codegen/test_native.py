"""The loops in C++ against the torch operations that they stand for, and products in a wider dtype."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import relative_error
from ttt_compiler.codegen.cpu import conv, gemm, native
from ttt_compiler.codegen.cpu.gemm import FastMatrix, product_dtype
from ttt_compiler.codegen.cpu.native.conv import MAX_TAPS, convolve

BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(native, "function", lambda *_: None)


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
