"""The write of a chunk over many steps: the same numbers as one at once, whenever it is looked at."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.codegen.test_step import KEY, LR, RULES, K, feed, final_weight, fresh, problem, spec
from tests.tolerances import assert_within_budget, relative_error
from ttt_compiler.codegen import reference
from ttt_compiler.codegen.cpu import native, step
from ttt_compiler.codegen.cpu.native.units import make_units, units
from ttt_compiler.codegen.layout import (
    COLUMNS,
    DONE,
    LEFT,
    SEEN,
    SKIPPED,
    VALUES,
    WRITES,
    spread_tokens,
)
from ttt_compiler.errors import NonFiniteWriteError
from ttt_compiler.spec import WriteRule

CHUNK = 16
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def decode(state, one, args, start, stop):
    return torch.cat([feed(state, one, args, i, i + 1) for i in range(start, stop)], 1)


def column(state, which):
    return state.sites[KEY].rows[state.batch, which].tolist()


def plain(args, one, dtype):
    """The reference in ``dtype``, with its running sums as wide as ours."""
    h, t, w0, conv, proj, bias = (x.to(dtype) for x in args)
    return reference.chunked(h[0], t[0], w0, conv, proj, LR, one.chunk, None, one.rule)[0] + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("proj", [True, False])
@pytest.mark.parametrize("shared", [False, True])
def test_decode_is_the_reference_while_writes_are_in_progress(dtype, proj, shared):
    one = spec(CHUNK, proj=proj)
    args = problem(1, 5 * CHUNK, torch.float64, seed=1)
    narrow = [x.to(dtype) for x in args]
    if not proj:
        args[4] = narrow[4] = None
    state = fresh(one, 1, dtype, shared_lanes=shared, spread=True)
    got = []
    in_progress = 0
    for i in range(5 * CHUNK):
        got.append(feed(state, one, narrow, i, i + 1))
        in_progress += column(state, LEFT)[0] > 0
        assert column(state, WRITES) == [(i + 1) // CHUNK], "a write counts from when it begins"
    assert in_progress >= 5 * 2, "writes took several steps"
    exact_args = [None if x is None else x.double() for x in narrow]
    h, t, w0, conv, p, bias = exact_args
    exact = reference.chunked(h[0], t[0], w0, conv, p, LR, CHUNK, None, one.rule)[0] + bias
    there = (
        reference.chunked(
            *(narrow[0][0], narrow[1][0], narrow[2], narrow[3], narrow[4], LR, CHUNK, None, one.rule)
        )[0]
        + narrow[5]
    )
    assert_within_budget(torch.cat(got, 1)[0], there, exact)


def test_a_write_takes_as_many_steps_as_the_tail_has_room_for():
    one, width = spec(CHUNK), 40
    assert spread_tokens(one) == 6
    state = fresh(one, 1, spread=True)
    args = problem(1, 3 * CHUNK)
    decode(state, one, args, 0, CHUNK)
    left = [column(state, LEFT)[0]]
    while left[-1]:
        decode(state, one, args, CHUNK + len(left) - 1, CHUNK + len(left))
        left.append(column(state, LEFT)[0])
    # Columns go in panels of 16.
    assert left == [width, 24, 8, 0]


def test_python_has_nothing_to_do(monkeypatch):
    one, state = spec(CHUNK), fresh(spec(CHUNK), 1, spread=True)
    entered = []
    call = step.Call
    monkeypatch.setattr(step, "Call", lambda *a: entered.append(i) or call(*a))
    args = problem(1, 2 * CHUNK)
    ahead = []
    for i in range(2 * CHUNK):
        feed(state, one, args, i, i + 1)
        ahead.append(column(state, VALUES)[0])
    assert not entered
    # Twice four units of 4 tokens a chunk: once their tokens are followed by two more, the last at the end.
    assert len(units(CHUNK)) == 8
    assert all(x <= max(0, i - 1) // 4 * 2 for i, x in enumerate(ahead[: CHUNK - 1]))
    assert ahead[CHUNK - 2 : CHUNK] == [6, 0]


@pytest.mark.parametrize("chunk", [1, 7, 8, 9, 31, 32, 40, 63, 64, 65, 96, 100, 128, 200, 512])
def test_units_cover_a_chunk_once(chunk):
    made = torch.zeros(chunk, dtype=torch.float64)
    last = (-1, 0)
    for unit in units(chunk):
        made[unit.first : unit.stop] += 1 / unit.parts
        assert (unit.first, unit.part) > last
        last = unit.first, unit.part
        # There is room for the convolution behind them, but for the last ones.
        assert unit.stop - unit.first <= 4 or 2 * unit.stop - unit.first <= chunk
    assert torch.allclose(made, torch.ones_like(made))
    assert unit.stop - unit.first <= 4


def units_per_step(state, one, args, start, stop):
    """Most units of v that one step makes, of all rows together; the chunk ends behind ``stop``."""
    most, before = 0, sum(column(state, VALUES))
    for i in range(start, stop):
        feed(state, one, args, i, i + 1)
        now = sum(column(state, VALUES))
        most, before = max(most, now - before), now
    return most


@pytest.mark.parametrize(("chunk", "late"), [(100, 0), (100, 60), (100, 95), (64, 63), (96, 90), (160, 80)])
def test_v_is_made_at_an_even_pace(chunk, late):
    """Also behind a long call that ends near the border: it makes itself what there would be no time for."""
    one, args = spec(chunk), problem(1, 2 * chunk)
    state = fresh(one, 1, spread=True)
    if late:
        feed(state, one, args, 0, late)
    most = units_per_step(state, one, args, late, chunk - 1)
    assert most <= 2
    assert len(units(chunk)) - column(state, VALUES)[0] <= 2
    feed(state, one, args, chunk - 1, chunk)
    assert column(state, LEFT) == [40]
    v = LR * reference.target(args[1][0, :chunk], args[3], args[4])
    assert relative_error(state.sites[KEY].spread_values(0, chunk).t(), v) < 1e-12


def test_rows_of_a_batch_make_v_in_turn():
    one, batch = spec(160), 4
    state = fresh(one, batch, spread=True)
    args = problem(batch, 160)
    assert 0 < units_per_step(state, one, args, 0, 120) < batch
    units_per_step(state, one, args, 120, 160)
    assert column(state, LEFT) == [40] * batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_a_write_that_is_finished_early_is_the_same_write_bit_for_bit(dtype, after, first):
    one = spec(CHUNK)
    args = problem(1, 4 * CHUNK, dtype)
    states = [fresh(one, 1, dtype, spread=True) for _ in range(2)]
    begin = 0 if first else CHUNK + 7
    border = (1 if first else 2) * CHUNK
    for state in states:
        if begin:
            feed(state, one, args, 0, begin)
        decode(state, one, args, begin, border + after)
    exact = states[0].matrix(KEY, 0, args[2])
    states[0].finish_writes(lambda _: args[2])
    assert column(states[0], LEFT) == [0]
    decode(states[1], one, args, border + after, border + 3)
    assert column(states[1], LEFT) == [0]
    w = [s.sites[KEY].w[0] for s in states]
    assert torch.equal(*w)
    assert relative_error(exact, w[0]) < {torch.float64: 1e-14}.get(dtype, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 15, 16, 50])
@pytest.mark.parametrize("upon_base", [True, False])
@pytest.mark.parametrize(("first", "size", "threads"), [(0, 130, 1), (0, 130, 2), (16, 16, 1), (32, 8, 2)])
def test_columns_are_written_as_one_product(dtype, count, first, size, threads, upon_base):
    """Of any number of keys, also an odd one of a dtype whose products come in pairs; nothing beside them."""
    d, f, capacity = 13, 130, count + 3
    tail, v = torch.randn(2, capacity, f).to(dtype), torch.randn(d, count).to(dtype)
    # What lies behind the last number of v must not matter.
    beside = torch.cat([v.flatten(), torch.full((2,), float("nan"), dtype=dtype)])
    w = torch.randn(d, f, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    start, before, base = 5, w.double().clone(), torch.randn(d, f).to(dtype)
    native.function("spread", dtype)(
        *(w.data_ptr(), base.data_ptr() if upon_base else None, beside.data_ptr(), tail.data_ptr(), None),
        *(f, 1, capacity, f, d, start, count, first, size, threads),
    )
    keys = tail[1, torch.arange(start, start + count) % capacity].double()
    exact = before.clone()
    if upon_base:
        exact[:, first : first + size] = base.double()[:, first : first + size]
    exact[:, first : first + size] += (v.double() @ keys)[:, first : first + size]
    assert relative_error(w, exact) < {torch.float64: 1e-14}.get(dtype, 1e-6)
    assert torch.equal(w.double()[:, :first], before[:, :first])
    assert torch.equal(w.double()[:, first + size :], before[:, first + size :])


@pytest.mark.parametrize("late", [0, 3, 15])
def test_v_does_not_depend_on_when_it_was_made(late):
    """Tokens of a long call have no v yet: it is made behind it, block by block as ever."""
    one = spec(CHUNK)
    args = problem(1, 2 * CHUNK, torch.float32)
    states = [fresh(one, 1, torch.float32, spread=True) for _ in range(2)]
    decode(states[0], one, args, 0, CHUNK)
    if late:
        feed(states[1], one, args, 0, late)
    decode(states[1], one, args, late, CHUNK)
    a, b = (s.sites[KEY].spread_values(0, CHUNK) for s in states)
    assert torch.equal(a, b)
    v = LR * reference.target(args[1][0, :CHUNK].double(), args[3].double(), args[4].double())
    assert relative_error(a.t().double(), v) < 1e-6
    # Norms of blocks are put together on the way.
    site = states[0].sites[KEY]
    bound = float(v.norm() * args[0][0, :CHUNK].double().norm())
    assert math.isclose(float(site.norms[0, 0]), bound, rel_tol=1e-5)


def test_a_changed_adapter_makes_v_anew_but_not_of_what_is_being_written():
    one = spec(CHUNK)
    args = problem(1, 3 * CHUNK)
    other = [*args[:3], args[3] * 2, *args[4:]]
    state = fresh(one, 1, spread=True)
    state.follow("one")
    decode(state, one, args, 0, CHUNK + 1)
    state.follow("other")
    assert column(state, LEFT) != [0]
    decode(state, one, other, CHUNK + 1, 2 * CHUNK - 1)
    assert column(state, VALUES) == [6]
    state.follow("third")
    assert column(state, VALUES) == [0]
    third = [*args[:3], args[3] * 3, *args[4:]]
    decode(state, one, third, 2 * CHUNK - 1, 2 * CHUNK)
    h, t, w0, conv, proj, _ = args
    w = w0.clone()
    for i, factor in enumerate((1, 3)):
        part = slice(i * CHUNK, (i + 1) * CHUNK)
        w = w + (LR * reference.target(t[0, part], conv * factor, proj)).t() @ h[0, part]
    assert relative_error(state.matrix(KEY, 0, w0), w) < 1e-12


@pytest.mark.parametrize("which", [0, 1], ids=["h", "t"])
@pytest.mark.parametrize("at", [0, 9, CHUNK - 1])
def test_nan_is_seen_before_anything_is_written(which, at):
    args = problem(1, 2 * CHUNK)
    args[which][0, at, 3] = float("nan")
    one = spec(CHUNK)
    state = fresh(one, 1, spread=True)
    decode(state, one, args, 0, CHUNK - 1)
    with pytest.raises(NonFiniteWriteError):
        decode(state, one, args, CHUNK - 1, CHUNK)
    assert column(state, WRITES) == [0]
    assert column(state, LEFT) == [0]

    one = spec(CHUNK, WriteRule(on_nonfinite="skip"))
    state = fresh(one, 1, spread=True)
    y = decode(state, one, args, 0, 2 * CHUNK)
    assert [column(state, x) for x in (WRITES, SKIPPED, DONE)] == [[1], [1], [2]]
    assert bool(y[:, CHUNK:].isfinite().all())
    h, _, w0, *_, bias = args
    base = torch.nn.functional.linear(h, w0, bias)
    assert relative_error(y[:, CHUNK:], base[:, CHUNK:]) < 1e-12


def test_nothing_is_spread_where_it_cannot_be(monkeypatch):
    args = problem(1, 3 * CHUNK)
    for name in ("decay", "unit keys", "norm limit", "ratio limit"):
        one = spec(CHUNK, RULES[name])
        assert spread_tokens(one) == 0
        state = fresh(one, 1, spread=True)
        assert state.sites[KEY].rows.shape[1] == COLUMNS
    # A first write whose W0 has no rows in one piece: at once. The next one needs no W0.
    one, state = spec(CHUNK), fresh(spec(CHUNK), 1, spread=True)
    strange = [*args[:2], args[2].t().contiguous().t(), *args[3:]]
    decode(state, one, strange, 0, CHUNK)
    assert column(state, LEFT) == [0]
    decode(state, one, strange, CHUNK, 2 * CHUNK)
    assert column(state, LEFT) != [0]
    # Tokens that may be taken back.
    state = fresh(one, 1, spread=True, revocable=3)
    decode(state, one, args, 0, 2 * CHUNK)
    assert column(state, LEFT) == [0]
    # No compiler.
    state = fresh(one, 1, spread=True)
    with native.unused():
        decode(state, one, args, 0, 2 * CHUNK)
    assert column(state, LEFT) == [0]
    assert column(state, WRITES) == [2]


def test_a_first_write_ends_even_if_w0_changes_its_layout():
    args = problem(1, 3 * CHUNK)
    strange = [*args[:2], args[2].t().contiguous().t(), *args[3:]]
    one = spec(CHUNK)
    states = [fresh(one, 1, spread=True) for _ in range(2)]
    for state, then in zip(states, (args, strange), strict=True):
        decode(state, one, args, 0, CHUNK + 1)
        decode(state, one, then, CHUNK + 1, CHUNK + 4)
    a, b = (s.matrix(KEY, 0, args[2]) for s in states)
    assert relative_error(a, b) < 1e-14


def test_a_write_that_began_elsewhere_ends_without_a_compiler():
    """A session's file may come from a machine that has one."""
    args, one = problem(1, 3 * CHUNK), spec(CHUNK)
    for border in (CHUNK, 2 * CHUNK):
        states = [fresh(one, 1, spread=True) for _ in range(2)]
        for state in states:
            feed(state, one, args, 0, border - CHUNK)
            decode(state, one, args, border - CHUNK, border + 1)
            assert column(state, LEFT) == [24]
        with native.unused():
            feed(states[0], one, args, border + 1, border + 3)
        feed(states[1], one, args, border + 1, border + 3)
        assert column(states[0], LEFT) == [0]
        a, b = (s.sites[KEY].w[0] for s in states)
        assert relative_error(a, b) < 1e-14


def test_norms_do_not_depend_on_the_default_dtype():
    args, one = problem(1, 2 * CHUNK), spec(CHUNK)
    args[0] *= 1e5
    states = [fresh(one, 1, spread=True) for _ in range(2)]
    decode(states[0], one, args, 0, CHUNK)
    torch.set_default_dtype(torch.float16)
    try:
        decode(states[1], one, args, 0, CHUNK)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(*(s.sites[KEY].norms for s in states))


def test_no_rows_at_all():
    state = fresh(spec(CHUNK), 2, spread=True)
    state.batch = state.batch[:0]
    args = problem(0, 1)
    assert feed(state, spec(CHUNK), args, 0, 1).shape == (0, 1, 24)


@pytest.mark.parametrize("what", ["clone", "select", "follow", "call", "strange"])
def test_v_of_a_span_is_made_in_part_when_something_else_comes(what):
    """The convolution stands in columns of later tokens: it goes where its row goes, or is made again."""
    chunk, batch = 150, 3
    one = dataclasses.replace(spec(chunk), d_model=130, d_target=130)
    g = torch.Generator().manual_seed(0)
    length = 2 * chunk
    sizes = ((batch, length, 40), (batch, length, 130), (130, 40), (130, 1, K), (130, 130), (130,))
    args = [torch.randn(s, generator=g, dtype=torch.float64) * 0.1 for s in sizes]
    state = fresh(one, batch, spread=True)
    i = 0
    while not all(1 < x < 17 for x in column(state, VALUES)):
        feed(state, one, args, i, i + 1)
        i += 1
    rows, conv = list(range(batch)), args[3]
    if what == "clone":
        other, state = state, state.clone()
        decode(other, one, [args[0] * 2, args[1] * 3, *args[2:]], i, chunk)
    elif what == "select":
        rows = [2, 0, 2]
        state.select(torch.tensor(rows))
    elif what == "follow":
        conv = conv * 2
        state.follow("one")
        state.follow("other")
    elif what == "call":
        ahead = column(state, VALUES)
        feed(state, one, [args[0][rows], *args[1:]], i, i + 20)
        assert all(a <= b for a, b in zip(ahead, column(state, VALUES), strict=True))
        i += 20
    proj = args[4].t().contiguous().t() if what == "strange" else args[4]
    now = [args[0][rows], args[1][rows], args[2], conv, proj, args[5]]
    decode(state, one, now, i, chunk + 1)
    if what != "select":
        assert min(column(state, LEFT)) > 0
    feed(state, one, now, chunk + 1, length)
    assert column(state, WRITES) == [2] * batch
    for b in range(batch):
        h, t, w0, conv, proj, _ = now
        w = reference.chunked(h[b], t[b], w0, conv, proj, LR, chunk, None, one.rule)[1]
        assert relative_error(state.matrix(KEY, b, w0), w) < 1e-12


def test_v_that_is_there_is_used_by_a_longer_call(monkeypatch):
    one, args = spec(160), problem(2, 320)
    state = fresh(one, 2, spread=True)
    decode(state, one, args, 0, 150)
    assert min(column(state, VALUES)) > 0
    made = []
    values = step.Call.values
    monkeypatch.setattr(step.Call, "values", lambda *a: made.append(1) or values(*a))
    feed(state, one, args, 150, 320)
    assert len(made) == 2, "of the second chunk of both rows"
    for b in range(2):
        assert relative_error(state.matrix(KEY, b, args[2]), final_weight(one, args, b)) < 1e-12


def test_beams_make_no_v_ahead():
    """They change places at every token, and v stands where a row stood."""
    one, args = spec(CHUNK), problem(2, 3 * CHUNK)
    state = fresh(one, 2, spread=True, shared_lanes=True)
    rows = [[], []]
    for i in range(3 * CHUNK):
        feed(state, one, args, i, i + 1)
        assert max(column(state, VALUES)) <= 0
        rows = [[*r, b] for b, r in enumerate(rows)]
        order = torch.tensor([1, 0]) if i % 2 else torch.tensor([0, 0])
        state.select(order)
        rows = [rows[j] for j in order.tolist()]
    assert column(state, WRITES) == [3, 3]
    h, t, w0, conv, proj, _ = args
    for b, past in enumerate(rows):
        index = torch.arange(3 * CHUNK)
        keys, targets = (x[torch.tensor(past), index] for x in (h, t))
        w = reference.chunked(keys, targets, w0, conv, proj, LR, CHUNK, None, one.rule)[1]
        assert relative_error(state.matrix(KEY, b, w0), w) < 1e-12


def test_lr_zero_and_a_zero_convolution_write_nothing():
    args = problem(1, 3 * CHUNK)
    for one, conv in ((dataclasses.replace(spec(CHUNK), lr=0.0), args[3]), (spec(CHUNK), args[3] * 0)):
        state = fresh(one, 1, spread=True)
        h, _, w0, *_, bias = args
        y = decode(state, one, [*args[:3], conv, *args[4:]], 0, 3 * CHUNK)
        base = torch.cat([torch.nn.functional.linear(h[:, i : i + 1], w0, bias) for i in range(3 * CHUNK)], 1)
        assert torch.equal(y, base)
        assert [column(state, x) for x in (DONE, WRITES)] == [[3], [0]]
        assert state.sites[KEY].spreads == (one.lr != 0)


@pytest.mark.parametrize("chunk", [9, 70])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_odd_sizes_and_rows_at_different_places(threads, chunk):
    """Widths that no panel divides, large enough for threads; rows whose borders lie elsewhere."""
    d, f, batch = 67, 1003, 3
    one = dataclasses.replace(spec(chunk), d_model=d, d_ff=f, d_target=d)
    g = torch.Generator().manual_seed(0)
    sizes = ((batch, 96, f), (batch, 96, d), (d, f), (d, 1, K), (d, d), (d,))
    args = [torch.randn(s, generator=g, dtype=torch.float64) * 0.1 for s in sizes]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state = fresh(one, batch, spread=True)
        pos = torch.ones(batch, 96, dtype=torch.int64)
        pos[0, 20] = pos[1, 25] = 0
        pos[2, 5:9] = -1
        ys, seen = [], 0
        for i in range(96):
            ys.append(feed(state, one, args, i, i + 1, pos))
            seen += sum(x > 0 for x in column(state, LEFT))
        assert seen > 20
        y = torch.cat(ys, 1)
    finally:
        torch.set_num_threads(before)
    h, t, w0, conv, proj, bias = args
    keep = torch.ones(96, dtype=torch.bool)
    keep[5:9] = False
    documents = [(0, range(20)), (0, range(20, 96)), (1, range(25)), (1, range(25, 96))]
    documents.append((2, keep.nonzero().flatten().tolist()))
    for b, places in documents:
        index = torch.tensor(list(places))
        exact = reference.chunked(h[b, index], t[b, index], w0, conv, proj, LR, chunk, None, one.rule)[0]
        assert relative_error(y[b, index], exact + bias) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 4, 5, 9])
@pytest.mark.parametrize(
    ("chunk", "depth", "width"),
    [(3, 2, 2), (6, 8, 8), (11, 65, 130), (70, 33, 50), (70, 50, 33), (128, 16, 16), (150, 130, 130)],
)
def test_v_is_the_reference_whenever_it_is_made(dtype, kernel, chunk, depth, width):
    """At once, and unit by unit, from a ring that begins anywhere; also where the source is wider than D."""
    one = dataclasses.replace(spec(chunk), d_model=width, d_target=depth, conv_kernel=kernel)
    t, h = torch.randn(chunk, depth).to(dtype), torch.randn(chunk, 40).to(dtype)
    conv, proj = torch.randn(depth, 1, kernel).to(dtype), torch.randn(depth, width).to(dtype)
    turned = torch.stack([proj, proj], 2)[:, :, 0]
    for p in (proj, turned, *([None] if depth == width else [])):
        made = []
        for done, most in ((0, 1000), (0, 1), (1, 1), (2, 2)):
            state = fresh(one, 3, dtype, spread=True, shared_lanes=done == 2).sites[KEY]
            counts = [0] * state.rows.shape[1]
            counts[SEEN], counts[DONE] = (done + 1) * chunk, done
            places = torch.arange(done * chunk, (done + 1) * chunk) % state.capacity
            lane = 1
            if done == 2:
                lane = places % 3
                state.lanes[1, places] = lane.to(torch.int32)
            state.tail_h[lane, places], state.tail_t[lane, places] = h, t
            state.spread_values(0, chunk).fill_(float("nan"))
            state.spread_values(2, chunk).fill_(float("nan"))
            while counts[VALUES] < len(units(chunk)):
                before = counts[VALUES]
                make_units(counts, 1, state, conv, p, one, most)
                assert before < counts[VALUES] <= before + most
            made.append((state.spread_values(1, chunk), state.norms[1, 3:]))
            assert state.tail_v[[0, 2]].isnan().all()
        for v, norms in made:
            assert torch.equal(v, made[0][0])
            assert torch.equal(norms, made[0][1])
        ours = made[0][0]
        plain, exact = (
            reference.target(*(None if x is None else x.to(wide) for x in (t, LR * conv, p)))
            for wide in (dtype, torch.float64)
        )
        # Of an even kernel it has one token more.
        assert_within_budget(ours, plain[:chunk].t(), exact[:chunk].t())
        for norm, x in zip(made[0][1].tolist(), (ours, h), strict=True):
            assert math.isclose(norm, float(x.double().norm()), rel_tol=1e-6)
