"""The templates, end to end: through AOTAutograd and Inductor's Triton code, interpreted on CPU tensors.

Each graph is what a converted layer becomes: activation, convolution, projection, scan, residual.
"""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

from tests.tolerances import assert_within_budget, relative_error
from ttt_compiler.codegen import choose, reference
from ttt_compiler.codegen.kernels.tiles import Tile
from ttt_compiler.offline.interpreter import inductor_on_cpu_tensors
from ttt_compiler.spec import WriteRule

PACKED = torch.stack(
    [
        torch.cat([torch.full((3,), -1), torch.arange(12), torch.arange(14)]),
        torch.cat([torch.arange(22), torch.full((7,), -1)]),
    ]
)
SIZES = (2, 29, 37, 19)  # B, T, F, D
LR = 0.3


def planned(monkeypatch, tile, groups, form="on_chip", span=8):
    """Every scan gets this plan."""
    from ttt_compiler.codegen import lowering_gpu

    plan = choose.ScanPlan(form, (tile,), groups, span, 0.0)
    monkeypatch.setattr(lowering_gpu, "scan_plan", lambda *_, **__: plan)


@pytest.fixture(autouse=True)
def triton_for_cpu():
    import ttt_compiler.codegen.lowering  # noqa: F401

    torch._dynamo.reset()
    with inductor_on_cpu_tensors(), torch._inductor.config.patch(force_disable_caches=True):
        yield


def layer(gate, up, t, w0, conv, proj, residual, bias, pos, chunk, decay, on_nonfinite):
    h = functional.silu(gate) * up
    v = torch.ops.ttt.chunk_conv(t, conv, pos, chunk) @ (proj * LR)
    return residual + torch.ops.ttt.chunk_scan(h, v, w0, bias, pos, chunk, decay, on_nonfinite)


def operands(dtype, sizes=SIZES):
    b, t, f, d = sizes
    shapes = [(b, t, f), (b, t, f), (b, t, d), (d, f), (d, 1, 5), (d, d), (b, t, d), (d,)]
    scales = [1, 1, 1, 0.2, 0.5, 0.3, 1, 1]
    return [(torch.randn(s) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)]


def exact(xs, pos, chunk, decay):
    gate, up, t, w0, conv, proj, residual, bias = xs
    rule = WriteRule(decay=decay)
    h = functional.silu(gate) * up
    return residual + reference.batched(h, t, w0, conv, proj, LR, chunk, pos, bias, rule)


def run(xs, pos, chunk, decay=1.0, on_nonfinite="raise", dynamic=False):
    return torch.compile(layer, dynamic=dynamic)(*xs, pos, chunk, decay, on_nonfinite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pos", [None, PACKED, PACKED[:1]])
def test_forward(dtype, pos):
    xs = operands(dtype)
    with torch.no_grad():
        y = run(xs, pos, 8)
        plain = exact(xs, pos, 8, 1.0)
        assert_within_budget(y, plain, exact([x.double() for x in xs], pos, 8, 1.0))


@pytest.mark.parametrize(("chunk", "decay"), [(1, 1.0), (5, 0.9), (29, 1.0), (64, 1.0)])
def test_chunks_and_decay(chunk, decay):
    xs = operands(torch.float32)
    with torch.no_grad():
        y = run(xs, None, chunk, decay)
        wide = exact([x.double() for x in xs], None, chunk, decay)
        assert_within_budget(y, exact(xs, None, chunk, decay), wide)


@pytest.mark.parametrize(("pos", "decay"), [(None, 1.0), (None, 0.8), (PACKED, 1.0), (PACKED, 0.8)])
def test_gradients(pos, decay):
    """Of every operand, against autograd through the fp64 reference."""
    xs = [x.requires_grad_() for x in operands(torch.float32)]
    wide = [x.detach().double().requires_grad_() for x in xs]
    y, want = run(xs, pos, 8, decay), exact(wide, pos, 8, decay)
    assert relative_error(y, want) < 1e-5
    seed = torch.randn(y.shape)
    y.backward(seed)
    want.backward(seed.double())
    for x, w in zip(xs, wide, strict=True):
        assert relative_error(x.grad, w.grad) < 1e-5


def test_dynamic_lengths_share_a_graph():
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, dynamic=True)
    counter = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        for length in (29, 40, 7):
            xs = operands(torch.float32, (2, length, 37, 19))
            y = compiled(*xs, None, 8, 1.0, "raise")
            wide = exact([x.double() for x in xs], None, 8, 1.0)
            assert_within_budget(y, exact(xs, None, 8, 1.0), wide)
    assert counter["unique_graphs"] == 1


def test_the_activation_fuses_into_the_scan(monkeypatch):
    """Two tiles along D or fewer: h is computed while it is loaded, and never written."""
    monkeypatch.setattr(choose, "INTERPRETED", Tile(16, 16, 64, 4, 1))
    xs = operands(torch.float32)
    found = kernels(code_of(xs))
    (scan,) = [s for n, s in found.items() if n.startswith("triton_tem")]
    assert "silu" not in "".join(n for n, s in found.items() if s is not scan)
    assert scan.count("libdevice.exp") == 2  # with and without a write
    with torch.no_grad():
        wide = exact([x.double() for x in xs], None, 8, 1.0)
        assert_within_budget(run(xs, None, 8), exact(xs, None, 8, 1.0), wide)


def test_an_activation_that_many_tiles_would_repeat_stays_outside(monkeypatch):
    monkeypatch.setattr(choose, "INTERPRETED", Tile(16, 16, 64, 4, 1))
    found = kernels(code_of(operands(torch.float32, (1, 20, 37, 50))))
    (scan,) = [s for n, s in found.items() if n.startswith("triton_tem")]
    assert "libdevice.exp" not in scan


def test_a_chunk_that_is_not_finite_is_skipped():
    xs = operands(torch.float32)
    xs[0][0, 10] = float("nan")
    with torch.no_grad():
        y = run(xs, None, 8, on_nonfinite="skip")
        b = [x.double() for x in xs]
        gate, up, t, w0, conv, proj, residual, bias = b
        rule = WriteRule(on_nonfinite="skip")
        h = functional.silu(gate) * up
        want = residual + reference.batched(h, t, w0, conv, proj, LR, 8, None, bias, rule)
    finite = torch.ones(29, dtype=torch.bool)
    finite[10] = False
    assert relative_error(y[:, finite], want[:, finite]) < 1e-5
    assert y[0, 10].isnan().all()


@pytest.mark.parametrize("groups", [1, 2])
def test_programs_that_walk_several_tiles(monkeypatch, groups):
    """Three tiles along F for one or two programs: they add to what they stored, and nothing fuses there."""
    planned(monkeypatch, Tile(16, 16, 16, 4, 1), groups)
    xs = [x.requires_grad_() for x in operands(torch.float32)]
    wide = [x.detach().double().requires_grad_() for x in xs]
    y, want = run(xs, None, 8), exact(wide, None, 8, 1.0)
    assert relative_error(y, want) < 1e-5
    y.sum().backward()
    want.sum().backward()
    for x, w in zip(xs, wide, strict=True):
        assert relative_error(x.grad, w.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decay", "span"), [(1.0, 8), (0.9, 8), (1.0, 16), (1.0, 64)])
def test_library_products(monkeypatch, dtype, decay, span):
    planned(monkeypatch, Tile(16, 16, 16, 4, 1), 1, form="library", span=span)
    xs = operands(dtype)
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(layer), *xs, None, 8, decay, "raise")
        assert "ttt_chunk_scan_library" in code
        plain = exact(xs, None, 8, decay)
        assert_within_budget(y, plain, exact([x.double() for x in xs], None, 8, decay))


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_gradients_by_library_products(monkeypatch, decay):
    from ttt_compiler.codegen import lowering_gpu

    monkeypatch.setattr(lowering_gpu, "gradient_form", lambda *_: "library")
    xs = [x.requires_grad_() for x in operands(torch.float32)]
    wide = [x.detach().double().requires_grad_() for x in xs]
    compiled = torch.compile(layer)
    _, codes = run_and_get_code(lambda: compiled(*xs, None, 8, decay, "raise").sum().backward())
    assert "chunk_scan_backward_library" in codes[1]
    exact(wide, None, 8, decay).sum().backward()
    for x, w in zip(xs, wide, strict=True):
        assert relative_error(x.grad, w.grad) < 1e-5


def code_of(xs, **kwargs):
    with torch.no_grad():
        return run_and_get_code(torch.compile(layer), *xs, None, 8, 1.0, "raise", **kwargs)[1][0]


def kernels(code):
    """Name and source of every Triton kernel in generated code."""
    parts = code.split("async_compile.triton('")[1:]
    return {p.split("'", 1)[0]: p.split("'''")[1] for p in parts}


def test_bias_and_residual_fuse_into_the_sum(monkeypatch):
    """Several programs along F: what follows the scan is one pointwise kernel over the partial outputs."""
    planned(monkeypatch, Tile(16, 16, 32, 4, 1), 2)
    found = kernels(code_of(operands(torch.float32)))
    (scan,) = [s for n, s in found.items() if n.startswith("triton_tem")]
    after = [s for s in found.values() if s is not scan and "tl.dot" not in s]
    epilogue = [s for s in after if s.count("tl.load(in_ptr") == 4]  # residual, bias, two partial outputs
    assert len(epilogue) == 1, list(found)


def test_bias_and_residual_fuse_into_the_scan(monkeypatch):
    """One tile along F: they are added before the output is stored for the first time."""
    monkeypatch.setattr(choose, "INTERPRETED", Tile(16, 16, 64, 4, 1))
    xs = operands(torch.float32)
    code = code_of(xs)
    (scan,) = [(n, s) for n, s in kernels(code).items() if n.startswith("triton_tem")]
    assert "add" in scan[0]
    assert scan[1].count("tl.store(out_ptr") == 2  # with and without a write
    with torch.no_grad():
        wide = exact([x.double() for x in xs], None, 8, 1.0)
        assert_within_budget(run(xs, None, 8), exact(xs, None, 8, 1.0), wide)
