"""The library form of the scan, on CPU tensors, equals the specification wherever spans and texts end."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import assert_within_budget, relative_error
from ttt_compiler.codegen.cpu import scan as cpu_scan
from ttt_compiler.codegen.forms_spans import Spans
from ttt_compiler.codegen.gpu import scan
from ttt_compiler.codegen.gpu.library import chunk_scan_backward_library, chunk_scan_library
from ttt_compiler.codegen.kernels.prefix_states import prefix_states
from ttt_compiler.offline import interpreter

F, D, CHUNK = 21, 13, 4
# Less than a chunk, whole spans of every size, and ends inside of a chunk, of a first block, of a second one.
LENGTHS = pytest.mark.parametrize("length", [3, 4, 32, 37, 46, 61])
# Span in chunks and states held; W that decays is written after every chunk.
CUTS = pytest.mark.parametrize(
    ("decay", "chunks", "held"),
    [
        (1.0, 1, 1),
        (1.0, 1, 3),
        (1.0, 2, 2),
        (1.0, 4, 1),
        (1.0, 4, 99),
        (1.0, 16, 1),
        (0.9, 1, 2),
        (0.9, 1, 99),
    ],
)


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    interpreter.install()


def operands(length, dtype=torch.float32, batch=2):
    shapes = [(batch, length, D), (batch, length, F), (batch, length, D), (D, F)]
    scales = [1, 1, 0.3, 0.2]
    return [(torch.randn(s) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)]


@LENGTHS
@CUTS
def test_forward(length, decay, chunks, held):
    _, h, v, w0 = operands(length)
    out = torch.full((2, length, D), float("nan"))
    y = chunk_scan_library(h, v, w0, chunk=CHUNK, span=CHUNK * chunks, held=held, decay=decay, out=out)
    assert y is out
    want = cpu_scan.chunk_scan(*(x.double() for x in (h, v, w0)), None, None, CHUNK, decay, "raise")
    assert relative_error(y, want) < 1e-5


@LENGTHS
@CUTS
def test_gradients(monkeypatch, length, decay, chunks, held):
    """Through the op, which asks for the plan."""
    dy, h, v, w0 = operands(length)
    monkeypatch.setattr(scan, "gradient_plan", lambda *_, **__: Spans(CHUNK * chunks, held))
    rest = (None, CHUNK, decay, "raise")
    ours = scan.chunk_scan_backward(dy, h, v, w0, *rest)
    want = cpu_scan.chunk_scan_backward(*(x.double() for x in (dy, h, v, w0)), *rest)
    for a, b in zip(ours, want, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("decay", "chunks"), [(1.0, 1), (1.0, 2), (1.0, 8), (0.9, 1)])
def test_narrow_operands(dtype, decay, chunks):
    """States are summed in fp32: the budget is plain torch's error in the same dtype."""
    dy, h, v, w0 = operands(61, dtype)
    span = CHUNK * chunks
    wide = [x.double() for x in (dy, h, v, w0)]
    rest = (None, CHUNK, decay, "raise")
    y = chunk_scan_library(
        h, v, w0, chunk=CHUNK, span=span, held=4, decay=decay, out=torch.empty(2, 61, D, dtype=dtype)
    )
    plain, exact = (cpu_scan.chunk_scan(*x, None, *rest) for x in ((h, v, w0), wide[1:]))
    assert_within_budget(y, plain, exact)
    ours = chunk_scan_backward_library(dy, h, v, w0, CHUNK, decay, span, 4)
    plain, exact = (cpu_scan.chunk_scan_backward(*x, *rest) for x in ((dy, h, v, w0), wide))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_within_budget(a, b, c)


def test_a_transposed_weight():
    _, h, v, w0 = operands(61)
    turned = w0.t().contiguous().t()
    given = {"chunk": CHUNK, "span": CHUNK, "held": 3, "decay": 0.9}
    a, b = (chunk_scan_library(h, v, w, **given, out=torch.empty(2, 61, D)) for w in (w0, turned))
    assert torch.equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.8])
@pytest.mark.parametrize("spans", [1, 5])
def test_states_by_hand(reverse, decay, spans):
    """More numbers than a program takes, and the state after them."""
    shape = (37, 41)
    written = spans if reverse else spans - 1
    increments, base = torch.randn(written, *shape), None if reverse else torch.randn(shape)
    state = torch.randn(shape)
    want, w = [], state.clone()
    for i in range(spans)[:: -1 if reverse else 1]:
        want.append(w)
        if i < written:
            zero = torch.zeros(shape) if base is None else base
            w = zero + decay * (w - zero) + increments[i]
    reads = prefix_states(increments, base, state, spans, torch.float32, decay=decay, reverse=reverse)
    assert torch.allclose(reads, torch.stack(want[:: -1 if reverse else 1]), atol=1e-5)
    assert torch.allclose(state, w, atol=1e-5)
