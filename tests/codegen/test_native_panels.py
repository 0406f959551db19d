"""The copy of W in the order of oneDNN's block product: what is in it, and products with it."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import relative_error
from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.gemm import FastMatrix
from ttt_compiler.codegen.cpu.native import blocks, panels

BF16 = torch.bfloat16
# The result is rounded once.
BOUND = 4e-3


@pytest.fixture(autouse=True)
def there_are_panels():
    if panels.shape_of(torch.empty(64, 32), BF16) is None:
        pytest.skip("this processor has no unit for bf16")


def in_order(w):
    """``w [D, F]`` as panels, by torch."""
    d, f = w.shape
    return w.to(BF16).reshape(d // 64, 64, f // 2, 2).permute(0, 2, 1, 3).contiguous()


def room(w):
    return torch.full(panels.shape_of(w, BF16), float("nan"), dtype=BF16)


@pytest.mark.parametrize("size", [(64, 32), (128, 96), (192, 608), (1024, 320)])
def test_packed(size):
    w = torch.randn(size)
    w[3, 5], w[60, 31] = float("nan"), float("inf")
    made = room(w)
    panels.pack(w, made)
    assert torch.equal(made.nan_to_num(7.0), in_order(w).nan_to_num(7.0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 256, 4112])
@pytest.mark.parametrize("size", [(64, 32), (320, 288), (1024, 608)])
def test_a_write_leaves_them(size, tokens, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w, v, h = (
            torch.randn(size),
            torch.randn(tokens, size[0]).to(BF16),
            torch.randn(tokens, size[1]).to(BF16),
        )
        exact, made = w.double() + v.double().t() @ h.double(), room(w)
        assert blocks.write(v, h, w, None, made, written=True)
        assert relative_error(w.double(), exact) < 3e-6
        assert torch.equal(made, in_order(w))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 128, 129, 700])
@pytest.mark.parametrize("size", [(64, 32), (192, 608)])
def test_products(size, rows, with_bias, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        w, h, bias = torch.randn(size), torch.randn(rows, size[1]).to(BF16), torch.randn(size[0]).to(BF16)
        made, out = room(w), torch.full((rows, size[0]), float("nan"), dtype=BF16)
        panels.pack(w, made)
        assert panels.apply(h, made, bias if with_bias else None, out)
        exact = h.double() @ w.to(BF16).double().t() + (bias.double() if with_bias else 0)
        assert relative_error(out.double(), exact) < BOUND
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(32, 64), (96, 192), (1024, 320)])
def test_products_with_a_turned_one(size):
    p, h = torch.randn(size).to(BF16), torch.randn(33, size[0]).to(BF16)
    made = torch.empty(panels.shape_of_turned(p), dtype=BF16)
    panels.pack_turned(p, made)
    assert torch.equal(made, in_order(p.t()))
    out = torch.empty(33, size[1], dtype=BF16)
    assert panels.apply(h, made, None, out)
    assert relative_error(out.double(), h.double() @ p.double()) < BOUND


def test_what_it_cannot_do_is_left_to_torch():
    w = torch.randn(64, 32)
    made = room(w)
    panels.pack(w, made)
    h, out = torch.randn(32, 20).to(BF16).t(), torch.empty(20, 64, dtype=BF16)
    assert not panels.apply(h, made, None, out)
    assert not panels.apply(h.contiguous(), made, torch.zeros(64), out)
    for size, dtype in (
        ((63, 32), BF16),
        ((64, 48), BF16),
        ((64, 32), torch.float16),
        ((64, 32), torch.float32),
    ):
        assert panels.shape_of(torch.empty(size), dtype) is None
    assert panels.shape_of(w.double(), BF16) is None
    for strange in (torch.empty(48, 64, dtype=BF16), torch.empty(32, 63, dtype=BF16), torch.empty(32, 64)):
        assert panels.shape_of_turned(strange) is None
    assert panels.shape_of_turned(torch.empty(64, 32, dtype=BF16).t()) is None
    with native.unused():
        assert panels.shape_of(w, BF16) is None


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_a_matrix_reads_the_copy_that_is_there(turns, strided):
    """Whatever a write has left, and whatever the operands, it is W."""
    d, f = 128, 96
    w0 = torch.randn(d, f).to(BF16)
    matrix = FastMatrix(w0, torch.full((d, f), float("nan")), BF16, name="test.panels", turns=turns)
    exact = w0.double()
    for rows in (20, 3, 64):
        v, h = torch.randn(rows, d).to(BF16), torch.randn(rows, f).to(BF16)
        x = torch.randn(f, 20).to(BF16).t() if strided else torch.randn(20, f).to(BF16)
        matrix.write(v, h)
        matrix.decay(0.5)
        exact = w0.double() + 0.5 * (exact + v.double().t() @ h.double() - w0.double())
        for _ in range(2):
            out = torch.empty(20, d, dtype=BF16)
            matrix.apply(x, None, out)
            assert relative_error(out.double(), x.double() @ exact.t()) < 2 * BOUND
            back = torch.empty(20, f, dtype=BF16)
            matrix.apply_transposed(out, back)
            assert relative_error(back.double(), out.double() @ exact) < 2 * BOUND
            matrix.write(v, h)
            exact = exact + v.double().t() @ h.double()
