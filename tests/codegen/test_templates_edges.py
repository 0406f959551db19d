"""What graphs may hold besides a plain layer: views of positions, no tokens, torch's other TF32 setting."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import relative_error
from ttt_compiler.codegen import reference
from ttt_compiler.offline.interpreter import inductor_on_cpu_tensors

D, F, CHUNK = 10, 20, 4


@pytest.fixture(autouse=True)
def triton_for_cpu():
    import ttt_compiler.codegen.lowering  # noqa: F401

    torch._dynamo.reset()
    with inductor_on_cpu_tensors(), torch._inductor.config.patch(force_disable_caches=True):
        yield


def scan(h, t, w0, conv, pos):
    v = torch.ops.ttt.chunk_conv(t, conv, pos, CHUNK)
    return torch.ops.ttt.chunk_scan(h, v, w0, None, pos, CHUNK, 1.0, "raise")


def operands(batch, length):
    shapes = ((batch, length, F), (batch, length, D), (D, F), (D, 1, 5))
    return [torch.randn(s) for s in shapes]


HALVES = {
    "columns": (torch.cat([torch.arange(12), torch.arange(6), torch.arange(6)])[None], 1),
    "rows": (torch.stack([torch.arange(12), torch.cat([torch.arange(6), torch.arange(6)])]), 0),
}


@pytest.mark.parametrize("cut", HALVES)
def test_two_views_of_one_tensor_of_positions(cut):
    """Views of a buffer share its name, and must not share its table of chunks."""
    pos, axis = HALVES[cut]
    args = operands(1, 12)

    def both(pos, *args):
        return [scan(*args, part) for part in pos.chunk(2, axis)]

    for y, part in zip(torch.compile(both)(pos, *args), pos.chunk(2, axis), strict=True):
        h, t, w0, conv = args
        assert relative_error(y, reference.batched(h, t, w0, conv, None, 1.0, CHUNK, part)) < 1e-5


@pytest.mark.parametrize("sizes", [(0, 5), (1, 0)])
@pytest.mark.parametrize("documents", [False, True])
def test_no_tokens(sizes, documents):
    args = [x.requires_grad_() for x in operands(*sizes)]
    pos = torch.arange(sizes[1]).expand(max(sizes[0], 1), -1) if documents else None
    y = torch.compile(scan)(*args, pos)
    assert y.shape == (*sizes, D)
    y.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in args)


def test_the_newer_setting_of_tf32():
    """Reading the legacy one would raise."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        args = operands(1, 9)
        y = torch.compile(scan)(*args, None)
    finally:
        matmul.fp32_precision = before
    h, t, w0, conv = args
    assert relative_error(y, reference.batched(h, t, w0, conv, None, 1.0, CHUNK)) < 5e-3
