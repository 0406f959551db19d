"""The step of GPUs, interpreted on CPU tensors, against the CPU implementation and the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.codegen.test_step import KEY, LR, RULES, D, F, K, expected, feed, fresh, problem, spec
from tests.tolerances import SEGMENTATION, assert_within_budget, relative_error
from ttt_compiler.codegen.layout import (
    CLIPPED,
    DONE,
    FACTORED,
    SEEN,
    SKIPPED,
    WRITES,
    factored_limit,
)
from ttt_compiler.errors import UnsupportedDeviceError
from ttt_compiler.offline import interpreter
from ttt_compiler.runtime.rows import export_row
from ttt_compiler.spec import WriteRule

COUNTED = [SEEN, DONE, WRITES, SKIPPED, CLIPPED]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    interpreter.install()


def gpu(*args, **kwargs):
    with interpreter.gpu_step_on_cpu_tensors():
        return feed(*args, **kwargs)


def same(ours, theirs, w0):
    """Counters, matrices and tails of all rows of the tables."""
    a, b = ours.sites[KEY], theirs.sites[KEY]
    assert torch.equal(a.rows[:, COUNTED], b.rows[:, COUNTED])
    assert relative_error(a.norms, b.norms) < SEGMENTATION
    for row in range(ours.batch_size):
        assert relative_error(ours.matrix(KEY, row, w0), theirs.matrix(KEY, row, w0)) < SEGMENTATION
        x, y = export_row(ours, KEY, row), export_row(theirs, KEY, row)
        assert torch.equal(x["tail_h"], y["tail_h"])
        assert torch.equal(x["tail_t"], y["tail_t"])


def positions(kind, batch, length, g):
    if kind == "none":
        return None
    pos = torch.arange(length).repeat(batch, 1) + 3
    draw = torch.rand(batch, length, generator=g)
    if kind == "documents":
        return pos.masked_fill(draw < 0.15, 0)
    if kind == "padding":
        return pos.masked_fill(draw < 0.3, -1)
    return pos.masked_fill(draw < 0.3, -1).masked_fill(draw < 0.1, 0)


@given(
    seed=st.integers(0, 10**6),
    chunk=st.integers(1, 6),
    revocable=st.sampled_from([0, 0, 3, 7]),
    rule=st.sampled_from(list(RULES)),
    shared=st.booleans(),
    kind=st.sampled_from(["none", "documents", "padding", "everything"]),
    data=st.data(),
)
@settings(max_examples=14, deadline=None)
def test_any_history_is_that_of_the_cpu(seed, chunk, revocable, rule, shared, kind, data):
    """Lengths around every border, forks and permutations, rows at different places of their chunks."""
    g = torch.Generator().manual_seed(seed)
    one, batch = spec(chunk, RULES[rule]), 3
    states = [fresh(one, batch, torch.float32, revocable=revocable, shared_lanes=shared) for _ in range(2)]
    lengths = st.sampled_from([1, 1, 1, max(1, chunk - 1), chunk, chunk + 1, 3 * chunk + 2])
    for call, length in enumerate(data.draw(st.lists(lengths, min_size=1, max_size=5))):
        args = problem(batch, length, torch.float32, seed + call)
        args[2:] = problem(batch, 1, torch.float32, seed)[2:]
        pos = positions(kind, batch, length, g)
        y, want = (f(s, one, args, 0, length, pos) for f, s in zip((gpu, feed), states, strict=True))
        assert relative_error(y, want) < SEGMENTATION
        same(*states, args[2])
        if data.draw(st.booleans()):
            order = torch.randint(0, batch, (batch,), generator=g)
            for state in states:
                state.select(order)
        if revocable and data.draw(st.booleans()):
            live = min(
                min(s.column(KEY, SEEN)[b] - s.column(KEY, DONE)[b] * chunk for b in range(batch))
                for s in states
            )
            for state in states:
                state.crop(min(live, revocable))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_forks_of_factored_rows_decay_in_any_order(order):
    """One of them stays in the slot that the others read while they move."""
    one = spec(2, WriteRule(decay=0.5))
    states = [fresh(one, 3, torch.float32) for _ in range(2)]
    for f, state in zip((gpu, feed), states, strict=True):
        args = problem(3, 2, torch.float32, 1)
        for i in range(2):
            f(state, one, args, i, i + 1)
        assert state.column(KEY, FACTORED)[0] > 0
        state.select(torch.tensor([0, 0, 0]))
        state.batch = torch.tensor(order)
        args = [*problem(3, 6, torch.float32, 2)[:2], *args[2:]]
        out = [f(state, one, args, i, i + 1) for i in range(6)]
        state.batch = torch.arange(3)
        state.out = torch.cat(out, 1)
    assert relative_error(states[0].out, states[1].out) < SEGMENTATION
    same(*states, args[2])


def test_operands_of_odd_strides_and_dtypes():
    """A bias that is one number, and a batch that is every second row."""
    one = spec(4)
    for length in (1, 3):
        h, t, w0, conv, proj, _ = problem(2, length, torch.float32)
        args = [h, t, w0, conv, proj, torch.randn(1).expand(D)]
        states = [fresh(one, 4, torch.float32) for _ in range(2)]
        for state in states:
            state.batch = torch.tensor([3, 0, 1, 2])[::2]
        y, want = (f(s, one, args, 0, length) for f, s in zip((gpu, feed), states, strict=True))
        assert relative_error(y, want) < SEGMENTATION
        with pytest.raises(UnsupportedDeviceError, match="convert t"):
            gpu(states[0], one, [h.bfloat16(), *args[1:]], 0, length)


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("keys", ["", "unit"])
@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6])
def test_rows_that_cancel_do_not_slip_past_the_limit(length, keys, rest):
    """Their write is small beside ``||v|| ||h||``; the Gram form in fp32 has rounding errors of its size."""
    h, t, w0, conv, proj, bias = problem(2, 8)
    h[:], t[:] = h[:, :1], t[:, :1]
    t[:, 1::2] *= -(1 - rest)
    conv[:], conv[:, 0, K // 2], proj = 0.0, 1.0, torch.eye(D, dtype=torch.float64)
    k = h / h.norm(dim=-1, keepdim=True) if keys == "unit" else h
    exact = (LR * t.float().double()).mT @ k.float().double()
    limit = exact.flatten(1).norm(dim=1).min().item() / 2
    one = spec(8, WriteRule(keys=keys, max_norm=limit))
    args = [x.float() for x in (h, t, torch.zeros_like(w0), conv, proj, bias)]
    state = fresh(one, 2, torch.float32)
    for i in range(0, 8, length):
        gpu(state, one, args, i, i + length)
    assert state.column(KEY, CLIPPED) == [1, 1]
    for row in range(2):
        written = state.matrix(KEY, row, args[2]).double().norm().item()
        assert written == pytest.approx(limit, rel=0.2 if rest == 1e-6 else 0.02)


@given(st.integers(0, 10**6), st.sampled_from([0, 4]))
@settings(max_examples=4, deadline=None)
def test_some_rows_of_a_pool(seed, revocable):
    """The batch is a part of the tables, in any order; rows outside of it are read by nobody else."""
    g = torch.Generator().manual_seed(seed)
    one, rows = spec(3, RULES["decay"]), 4
    states = [fresh(one, rows, torch.float32, revocable=revocable, shared_lanes=True) for _ in range(2)]
    for call in range(8):
        members = torch.randperm(rows, generator=g)[: int(torch.randint(1, rows + 1, (), generator=g))]
        length = int(torch.randint(1, 6, (), generator=g))
        args = problem(len(members), length, torch.float32, seed + call)
        args[2:] = problem(1, 1, torch.float32, seed)[2:]
        out = []
        for f, state in zip((gpu, feed), states, strict=True):
            state.batch = members
            out.append(f(state, one, args, 0, length))
            state.batch = torch.arange(rows)
        assert relative_error(*out) < SEGMENTATION
        same(*states, args[2])
        source, target = torch.randint(0, rows, (2,), generator=g).tolist()
        for state in states:
            site = state.sites[KEY]
            for table in (site.rows, site.lanes, site.norms):
                table[target] = table[source]
            site.rows[target, 7] = 0


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("revocable", [0, 4])
def test_forks_in_the_middle_of_a_chunk(length, revocable):
    """Every row's own lane, and its own slot, is read by another row when it goes on."""
    one = spec(5)
    states = [fresh(one, 3, torch.float32, revocable=revocable) for _ in range(2)]
    for call, order in enumerate([[1, 0, 1], [1, 0, 0], [2, 2, 1], [1, 2, 0]] * 2):
        args = problem(3, length, torch.float32, call)
        args[2:] = problem(3, 1, torch.float32, 99)[2:]
        # Rows stand at different places: one that is behind writes where one ahead is read.
        pos = torch.full((3, length), 7)
        pos[call % 3] = -1
        y, want = (f(s, one, args, 0, length, pos) for f, s in zip((gpu, feed), states, strict=True))
        assert relative_error(y, want) < SEGMENTATION
        same(*states, args[2])
        for state in states:
            state.select(torch.tensor(order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1] * 14, [5, 1, 1, 7]])
@pytest.mark.parametrize("revocable", [0, 5])
def test_error_budget(dtype, lengths, revocable):
    one = spec(4)
    args = problem(3, 14, dtype)
    state, out, start = fresh(one, 3, dtype, revocable=revocable), [], 0
    for size in lengths:
        out.append(gpu(state, one, args, start, start + size))
        start += size
    exact = expected(one, [a.double() for a in args])
    assert_within_budget(torch.cat(out, 1), expected(one, args), exact)


def test_decode_is_prefill():
    one = spec(4, RULES["everything"])
    args = problem(3, 14, torch.float32)
    whole, single = fresh(one, 3, torch.float32), fresh(one, 3, torch.float32)
    y = gpu(whole, one, args, 0, 14)
    out = [gpu(single, one, args, i, i + 1) for i in range(14)]
    assert relative_error(torch.cat(out, 1), y) < SEGMENTATION
    same(whole, single, args[2])


@pytest.mark.parametrize("first", [1, 2, 9])
def test_factored_rows_of_the_cpu_go_on(first):
    """Rows that the CPU left factored, shared by a fork: read, extended, made dense."""
    one = spec(4)
    args = problem(3, 30, torch.float32)
    states = [fresh(one, 3, torch.float32) for _ in range(2)]
    for state in states:
        feed(state, one, args, 0, 8)
        state.select(torch.tensor([0, 0, 2]))
    assert factored_limit(D, F, 3) == 10
    assert states[0].column(KEY, FACTORED) == [8, 8, 8]
    start = 8
    for size in [first, *[1] * 8, 3]:
        y, want = (f(s, one, args, start, start + size) for f, s in zip((gpu, feed), states, strict=True))
        assert relative_error(y, want) < SEGMENTATION
        same(*states, args[2])
        start += size


def test_factored_rows_that_another_row_reads_are_left_alone():
    one = spec(4)
    args = problem(3, 12, torch.float32)
    states = [fresh(one, 3, torch.float32) for _ in range(2)]
    for f, state in zip((gpu, feed), states, strict=True):
        feed(state, one, args, 0, 8)
        state.select(torch.tensor([0, 0, 2]))
        state.batch = torch.tensor([0])
        f(state, one, [a[:1] for a in args[:2]] + args[2:], 8, 10)
        state.batch = torch.arange(3)
    same(*states, args[2])
    assert states[0].column(KEY, FACTORED) == [0, 8, 8]


@pytest.mark.parametrize("where", ["h", "t"])
@pytest.mark.parametrize("revocable", [0, 3])
@pytest.mark.parametrize("size", [1, 3])
def test_nonfinite_chunks_are_skipped_and_counted(where, revocable, size):
    one = spec(4, WriteRule(on_nonfinite="skip", decay=0.8))
    args = problem(3, 12, torch.float32)
    args[0 if where == "h" else 1][1, 6] = float("inf")
    states = [fresh(one, 3, torch.float32, revocable=revocable) for _ in range(2)]
    out = [[], []]
    for start in range(0, 12, size):
        for f, s, ys in zip((gpu, feed), states, out, strict=True):
            ys.append(f(s, one, args, start, start + size))
    ours, theirs = (torch.cat(ys, 1) for ys in out)
    clean = torch.ones(12, dtype=torch.bool)
    clean[6] = where == "t"
    assert relative_error(ours[:, clean], theirs[:, clean]) < SEGMENTATION
    assert not ours[1, ~clean].isfinite().any()
    same(*states, args[2])
    assert states[0].column(KEY, SKIPPED) == [0, 1, 0]


def test_what_cannot_raise_here_is_counted():
    one = spec(4)
    args = problem(2, 9, torch.float32)
    args[0][1, 2] = float("nan")
    state = fresh(one, 2, torch.float32)
    gpu(state, one, args, 0, 9)
    assert state.column(KEY, SKIPPED) == [0, 1]
    state.reset([1])
    assert state.column(KEY, SKIPPED) == [0, 0]


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("zero", ["lr", "conv"])
def test_a_layer_that_writes_nothing_is_the_base_layer(zero, length):
    one = spec(4, RULES["decay"])
    args = problem(3, 4 * length, torch.float32)
    if zero == "lr":
        one = type(one)(**{**vars(one), "lr": 0.0})
    else:
        args[3] = torch.zeros_like(args[3])
    states = [fresh(one, 3, torch.float32) for _ in range(2)]
    for start in range(0, 4 * length, length):
        y, want = (f(s, one, args, start, start + length) for f, s in zip((gpu, feed), states, strict=True))
        assert relative_error(y, want) < SEGMENTATION
    same(*states, args[2])
    assert states[0].column(KEY, WRITES) == [0, 0, 0]


def test_dtypes_without_kernels_are_refused():
    one = spec(4)
    with pytest.raises(UnsupportedDeviceError, match="float64"):
        gpu(fresh(one, 2), one, problem(2, 4), 0, 4)


class _Asks(TorchDispatchMode):
    """Refuses what would wait for a GPU, or has shapes that depend on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITS), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("revocable", [0, 3])
def test_the_host_is_never_asked(length, revocable):
    one = spec(4, RULES["everything"])
    args = problem(3, 5 * length, torch.float32)
    pos = torch.arange(5 * length).repeat(3, 1) + 1
    state = fresh(one, 3, torch.float32, revocable=revocable, shared_lanes=True)
    addresses = [x.data_ptr() for x in state.sites[KEY]]
    with _Asks():
        for start in range(0, 5 * length, length):
            gpu(state, one, args, start, start + length, pos)
    assert [x.data_ptr() for x in state.sites[KEY]] == addresses
