"""The library form's counts: against torch's own counter over the code that runs, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from ttt_compiler.codegen import forms
from ttt_compiler.codegen.choose import predicted, predicted_gradients
from ttt_compiler.codegen.devices import DEVICES, H200
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.forms_spans import (
    NEAR,
    STACK_SHARE,
    Spans,
    best_spans,
    spans,
    spans_backward,
    spans_choices,
    spans_workspace,
)
from ttt_compiler.codegen.gpu.library import chunk_scan_backward_library, chunk_scan_library
from ttt_compiler.codegen.kernels.tiles import SCAN
from ttt_compiler.codegen.phases import cost_of
from ttt_compiler.offline import interpreter

SHAPE = ScanShape(tokens=96, d_model=8, d_ff=12, chunk=4, batch=2, dtype=torch.float32)
BIG = ScanShape(tokens=32768, d_model=2560, d_ff=9728, chunk=1024)
# Ends at a span, in a second block, and in a first one, whose tokens then meet nothing in the span.
LENGTHS = pytest.mark.parametrize("tokens", [96, 94, 82])
CUTS = pytest.mark.parametrize("cut", [Spans(4, 1), Spans(8, 99), Spans(16, 2), Spans(128, 1)])


def flops(phases):
    return sum(p.flops for p in phases)


def counted(run):
    interpreter.install()

    def in_place(_, a, b, **kwargs):
        return bmm_flop(a, b)

    # The counter does not know products that add in place.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        run()
    return counter.get_total_flops()


@LENGTHS
@CUTS
def test_flops_are_torchs(tokens, cut):
    shape = replace(SHAPE, tokens=tokens)
    h, v, dy = (torch.randn(2, tokens, n) for n in (12, 8, 8))
    w0, out = torch.randn(8, 12), torch.empty(2, tokens, 8)
    forward = counted(
        lambda: chunk_scan_library(h, v, w0, chunk=4, span=cut.span, held=cut.held, decay=1.0, out=out)
    )
    backward = counted(lambda: chunk_scan_backward_library(dy, h, v, w0, 4, 1.0, cut.span, cut.held))
    # The last span may be shorter than the others, which the count takes for whole.
    short = -tokens % cut.span if tokens > cut.span else 0
    assert forward <= flops(spans(shape, H200, cut)) <= forward + 2 * 2 * 8 * 12 * short
    assert backward <= flops(spans_backward(shape, H200, cut)) <= backward + 2 * 2 * 8 * 12 * 2 * short


def test_a_span_of_one_chunk_and_one_of_everything():
    every = flops(spans(BIG, H200, Spans(1024, 5)))
    assert every == BIG.flops == flops(forms.two_gemm(BIG, H200))
    assert flops(spans(BIG, H200, Spans(32768, 1))) == flops(forms.dual(BIG, H200))


def test_bytes_and_launches_by_hand():
    matrix, cut = 2560 * 9728, Spans(2048, 4)
    write, total, apply, scores, mix = spans(BIG, H200, cut)
    # 15 writes into fp32 in four calls; each sum is read in fp32 and written in bf16.
    assert write.launches == total.launches == 4
    assert write.hbm == 15 * (2048 * (2560 + 9728) * 2 + 4 * matrix)
    assert total.hbm == 15 * 6 * matrix
    assert apply.launches == 4
    assert apply.hbm == 16 * (2048 * (2560 + 9728) * 2 + 2 * matrix)
    assert (scores.launches, mix.launches) == (1, 1)
    assert all(p.called for p in (write, total, apply, scores, mix))
    assert spans_workspace(BIG, cut) == (4 * 6 + 4) * matrix + 16 * 1024 * 1024 * 2


def test_states_that_fit_the_cache_leave_memory_alone():
    small = replace(BIG, d_model=256, d_ff=512)
    write, total, *_ = spans(small, H200, Spans(2048, 4))
    assert (write.l2, total.l2) == (15 * 2 * 256 * 512, 15 * 6 * 256 * 512)
    assert total.hbm == 0


def test_no_state_is_left():
    with pytest.raises(ValueError, match="leaves no state"):
        spans(replace(BIG, final=True), H200, Spans(1024, 1))


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_choices_and_the_best_of_them(device):
    choices = spans_choices(BIG, device)
    assert [c.span for c in choices] == [1024 * 2**i for i in range(6)]
    room = STACK_SHARE * device.memory
    for cut in choices:
        assert 1 <= cut.held <= math.ceil(BIG.tokens / cut.span)
        assert cut.held == 1 or cut.held * 6 * 2560 * 9728 <= room
    assert spans_choices(BIG, device, decays=True) == choices[:1]
    for backward, form in ((False, spans), (True, spans_backward)):
        best = best_spans(BIG, device, backward=backward)
        seconds = {c: cost_of(form(BIG, device, c), device).seconds for c in choices}
        assert seconds[best] <= NEAR * min(seconds.values())
        near = [c for c in choices if seconds[c] <= NEAR * min(seconds.values())]
        assert spans_workspace(BIG, best) == min(spans_workspace(BIG, c) for c in near)


def test_where_our_kernel_is_left():
    """Few tokens of a small matrix: launches of the library would cost more than the scan."""
    little = ScanShape(512, 256, 768, 128)
    assert predicted(H200, SCAN, little).form == "on_chip"
    assert predicted(H200, SCAN, BIG).form == "spans"
    assert predicted_gradients(H200, little)[0] is None
    assert predicted_gradients(H200, BIG)[0] is not None
