"""A training forward keeps some fast matrices: which ones, that gradients stay, and who keeps none."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import ttt_compiler.codegen.lowering  # noqa: F401
from tests.codegen.test_ops import problem
from tests.tolerances import FP64, relative_error
from ttt_compiler.codegen import reference
from ttt_compiler.codegen.cpu import kept, scan
from ttt_compiler.errors import NonFiniteWriteError

C, LR = 5, 0.3


def packed(length, starts):
    """One row of documents that begin where ``starts`` says."""
    bounds = [0, *sorted(starts), length]
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(bounds)])[None]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 30), st.integers(1, 4))
def test_places_are_where_a_forward_has_a_written_matrix(chunks, many, tail):
    marks = kept.places(chunks, many, tail)
    assert sum(map(len, marks)) <= many
    for n, at in zip(chunks, marks, strict=True):
        assert at == sorted(set(at))
        assert all(0 < i <= n - tail for i in at)


@pytest.mark.parametrize("tail", [1, 2, 3])
@pytest.mark.parametrize(("n", "many"), [(7, 1), (8, 2), (9, 3), (16, 4), (6, 20)])
def test_no_other_places_cost_less(n, many, tail):
    """By trying all of them, where a read costs so much of a write that this tail is the best."""
    read = {1: 1.5, 2: 2 / 3, 3: 0.4}[tail]

    def cost(marks):
        writes, reads = kept.stretches(n, marks, tail)
        return writes + reads * read

    free = range(1, n - tail + 1)
    choices = itertools.chain.from_iterable(
        itertools.combinations(free, k) for k in range(min(many, len(free)) + 1)
    )
    (marks,) = kept.places([n], many, tail)
    assert cost(marks) <= min(map(cost, choices)) + 1e-9


@pytest.mark.parametrize("chunk", [64, 128, 256, 512, 1024, 4096])
@pytest.mark.parametrize(
    ("batch", "length", "d", "dtype"),
    [(1, 8192, 1024, torch.float32), (1, 4096, 1024, torch.float32), (4, 8192, 1024, torch.bfloat16)],
)
def test_matrices_of_a_step_take_as_much_for_every_chunk_size(chunk, batch, length, d, dtype):
    """The kept ones, and W where a stretch has more chunks than read each other."""
    f = 3 * d
    with torch.device("meta"):
        h, w0 = torch.empty(batch, length, f, dtype=dtype), torch.empty(d, f, dtype=dtype)
    many = kept.shape(h, w0, chunk)[0]
    chunks = length // chunk
    tail = kept.tail_chunks(chunk, d, f)
    marks = kept.places([chunks] * batch, many, tail)
    written = any(kept.stretches(chunks, at, tail)[0] for at in marks)
    fits = int(h.nbytes * 7 / 8 // (d * f * 4))
    assert many + written == min(fits, batch * chunks)


def test_what_is_kept_is_in_the_states_dtype():
    h, w0 = torch.empty(4, 4096, 8, dtype=torch.bfloat16), torch.empty(2, 8, dtype=torch.bfloat16)
    made = kept.room(h, w0, 1024)
    assert made.dtype == torch.float32
    assert len(made) == 16  # no more than chunks


@pytest.mark.parametrize("tail", [1, 2, 3])
@pytest.mark.parametrize("many", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("starts", [(), (3, 21), (38,), (1, 2, 3)])
def test_gradients_are_those_of_the_reference(monkeypatch, starts, many, tail):
    """Whatever is kept, and nothing is read of what the forward left empty."""
    monkeypatch.setattr(scan, "tail_chunks", lambda *_: tail)
    used = []

    def room(h, w0, chunk):
        made = h.new_full((many, *w0.shape), float("nan"))
        used.append(made)
        return made

    monkeypatch.setattr(kept, "room", room)
    length = 43
    h, t, w0, conv, proj, bias = (x[:1] if x.dim() == 3 and len(x) == 3 else x for x in problem(length))
    given = [x.detach().requires_grad_() for x in (h, t, w0, conv, proj, bias)]
    h, t, w0, conv, proj, bias = given
    pos = packed(length, starts)
    weights = torch.randn(1, length, len(w0), dtype=torch.float64)
    v = torch.ops.ttt.chunk_values(t, conv * LR, proj, pos, C)
    y = torch.ops.ttt.chunk_scan(h, v, w0, bias, pos, C)
    ours = torch.autograd.grad(y, given, weights)
    exact = reference.batched(h, t, w0, conv, proj, LR, C, pos, bias)
    plain = torch.autograd.grad(exact, given, weights)
    assert relative_error(y, exact) < FP64
    for name, a, b in zip(("h", "t", "w0", "conv", "proj", "bias"), ours, plain, strict=True):
        assert relative_error(a, b) < FP64, name
    chunks = [-(-(b - a) // C) for a, b in itertools.pairwise([0, *sorted(starts), length])]
    filled = sum(not bool(x.isnan().any()) for x in used[0])
    assert filled == sum(map(len, kept.places(chunks, many, tail)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_kept_by_what_is_narrower_than_the_state(dtype, decay):
    """More rows than a product of the state itself has, so that copies of W are read."""
    g = torch.Generator().manual_seed(0)
    length, chunk = 150, 20
    h, v, dy = (torch.randn(2, length, n, generator=g).to(dtype) for n in (24, 16, 16))
    v, w0 = v * 0.05, torch.randn(16, 24, generator=g).to(dtype)
    room = torch.full((9, *w0.shape), float("nan"))
    y = scan.chunk_scan(h, v, w0, None, None, chunk, decay, kept=room)
    assert relative_error(y, scan.chunk_scan(h, v, w0, None, None, chunk, decay)) < 1e-6
    ours = scan.chunk_scan_backward(dy, h, v, w0, None, chunk, decay, kept=room)
    wide = [x.double().requires_grad_() for x in (h, v, w0)]
    exact = torch.autograd.grad(scan_of(*wide, chunk, decay), wide, dy.double())
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a.double(), b) < 8 * torch.finfo(dtype).eps


def scan_of(h, v, w0, chunk, decay):
    """Chunk by chunk, by autograd's own operations."""
    out = []
    for b in range(len(h)):
        w = w0
        for i in range(0, h.shape[1], chunk):
            rows = slice(i, i + chunk)
            out.append(h[b, rows] @ w.t())
            w = w0 + decay * (w - w0) + v[b, rows].t() @ h[b, rows]
    return torch.cat(out).view(*h.shape[:2], -1)


@pytest.mark.parametrize("many", [0, 9])
def test_nothing_is_written_and_a_chunk_is_not_finite(many):
    """A forward that writes nothing asks no chunk: the backward does."""
    h, _, w0, *_ = problem(41)
    v, dy = torch.zeros(3, 41, len(w0), dtype=torch.float64), torch.ones(3, 41, len(w0), dtype=torch.float64)
    h[1, 7] = float("inf")
    room = w0.new_empty(many, *w0.shape)
    scan.chunk_scan(h, v, w0, None, None, C, kept=room)
    with pytest.raises(NonFiniteWriteError, match="chunk 1"):
        scan.chunk_scan_backward(dy, h, v, w0, None, C, kept=room)


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("bad", [None, 2, 12])
def test_kept_under_decay_and_with_a_chunk_that_is_skipped(decay, bad):
    h, _, w0, *_ = problem(41)
    v, dy = torch.randn(2, 3, 41, len(w0), dtype=torch.float64) * 0.1
    if bad is not None:
        v[1, bad] = float("nan")
    rule = (None, C, decay, "skip")
    # So many that a stretch is one chunk, which may be the one that is skipped.
    room = w0.new_full((24, *w0.shape), float("nan"))
    y = scan.chunk_scan(h, v, w0, None, *rule, kept=room)
    assert torch.equal(y, scan.chunk_scan(h, v, w0, None, *rule))
    places = kept.places([9] * 3, 24, scan._tail(C, w0, decay))
    assert not room[: sum(map(len, places))].isnan().any()
    ours = scan.chunk_scan_backward(dy, h, v, w0, *rule, kept=room)
    plain = scan.chunk_scan_backward(dy, h, v, w0, *rule)
    for a, b in zip(ours, plain, strict=True):
        assert relative_error(a, b) < FP64


def test_nothing_is_written_so_what_is_kept_is_w0():
    """An adapter that was not trained yet: v is zero, and no chunk is read on its own."""
    h, _, w0, *_ = problem(41)
    zeros = torch.zeros(3, 41, len(w0), dtype=torch.float64)
    room = w0.new_full((4, *w0.shape), float("nan"))
    scan.chunk_scan(h, zeros, w0, None, None, C, kept=room)
    assert torch.equal(room, w0.expand_as(room))


def layer(h, v, w0):
    return torch.ops.ttt.chunk_scan(h, v, w0, None, None, C)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_only_a_recorded_call_keeps(monkeypatch, compiled):
    made = []
    plain = kept.room
    monkeypatch.setattr(kept, "room", lambda *args: made.append(plain(*args)) or made[-1])
    h, _, w0, *_ = problem(41)
    v = torch.randn(3, 41, len(w0), dtype=torch.float64)
    with torch._inductor.config.patch(force_disable_caches=True):
        run = torch.compile(layer, fullgraph=True) if compiled else layer
        with torch.no_grad():
            run(h, v, w0.requires_grad_())
        run(h, v, w0.detach())
        assert not made
        run(h, v, w0).sum().backward()
        assert made


def test_a_compiled_training_step_keeps_for_any_length():
    counter = CompileCounterWithBackend("inductor")
    with torch._inductor.config.patch(force_disable_caches=True):
        run = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        for length in (41, 26, 17, 3):
            h, _, w0, *_ = problem(length)
            v = torch.randn(3, length, len(w0), dtype=torch.float64)
            given = [x.detach().requires_grad_() for x in (h, v, w0)]
            ours = torch.autograd.grad(run(*given).square().sum(), given)
            plain = torch.autograd.grad(layer(*given).square().sum(), given)
            for a, b in zip(ours, plain, strict=True):
                assert relative_error(a, b) < FP64
            # Room for no matrix at all is a graph of its own.
            assert counter.frame_count == (2 if length == 3 else 1)
