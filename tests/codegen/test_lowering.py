"""What Inductor makes of the ops: the generated code, and that it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import ttt_compiler.codegen.lowering  # noqa: F401
from tests.codegen.test_ops import D, F, positions, problem, spec, state
from tests.tolerances import FP64, relative_error


@pytest.fixture(autouse=True)
def fresh_code():
    """Graphs of no backend of ours are cached without regard to what our lowerings are."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def conv_and_scan(h, t, w0, conv, proj, bias, pos):
    v = torch.ops.ttt.chunk_values(t + t, conv, proj, pos, 5)
    return torch.ops.ttt.chunk_scan(h, v, w0, bias, pos, 5)


def test_conv_and_scan_write_into_planned_memory():
    args = problem()
    compiled = torch.compile(conv_and_scan, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, *args, None)
    for kernel in ("values", "scan"):
        call = code.split(f"extern_kernels.ttt_chunk_{kernel}(")
        assert "out=buf" in call[1].split("\n")[0], kernel
    assert relative_error(out, conv_and_scan(*args, None)) < FP64


def test_a_convolution_alone_writes_into_planned_memory():
    """Of a layer without P."""
    _, t, _, conv, _, _ = problem()
    compiled = torch.compile(lambda: torch.ops.ttt.chunk_conv(t + t, conv, None, 5) + 1, fullgraph=True)
    _, (code,) = run_and_get_code(compiled)
    assert "out=buf" in code.split("extern_kernels.ttt_chunk_conv(")[1].split("\n")[0]


@pytest.mark.parametrize("pos", [None, positions()], ids=["whole", "documents"])
def test_any_length_by_one_graph(pos):
    compiled = torch.compile(conv_and_scan, fullgraph=True, dynamic=True)
    for length in (23, 9, 14):
        args = problem(length)
        p = None if pos is None else pos[:, :length]
        assert relative_error(compiled(*args, p), conv_and_scan(*args, p)) < FP64


def test_low_precision_convolution_accumulates_in_fp32():
    t, conv = torch.randn(2, 40, 16).bfloat16(), torch.randn(16, 1, 5).bfloat16()
    compiled = torch.compile(lambda: torch.ops.ttt.chunk_conv(t, conv, None, 8))
    exact = torch.ops.ttt.chunk_conv(t.double(), conv.double(), None, 8)
    assert relative_error(compiled(), exact) < 4e-3  # one rounding to bf16


def test_state_is_mutated_in_place_without_a_copy():
    h, t, w0, conv, proj, bias = problem(4)
    s = state(batch=h.shape[0])

    constants = spec()

    def step(h, t, w0, conv, proj, bias, *s):
        return torch.ops.ttt.fast_weight_step(h, t, w0, bias, conv, proj, None, constants, *s)

    _, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), h, t, w0, conv, proj, bias, *s)
    assert "ttt.fast_weight_step.default(" in code
    assert f"({h.shape[0]}, {D}, {F})" in code
    call = code.split("ttt.fast_weight_step.default(")[1].split(")")[0]
    given = call.split(",")[-8:]
    assert all("arg" in x for x in given), f"the state must reach the op as the graph input itself: {call}"
    assert [row[:2] for row in s[5].tolist()] == [[4, 0]] * 3
