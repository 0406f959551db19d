"""The ops of GPUs, run on CPU tensors, equal those of the CPU, wherever documents lie."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import relative_error
from ttt_compiler.codegen.cpu import controls as cpu_controls
from ttt_compiler.codegen.cpu import conv as cpu_conv
from ttt_compiler.codegen.cpu import scan as cpu_scan
from ttt_compiler.codegen.gpu import controls, conv, scan
from ttt_compiler.codegen.kernels.chunk_table import require_whole_documents
from ttt_compiler.errors import PositionError
from ttt_compiler.offline import interpreter

B, T, F, D, CHUNK = 2, 29, 21, 13, 6
PACKED = torch.stack(
    [
        torch.cat([torch.full((3,), -1), torch.arange(12), torch.arange(14)]),
        torch.cat([torch.arange(22), torch.full((7,), -1)]),
    ]
)
POSITIONS = pytest.mark.parametrize("pos", [None, PACKED, PACKED[1:]])


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    interpreter.install()


@POSITIONS
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution(pos, kernel):
    t, taps, dv = torch.randn(B, T, D), torch.randn(D, 1, kernel), torch.randn(B, T, D)
    args = (pos, CHUNK)
    assert torch.allclose(conv.chunk_conv(t, taps, *args), cpu_conv.chunk_conv(t, taps, *args), atol=1e-5)
    want = cpu_conv.chunk_conv_dweight(dv, t, *args, kernel)
    assert relative_error(conv.chunk_conv_dweight(dv, t, *args, kernel), want) < 1e-5


@POSITIONS
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("limit", [None, 8.0, 1e9])
@pytest.mark.parametrize("chunk", [CHUNK, 40])
def test_controls(pos, unit, limit, chunk):
    """A limit between the norms of the chunks scales some of them."""
    v, h = torch.randn(B, T, D).double(), torch.randn(B, T, F).double()
    h[0, 4] = 0
    bound = None if limit is None else torch.tensor(limit / (4 if unit else 1), dtype=torch.float64)
    args = (v, h, bound, pos, chunk, unit)
    want = cpu_controls.limit_writes(*args)
    assert relative_error(controls.limit_writes(*args), want) < 1e-12
    if limit == 8.0 and chunk == CHUNK:
        free = cpu_controls.limit_writes(v, h, None, pos, chunk, unit)
        scaled = (want - free).abs().amax(-1) > 1e-9
        assert scaled.any()
    grad = torch.randn(B, T, D).double()
    ours = controls.limit_writes_backward(grad, *args)
    theirs = cpu_controls.limit_writes_backward(grad, *args)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@POSITIONS
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_scan(pos, decay, on_nonfinite):
    h, v, w0, bias = torch.randn(B, T, F), torch.randn(B, T, D), torch.randn(D, F), torch.randn(D)
    dy = torch.randn(B, T, D)
    if on_nonfinite == "skip":
        v[1, 8] = float("inf")
    rest = (pos, CHUNK, decay, on_nonfinite)
    want = cpu_scan.chunk_scan(h, v, w0, bias, *rest)
    assert relative_error(scan.chunk_scan(h, v, w0, bias, *rest), want) < 1e-5
    ours = scan.chunk_scan_backward(dy, h, v, w0, *rest)
    theirs = cpu_scan.chunk_scan_backward(dy, h, v, w0, *rest)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_split_document_is_refused_as_on_cpu():
    split = torch.cat([torch.arange(8), torch.full((3,), -1), torch.arange(8, 20)])[None]
    with pytest.raises(PositionError, match="splits a document"):
        require_whole_documents(split)
    require_whole_documents(torch.cat([torch.full((3,), -1), torch.arange(8, 20)])[None])
    require_whole_documents(PACKED)
    with pytest.raises(PositionError):
        scan.chunk_scan(torch.randn(1, 23, F), torch.randn(1, 23, D), torch.randn(D, F), None, split, CHUNK)


@pytest.mark.parametrize("sizes", [(0, 5), (1, 0)])
def test_gradients_of_no_tokens(sizes):
    """States that no program writes are zeros, whatever lay in their memory."""
    h, v, dy = torch.randn(*sizes, F), torch.randn(*sizes, D), torch.randn(*sizes, D)
    w0 = torch.randn(D, F)
    rest = (None, CHUNK, 1.0, "raise")
    torch.empty(max(sizes), D, F).fill_(float("nan"))  # what the allocator hands out next
    ours, theirs = (m.chunk_scan_backward(dy, h, v, w0, *rest) for m in (scan, cpu_scan))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert controls.limit_writes(v, h, torch.tensor(1.0), None, CHUNK, True).shape == v.shape


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("chunk", [CHUNK, 40])
def test_gradients_by_library_products(monkeypatch, chunk, decay):
    h, v, w0, dy = torch.randn(B, T, F), torch.randn(B, T, D), torch.randn(D, F), torch.randn(B, T, D)
    monkeypatch.setattr(scan, "gradient_form", lambda *_: "library")
    rest = (None, chunk, decay, "raise")
    want = cpu_scan.chunk_scan_backward(dy, h, v, w0, *rest)
    for a, b in zip(scan.chunk_scan_backward(dy, h, v, w0, *rest), want, strict=True):
        assert relative_error(a, b) < 1e-5
