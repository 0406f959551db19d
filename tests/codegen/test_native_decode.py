"""A decode step by one call in C++ against the step in Python: same counters and tails, same numbers."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from tests.codegen.test_step import KEY, RULES, feed, fresh, problem, spec
from tests.tolerances import relative_error
from ttt_compiler.codegen.cpu import native, step
from ttt_compiler.codegen.layout import FACTORED, WRITES

# Both round their sums once to the operands' dtype, but add in another order.
BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BATCH = 3


def both(run):
    """What ``run`` gives by one call, and in Python."""
    fast = run()
    with native.unused():
        return fast, run()


def same(a, b):
    """What may not depend on the order of a sum."""
    for name in ("rows", "lanes"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("length", [8, 40], ids=["factored", "dense"])
def test_steps_are_the_steps_in_python(dtype, shared, chunk, length):
    g = torch.Generator().manual_seed(chunk)
    one = spec(chunk, RULES["decay"] if dtype == torch.float64 else RULES["official"])
    states = [fresh(one, BATCH, dtype, shared_lanes=shared) for _ in range(2)]
    for i in range(length):
        args = problem(BATCH, 1, dtype, seed=i)
        # Row 0 begins again now and then, row 1 pauses now and then: their borders lie elsewhere.
        pos = torch.tensor([[0 if i % 17 == 0 else 1], [-1 if i % 7 == 3 else 1], [1]])
        left = iter(states)
        got, want = both(lambda left=left, args=args, pos=pos: feed(next(left), one, args, 0, 1, pos))
        assert relative_error(got.double(), want.double()) < BOUNDS[dtype], i
        same(*(s.sites[KEY] for s in states))
        if shared and i % 4 == 3:
            order = torch.randint(0, BATCH, (BATCH,), generator=g)
            for state in states:
                state.select(order)
    form = states[0].column(KEY, FACTORED)[2], states[0].column(KEY, WRITES)[2]
    assert bool(form[0]) == (length == 8) or shared
    assert form[1] > 0 or shared


def test_most_steps_never_reach_python(monkeypatch):
    one, state = spec(4), fresh(spec(4), BATCH)
    entered = []
    call = step.Call
    monkeypatch.setattr(step, "Call", lambda *a: entered.append(1) or call(*a))
    for i in range(16):
        feed(state, one, problem(BATCH, 1, seed=i), 0, 1)
        # The last token of every chunk writes.
        assert len(entered) == (i + 1) // 4


@pytest.mark.parametrize("change", ["strided bias", "strided weights", "no compiler"])
def test_what_it_cannot_do_is_done_in_python(change):
    one, (state, other) = spec(4), (fresh(spec(4), 2, torch.float32) for _ in range(2))
    h, t, w0, conv, proj, bias = problem(2, 8, torch.float32)
    strange = (h, t, w0, conv, proj, bias)
    if change == "strided bias":
        strange = (h, t, w0, conv, proj, torch.stack([bias, bias], 1)[:, 0])
    elif change == "strided weights":
        strange = (h, t, w0.t().contiguous().t(), conv, proj, bias)
    compiled = native.unused if change == "no compiler" else contextlib.nullcontext
    for i in range(8):
        with compiled():
            got = feed(state, one, strange, i, i + 1)
        want = feed(other, one, (h, t, w0, conv, proj, bias), i, i + 1)
        assert relative_error(got.double(), want.double()) < 1e-5
    same(state.sites[KEY], other.sites[KEY])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_odd_sizes(threads):
    """Sizes that no vector divides, large enough for threads."""
    d, f = 67, 1003
    assert d * f > 1 << 16
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        g = torch.Generator().manual_seed(0)
        one = dataclasses.replace(spec(4), d_model=d, d_ff=f, d_target=d)
        states = [fresh(one, 2, torch.float32) for _ in range(2)]
        for _ in range(9):
            sizes = ((2, 1, f), (2, 1, d), (d, f), (d, 1, 5), (d, d), (d,))
            args = [torch.randn(s, generator=g) * 0.1 for s in sizes]
            left = iter(states)
            got, want = both(lambda left=left, args=args: feed(next(left), one, args, 0, 1))
            assert relative_error(got.double(), want.double()) < 1e-5
    finally:
        torch.set_num_threads(before)
