"""The running state against the reference: factored and dense, revocable tokens, shared rows, controls."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerances import FP64, assert_within_budget, relative_error
from ttt_compiler.codegen import ops, reference  # noqa: F401
from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu import step as cpu_step
from ttt_compiler.codegen.layout import (
    CLIPPED,
    DONE,
    FACTORED,
    LAST,
    SKIPPED,
    TOTAL,
    WRITES,
    factored_capacity,
    factored_limit,
)
from ttt_compiler.errors import CropError, NonFiniteWriteError
from ttt_compiler.runtime.rows import export_row
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, WriteRule

# N* = 15 tokens; a batch of three stays factored for 10.
D, F, K, LR, KEY = 24, 40, 5, 0.02, "site.weight"

RULES = {
    "official": WriteRule(),
    "decay": WriteRule(decay=0.7),
    "unit keys": WriteRule(keys="unit"),
    "mean keys": WriteRule(keys="mean"),
    "norm limit": WriteRule(max_norm=1.5),
    "ratio limit": WriteRule(max_ratio=0.04),
    "everything": WriteRule(keys="unit", max_norm=0.9, max_ratio=0.05, decay=0.9, on_nonfinite="skip"),
}


def spec(chunk, rule=RULES["official"], proj=True):
    return SiteSpec(KEY, D, F, D, chunk, LR, "hidden_states", proj, K, "site", rule=rule)


def problem(batch, length, dtype=torch.float64, seed=0, *, grad=False):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, F), (batch, length, D), (D, F), (D, 1, K), (D, D), (D,))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def fresh(one, batch, dtype=torch.float64, device="cpu", **kwargs):
    """Poisoned: nothing may be read before it is written."""
    state = FastWeightState.zeros([one], batch, dtype, torch.device(device), **kwargs)
    site = state.sites[KEY]
    for x in (site.w, site.tail_h, site.tail_t, site.tail_v):
        x.fill_(float("nan"))
    return state


def feed(state, one, args, start, stop, pos=None):
    h, t, w0, conv, proj, bias = (None if x is None else x.to(state.device) for x in args)
    span = slice(start, stop)
    pos = None if pos is None else pos.to(state.device)
    state.own()
    return torch.ops.ttt.fast_weight_step(
        *(h[:, span], t[:, span], w0, bias, conv, proj, None if pos is None else pos[:, span], one.encode()),
        *state.sites[KEY],
        state.batch,
    )


def expected(one, args, pos=None):
    h, t, w0, conv, proj, bias = args
    return reference.batched(h, t, w0, conv, proj, one.lr, one.chunk, pos, bias, one.rule)


def final_weight(one, args, b, length=None):
    h, t, w0, conv, proj, _ = args
    return reference.chunked(h[b, :length], t[b, :length], w0, conv, proj, one.lr, one.chunk, None, one.rule)[
        1
    ]


@given(
    splits=st.lists(st.integers(0, 9), min_size=1, max_size=10),
    chunk=st.integers(1, 7),
    revocable=st.integers(0, 9),
    rule=st.sampled_from(list(RULES)),
    shared=st.booleans(),
    documents=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_segmentation_is_the_reference(splits, chunk, revocable, rule, shared, documents):
    """Laws 1 and 2 under every control, factored and dense, however many tokens stay revocable."""
    length, one = sum(splits), spec(chunk, RULES[rule])
    args = problem(3, length)
    pos = None
    if documents:
        pos = torch.arange(length).repeat(3, 1)
        pos[1, length // 2 :] -= length // 2
        pos[2, : length // 3] = -1
    state = fresh(one, 3, revocable=revocable, shared_lanes=shared)
    out, start = [], 0
    for size in splits:
        out.append(feed(state, one, args, start, start + size, pos))
        start += size
    if length:
        assert relative_error(torch.cat(out, 1), expected(one, args, pos)) < FP64
    if pos is None:
        for b in range(3):
            done = state.column(KEY, DONE)[b]
            w = final_weight(one, args, b, done * chunk)
            assert relative_error(state.matrix(KEY, b, args[2]), w) < FP64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("revocable", [0, 5])
@pytest.mark.parametrize("length", [9, 30], ids=["factored", "dense"])
def test_error_budget(dtype, revocable, length):
    one = spec(4)
    args = problem(3, length, dtype)
    state, out = fresh(one, 3, dtype, revocable=revocable), []
    for i in range(length):
        out.append(feed(state, one, args, i, i + 1))
    assert bool(state.column(KEY, FACTORED)[0]) == (length == 9)
    exact = expected(one, [a.double() for a in args])
    assert_within_budget(torch.cat(out, 1), expected(one, args), exact)


def test_the_switch_from_factored_to_dense_is_where_the_formula_says_and_exact():
    assert factored_capacity(D, F) == 15
    assert (factored_limit(D, F, 1), factored_limit(D, F, 3), factored_limit(D, F, 1000)) == (0, 10, 14)
    one = spec(2)
    args = problem(3, 30)
    state, forms = fresh(one, 3), []
    for i in range(30):
        feed(state, one, args, i, i + 1)
        forms.append(state.column(KEY, FACTORED)[0])
        done = (i + 1) // 2 * 2
        assert relative_error(state.matrix(KEY, 0, args[2]), final_weight(one, args, 0, done)) < FP64
    assert forms == [(i + 1) // 2 * 2 if i < 11 else 0 for i in range(30)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slow_decay_is_not_rounded_away(dtype):
    """0.998 v is v in bf16: rows of a narrow dtype are no place for what decays."""
    one, gamma = spec(1, WriteRule(decay=0.998)), 0.998**9
    args = problem(3, 10, dtype)
    args[1][:, 1:] = 0  # one write, which then decays nine times
    state = fresh(one, 3, dtype)
    for i in range(10):
        feed(state, one, args, i, i + 1)
    assert bool(state.column(KEY, FACTORED)[0]) == (dtype == torch.float32)
    w0 = args[2].double()
    exact = final_weight(one, [x.double() for x in args], 0) - w0
    left = state.matrix(KEY, 0, args[2]).double() - w0
    assert abs(float(left.norm() / exact.norm()) - 1) < 0.3 * (1 - gamma)


def test_a_sequence_alone_is_never_factored():
    one = spec(2)
    args = problem(1, 4)
    state = fresh(one, 1)
    feed(state, one, args, 0, 4)
    assert (state.column(KEY, WRITES), state.column(KEY, FACTORED)) == ([2], [0])


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=8), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_rejected_tokens_leave_no_trace(blocks, chunk):
    """Every call is followed by wrong tokens that are taken back, across chunk borders."""
    one = spec(chunk, RULES["everything"])
    length = sum(size for size, _ in blocks)
    args = problem(3, length)
    wrong = problem(3, 64, seed=9)
    state, out, start = fresh(one, 3, revocable=5), [], 0
    for size, rejected in blocks:
        joined = [
            torch.cat([a[:, start : start + size], b[:, :rejected]], 1)
            for a, b in zip(args[:2], wrong[:2], strict=True)
        ]
        y = feed(state, one, [*joined, *args[2:]], 0, size + rejected)
        state.crop(rejected)
        out.append(y[:, :size])
        start += size
    assert relative_error(torch.cat(out, 1), expected(one, args)) < FP64


def test_crop_beyond_what_is_revocable_is_refused_and_changes_nothing():
    one = spec(4)
    args = problem(2, 13)
    state = fresh(one, 2, revocable=3)
    feed(state, one, args, 0, 13)
    before = state.sites[KEY].rows.clone()
    with pytest.raises(CropError, match="keep_revocable"):
        state.crop(6)
    assert torch.equal(before, state.sites[KEY].rows)
    state.crop(5)  # 13 tokens, 8 of them written: one more than was promised is still there
    assert state.tokens_seen == [8, 8]


def test_revocable_can_grow_in_the_middle_of_a_document():
    one = spec(4)
    args = problem(3, 40)
    state = fresh(one, 3)
    out = [feed(state, one, args, 0, 7)]
    state.keep_revocable(6)
    state.keep_revocable(2)
    assert state.revocable == 6
    out.append(feed(state, one, args, 7, 19))
    state.select(torch.tensor([2, 2, 0]))
    state.keep_revocable(9)
    chosen = [a[[2, 2, 0]] for a in args[:2]] + args[2:]
    out = [y[[2, 2, 0]] for y in out]
    out.append(feed(state, one, chosen, 19, 40))
    assert relative_error(torch.cat(out, 1), expected(one, chosen)) < FP64


@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([0, 3]))
@settings(max_examples=40, deadline=None)
def test_reordered_rows_are_their_ancestors(seed, chunk, revocable):
    """Beams: integers move, no row ever sees another one's later tokens."""
    g = torch.Generator().manual_seed(seed)
    one, batch = spec(chunk, RULES["decay"]), 4
    state = fresh(one, batch, revocable=revocable)
    args = problem(batch, 0)
    past_h, past_t = args[0], args[1]
    for step in range(24):
        new = problem(batch, int(torch.randint(1, 4, (), generator=g)), seed=seed + step)
        past_h, past_t = torch.cat([past_h, new[0]], 1), torch.cat([past_t, new[1]], 1)
        whole = [past_h, past_t, *args[2:]]
        y = feed(state, one, whole, past_h.shape[1] - new[0].shape[1], past_h.shape[1])
        assert relative_error(y, expected(one, whole)[:, -y.shape[1] :]) < FP64
        if revocable and step % 3 == 0:
            state.crop(1)
            past_h, past_t = past_h[:, :-1], past_t[:, :-1]
        order = torch.randint(0, batch, (batch,), generator=g)
        w = state.sites[KEY].w
        state.select(order)
        assert state.sites[KEY].w.data_ptr() == w.data_ptr(), "a reorder moves no matrix"
        past_h, past_t = past_h[order], past_t[order]


def test_rows_can_be_repeated_dropped_and_repeated_again():
    one = spec(3)
    args = problem(2, 40)
    state = fresh(one, 2)
    feed(state, one, args, 0, 10)
    state.repeat_interleave(3)
    whole = [a.repeat_interleave(3, 0) for a in args[:2]] + args[2:]
    y = feed(state, one, whole, 10, 20)
    assert relative_error(y, expected(one, whole)[:, 10:20]) < FP64
    state.select(torch.tensor([4]))
    one_row = [a[4:5] for a in whole[:2]] + args[2:]
    y = feed(state, one, one_row, 20, 31)
    assert relative_error(y, expected(one, one_row)[:, 20:31]) < FP64
    state.repeat_interleave(5)
    five = [a.repeat(5, 1, 1) for a in one_row[:2]] + args[2:]
    assert relative_error(feed(state, one, five, 31, 40), expected(one, five)[:, 31:]) < FP64


def test_a_fork_shares_memory_until_one_of_both_runs():
    one = spec(3)
    args = problem(2, 40)
    state = fresh(one, 2)
    feed(state, one, args, 0, 10)
    branches = [state.clone() for _ in range(3)]
    assert all(b.sites[KEY].w.data_ptr() == state.sites[KEY].w.data_ptr() for b in branches)
    whole = expected(one, args)
    for branch in branches:
        assert relative_error(feed(branch, one, args, 10, 25), whole[:, 10:25]) < FP64
        assert state.tokens_seen == [10, 10]
    kept = state.sites[KEY].w.data_ptr()
    assert relative_error(feed(state, one, args, 10, 40), whole[:, 10:]) < FP64
    assert state.sites[KEY].w.data_ptr() == kept, "the last one to share copies nothing"


def test_reset_rows_start_over_while_others_go_on():
    one = spec(3)
    args = problem(2, 20)
    state = fresh(one, 2)
    feed(state, one, args, 0, 8)
    state.reset([1])
    y = feed(state, one, args, 8, 20)
    assert relative_error(y[:1], expected(one, args)[:1, 8:]) < FP64
    later = [a[:, 8:] for a in args[:2]] + args[2:]
    assert relative_error(y[1:], expected(one, later)[1:]) < FP64


@pytest.mark.parametrize("rule", list(RULES))
def test_stateless_ops_obey_the_same_rule(rule):
    one = spec(4, RULES[rule])
    args = problem(3, 21, grad=True)
    ours = stateless(one, *args)
    assert relative_error(ours, expected(one, args)) < FP64
    weights = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, args, weights)
    for name, a, b in zip(
        ("h", "t", "w0", "conv", "proj", "bias"),
        grads,
        torch.autograd.grad(expected(one, args), args, weights),
        strict=True,
    ):
        assert relative_error(a, b) < FP64, name


def stateless(one, h, t, w0, conv, proj, bias, pos=None):
    """What the rewrite pass emits."""
    rule = one.rule
    v = torch.ops.ttt.chunk_conv(t, conv, pos, one.chunk) @ (proj * one.write_scale)
    v = torch.ops.ttt.limit_writes(v, h, reference.write_limit(w0, rule), pos, one.chunk, rule.keys == "unit")
    return torch.ops.ttt.chunk_scan(h, v, w0, bias, pos, one.chunk, rule.decay, rule.on_nonfinite)


def test_limits_bind_in_these_tests():
    for name in ("norm limit", "ratio limit", "everything"):
        one = spec(4, RULES[name])
        args = problem(3, 21)
        state = fresh(one, 3)
        feed(state, one, args, 0, 21)
        assert min(state.column(KEY, CLIPPED)) > 0, name
        limit = float(reference.write_limit(args[2], one.rule))
        assert float(state.sites[KEY].norms[0, LAST]) <= limit * (1 + 1e-12)
        plain = expected(dataclasses.replace(one, rule=WriteRule()), args)
        assert relative_error(plain, expected(one, args)) > 1e-3, "the rule changes nothing"


def test_opcheck_of_limits():
    one = spec(4, RULES["everything"])
    h, _, w0, *_ = problem(2, 9, grad=True)
    v = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    limit = reference.write_limit(w0, one.rule).detach().requires_grad_()
    torch.library.opcheck(torch.ops.ttt.limit_writes.default, (v, h, limit, None, 4, True))
    torch.library.opcheck(torch.ops.ttt.limit_writes.default, (v, h, None, None, 4, True))


@pytest.mark.parametrize("where", ["h", "t"])
@pytest.mark.parametrize("revocable", [0, 3])
def test_nonfinite_chunks_are_skipped_and_counted(where, revocable):
    one = spec(4, WriteRule(on_nonfinite="skip", decay=0.8))
    args = problem(3, 24)
    args[0 if where == "h" else 1][1, 6] = float("inf")
    state, out = fresh(one, 3, revocable=revocable), []
    for start in range(0, 24, 3):
        out.append(feed(state, one, args, start, start + 3))
    y, exact = torch.cat(out, 1), expected(one, args)
    clean = torch.ones(24, dtype=torch.bool)
    clean[6] = where == "t"
    assert relative_error(y[:, clean], exact[:, clean]) < FP64
    assert state.column(KEY, SKIPPED) == [0, 1, 0]
    assert state.column(KEY, DONE)[0] - state.column(KEY, WRITES)[0] == 0
    assert state.column(KEY, DONE)[1] - state.column(KEY, WRITES)[1] == 1
    assert bool(state.matrix(KEY, 1, args[2]).isfinite().all())
    scanned = stateless(one, *args)
    assert relative_error(scanned[:, clean], exact[:, clean]) < FP64


def test_nonfinite_chunks_raise_where_they_are_not_skipped():
    one = spec(4)
    args = problem(1, 9)
    args[0][0, 2] = float("nan")
    with pytest.raises(NonFiniteWriteError, match="chunk 0"):
        stateless(one, *args)


def test_write_norms_are_bounds_without_a_limit():
    one = spec(4)
    args = problem(2, 8)
    state = fresh(one, 2)
    feed(state, one, args, 0, 8)
    h, t, w0, conv, proj, _ = args
    exact = sum(
        reference.increment(t[0, s], h[0, s], w0, conv, proj, LR).norm() for s in (slice(0, 4), slice(4, 8))
    )
    assert float(exact) <= float(state.sites[KEY].norms[0, TOTAL]) < 10 * float(exact)


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.sampled_from([0, 3]),
    st.booleans(),
    st.sampled_from([0, -1, 5]),
)
@settings(max_examples=60, deadline=None)
def test_tokens_kept_by_one_copy_are_tokens_kept_one_by_one(seed, chunk, revocable, shared, first):
    """Bit for bit: rows at different places of their chunks, reordered, padded and begun again."""
    g = torch.Generator().manual_seed(seed)
    one, batch = spec(chunk, RULES["decay"]), 4
    states = [fresh(one, batch, revocable=revocable, shared_lanes=shared) for _ in range(2)]
    for step in range(20):
        args = problem(batch, 1, seed=seed + step)
        pos = torch.full((batch, 1), 5)
        pos[int(torch.randint(0, batch, (), generator=g))] = first
        order = torch.randint(0, batch, (batch,), generator=g)
        out = []
        for state, whole in zip(states, (True, False), strict=True):
            with native.unused(), pytest.MonkeyPatch.context() as patch:
                if not whole:
                    patch.setattr(cpu_step.Row, "only_keeps", lambda *_: False)
                out.append(feed(state, one, args, 0, 1, pos))
            if shared and step % 3 == 0:
                state.select(order)
        assert torch.equal(*out)
        for a, b in zip(*(s.sites[KEY].rows for s in states), strict=True):
            assert a.tolist() == b.tolist()
    for b in range(batch):
        exported = [export_row(s, KEY, b) for s in states]
        assert all(torch.equal(exported[0][k], exported[1][k]) for k in exported[0])
