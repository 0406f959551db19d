"""The ops against the reference: values, gradients, schema laws, budgets in every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerances import FP64, assert_within_budget, relative_error
from ttt_compiler.codegen import ops, reference  # noqa: F401
from ttt_compiler.codegen.cpu import target_values
from ttt_compiler.codegen.layout import WRITES
from ttt_compiler.errors import NonFiniteWriteError, NotCompiledError, PositionError
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec

B, F, D, C, K, LR = 3, 12, 8, 5, 5, 0.3


def problem(length=23, dtype=torch.float64, *, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return make(B, length, F), make(B, length, D), make(D, F), make(D, 1, K), make(D, D), make(D)


def positions(length=23):
    """Row 0: one document. Row 1: left padding. Row 2: two documents and right padding."""
    pos = torch.arange(length).repeat(3, 1)
    pos[1] = torch.cat([torch.full((4,), -1), torch.arange(length - 4)])
    pos[2] = torch.cat([torch.arange(11), torch.arange(length - 14), torch.full((3,), -1)])
    return pos


def stateless(h, t, w0, conv, proj, bias, pos, chunk=C):
    v = torch.ops.ttt.chunk_values(t, conv * LR, proj, pos, chunk)
    return torch.ops.ttt.chunk_scan(h, v, w0, bias, pos, chunk)


def state(dtype=torch.float64, chunk=C, batch=B, revocable=0):
    """Poisoned: nothing may be read before it is written."""
    one = SiteSpec.decode(spec(chunk))
    made = FastWeightState.zeros([one], batch, dtype, torch.device("cpu"), revocable=revocable)
    site = made.sites[one.key]
    for x in (site.w, site.tail_h, site.tail_t, site.tail_v):
        x.fill_(float("nan"))
    return (*site, made.batch)


def spec(chunk=C, lr=LR):
    return SiteSpec("site.weight", D, F, D, chunk, lr, "hidden_states", True, K, "site").encode()


def stream(splits, args, pos, s, chunk=C):
    h, t, w0, conv, proj, bias = args
    out, start = [], 0
    for size in splits:
        rows = slice(start, start + size)
        p = None if pos is None else pos[:, rows]
        out.append(
            torch.ops.ttt.fast_weight_step(h[:, rows], t[:, rows], w0, bias, conv, proj, p, spec(chunk), *s)
        )
        start += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("pos", [None, positions()], ids=["whole", "documents"])
def test_reference_chunked_equals_naive(pos):
    h, t, w0, conv, proj, _ = problem()
    for b in range(B):
        row = None if pos is None else pos[b]
        chunked = reference.chunked(h[b], t[b], w0, conv, proj, LR, C, row)[0]
        assert relative_error(chunked, reference.naive(h[b], t[b], w0, conv, proj, LR, C, row)) < FP64


@pytest.mark.parametrize("pos", [None, positions()], ids=["whole", "documents"])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 23])
def test_stateless_equals_reference(length, pos):
    pos = None if pos is None else pos[:, -length:]
    args = problem(length)
    h, t, w0, conv, proj, bias = args
    assert (
        relative_error(stateless(*args, pos), reference.batched(h, t, w0, conv, proj, LR, C, pos, bias))
        < FP64
    )


@pytest.mark.parametrize("pos", [None, positions()], ids=["whole", "documents"])
def test_gradients(pos):
    args = problem(grad=True)
    h, t, w0, conv, proj, bias = args
    weights = torch.randn(B, 23, D, dtype=torch.float64)
    ours = torch.autograd.grad(stateless(*args, pos), args, weights)
    plain = torch.autograd.grad(reference.batched(h, t, w0, conv, proj, LR, C, pos, bias), args, weights)
    for name, a, b in zip(("h", "t", "w0", "conv", "proj", "bias"), ours, plain, strict=True):
        assert relative_error(a, b) < FP64, name


@pytest.mark.parametrize("pos", [None, positions()], ids=["whole", "documents"])
@pytest.mark.parametrize("length", [1, 5, 6, 23])
def test_targets_of_last_chunks_are_not_made(length, pos):
    """Nobody reads them: zeros, and no gradient."""
    _, t, _, conv, proj, _ = problem(length, grad=True)
    p = None if pos is None else pos[:, :length]
    v = torch.ops.ttt.chunk_values(t, conv, proj, p, C)
    made = torch.zeros(B, length, dtype=torch.bool)
    starts = [[0]] * B if p is None else [row.eq(0).nonzero().flatten().tolist() for row in p]
    for b, begun in enumerate(starts):
        for start, bound in zip(begun, [*begun, length][1:], strict=True):
            stop = bound if p is None else start + int((p[b, start:bound] >= 0).sum())
            made[b, start : start + (stop - start - 1) // C * C] = True
    exact = torch.where(made[..., None], torch.ops.ttt.chunk_conv(t, conv, p, C) @ proj, 0.0)
    assert relative_error(v, exact) < FP64 if made.any() else not v.any()
    assert not v[~made].any()
    grad = torch.randn_like(v)
    got = torch.autograd.grad(v, (t, conv, proj), grad)
    want = torch.autograd.grad(exact, (t, conv, proj), grad)
    assert all(relative_error(a, b) < FP64 for a, b in zip(got, want, strict=True) if b.any())
    assert all(not a.any() for a, b in zip(got, want, strict=True) if not b.any())


@pytest.mark.parametrize("rows", [1, 10, 12])
@pytest.mark.parametrize("pos", [None, positions()], ids=["whole", "documents"])
def test_values_do_not_depend_on_how_many_are_made_at_once(monkeypatch, pos, rows):
    """A block is one chunk, or two of which a document may leave one for the last."""
    _, t, _, conv, proj, _ = problem(grad=True)
    weights = torch.randn(B, 23, D, dtype=torch.float64)

    def made():
        v = torch.ops.ttt.chunk_values(t, conv, proj, pos, C)
        return v, *torch.autograd.grad(v, (t, conv, proj), weights)

    whole = made()
    monkeypatch.setattr(target_values, "BLOCK", rows)
    for a, b in zip(made(), whole, strict=True):
        assert relative_error(a, b) < FP64


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_values_have_the_gradients_that_are_asked_for(which):
    _, t, _, conv, proj, _ = problem()
    given = [t, conv, proj]
    for i in which:
        given[i].requires_grad_()
    asked = [given[i] for i in which]
    v = torch.ops.ttt.chunk_values(*given, positions(), C)
    ours = torch.autograd.grad(v.square().sum(), asked)
    apart = torch.ops.ttt.chunk_conv(t, conv, positions(), C) @ proj
    plain = torch.autograd.grad((v.detach() != 0).mul(apart).square().sum(), asked)
    assert all(relative_error(a, b) < FP64 for a, b in zip(ours, plain, strict=True))


def test_gradcheck():
    args = problem(13, grad=True)
    assert torch.autograd.gradcheck(lambda *a: stateless(*a, positions(13 + 10)[:, 10:]), args)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 7), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_segmentation_gives_the_same(splits, chunk, with_documents):
    """Law 1 and 2: whole == any segmentation, chunk borders anywhere, from poisoned state."""
    length = sum(splits)
    args = problem(length)
    h, t, w0, conv, proj, bias = args
    pos = None
    if with_documents:
        pos = torch.arange(length).repeat(3, 1)
        pos[1, length // 2 :] -= length // 2
        pos[2, : length // 3] = -1
    expected = reference.batched(h, t, w0, conv, proj, LR, chunk, pos, bias)
    assert relative_error(stream(splits, args, pos, state(chunk=chunk), chunk), expected) < FP64


def test_final_weight_and_counters():
    args = problem()
    h, t, w0, conv, proj, _ = args
    s = state()
    stream([7, 1, 15], args, None, s)
    for b in range(B):
        w = reference.chunked(h[b], t[b], w0, conv, proj, LR, C)[1]
        assert relative_error(s[0][b], w) < FP64
    assert [row[: WRITES + 1] for row in s[5].tolist()] == [[23, 4, 4]] * B


def test_padding_may_interrupt_a_running_document_but_not_a_stateless_one():
    args = problem(10)
    h, t, w0, conv, proj, bias = args
    pos = torch.tensor([[0, 1, 2, -1, -1, 3, 4, 5, 6, 7]]).repeat(B, 1)
    out = stream([10], args, pos, state())
    assert relative_error(out, reference.batched(h, t, w0, conv, proj, LR, C, pos, bias)) < FP64
    with pytest.raises(PositionError, match="contiguous"):
        stateless(*args, pos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(dtype):
    args = problem(64, dtype)
    exact = [a.double() for a in args]

    def plain(h, t, w0, conv, proj, bias):
        return reference.batched(h, t, w0, conv, proj, LR, 16, None, bias)

    assert_within_budget(stateless(*args, None, chunk=16), plain(*args), plain(*exact))
    s = state(dtype, chunk=16)
    assert_within_budget(stream([33, 1, 30], args, None, s, chunk=16), plain(*args), plain(*exact))


def test_zero_conv_and_zero_lr_are_the_plain_projection_bit_for_bit():
    h, t, w0, conv, proj, bias = problem(dtype=torch.float32)
    base = torch.addmm(bias, h.view(-1, F), w0.t()).view(B, -1, D)
    assert torch.equal(stateless(h, t, w0, conv * 0, proj, bias, None), base)
    out = torch.ops.ttt.fast_weight_step(h, t, w0, bias, conv * 0, proj, None, spec(), *state(torch.float32))
    assert torch.equal(out, base)
    out = torch.ops.ttt.fast_weight_step(
        h, t, w0, bias, conv, proj, None, spec(lr=0.0), *state(torch.float32)
    )
    assert torch.equal(out, base)


def test_rows_are_independent_and_later_tokens_do_not_matter():
    args = problem()
    out = stateless(*args, None)
    h, t, *rest = args
    h2, t2 = h.clone(), t.clone()
    h2[0], t2[0] = 7.0, 7.0
    h2[1, 13:], t2[1, 13:] = 7.0, 7.0
    changed = stateless(h2, t2, *rest, None)
    assert torch.equal(changed[2], out[2])
    assert torch.equal(changed[1, :13], out[1, :13])


@pytest.mark.parametrize("where", ["h", "t"])
def test_nonfinite_write_is_refused_before_it_reaches_the_state(where):
    args = list(problem())
    s = state()
    stream([5], [a[:, :5] if a.dim() == 3 and a.shape[1] == 23 else a for a in args], None, s)
    before = s[0].clone()
    bad = [a.clone() for a in args]
    bad[0 if where == "h" else 1][:, 2] = float("inf")
    with pytest.raises(NonFiniteWriteError, match="chunk 1"):
        stream([5], [a[:, :5] if a.dim() == 3 and a.shape[1] == 23 else a for a in bad], None, s)
    assert torch.equal(s[0], before)


def test_fp16_writes_do_not_overflow_on_the_way_to_fp32():
    chunk = 1024
    h, t = torch.full((1, chunk, F), 12.0).half(), torch.full((1, chunk, D), 12.0).half()
    w0, conv = torch.zeros(D, F).half(), torch.zeros(D, 1, K).half()
    conv[:, 0, K // 2] = 1
    s = state(torch.float16, chunk, batch=1)
    one = SiteSpec("site.weight", D, F, D, chunk, 1.0, "hidden_states", False, K, "site").encode()
    torch.ops.ttt.fast_weight_step(h, t, w0, None, conv, None, None, one, *s)
    assert torch.equal(s[0], torch.full((1, D, F), 147456.0))


def test_fp16_scores_of_last_chunks_do_not_overflow():
    """Few rows that read an unwritten chunk: products of rows of h are beyond fp16, what they add is not."""
    g = torch.Generator().manual_seed(0)
    d, f, chunk, length = 512, 1024, 64, 136
    h = (torch.randn(1, length, f, generator=g) * 12).half()
    v = (torch.randn(1, length, d, generator=g) * 1e-4).half()
    w0 = (torch.randn(d, f, generator=g) * 0.02).half()
    exact = torch.ops.ttt.chunk_scan(h.double(), v.double(), w0.double(), None, None, chunk)
    assert exact.abs().max() < 6e4
    got = torch.ops.ttt.chunk_scan(h, v, w0, None, None, chunk)
    assert relative_error(got.double(), exact) < 1e-3


def test_marker_refuses_to_run():
    h, _, w0, conv, proj, _ = problem()
    with pytest.raises(NotCompiledError, match=r'model\.compile\(backend="inplace_ttt"\)'):
        torch.ops.ttt.site(h, w0, spec(), conv, proj, *[None] * 10)


@pytest.mark.parametrize("pos", [None, positions()], ids=["whole", "documents"])
def test_opcheck(pos):
    h, t, w0, conv, proj, bias = problem(grad=True)
    v = torch.randn_like(t).requires_grad_()
    check = torch.library.opcheck
    check(torch.ops.ttt.chunk_conv.default, (t, conv, pos, C))
    check(torch.ops.ttt.chunk_conv_dweight.default, (v.detach(), t.detach(), pos, C, K))
    check(torch.ops.ttt.chunk_values.default, (t, conv, proj, pos, C))
    plain = [x.detach() for x in (v, t, conv, proj)]
    for needed in ([True, True, True], [False, True, False]):
        check(torch.ops.ttt.chunk_values_backward.default, (*plain, pos, C, needed))
    check(torch.ops.ttt.chunk_scan.default, (h, v, w0, bias, pos, C))
    check(torch.ops.ttt.chunk_scan.default, (h, v, w0, None, pos, C))
    plain = [x.detach() for x in (h, v, w0)]
    check(torch.ops.ttt.chunk_scan_keeping.default, (*plain, bias.detach(), pos, C))
    check(torch.ops.ttt.chunk_scan_backward.default, (v.detach(), *plain, pos, C))
    _, kept = torch.ops.ttt.chunk_scan_keeping(*plain, None, pos, C)
    check(torch.ops.ttt.chunk_scan_backward.default, (v.detach(), *plain, pos, C, 1.0, "raise", kept))
    plain = [x.detach() for x in (h, t, w0, bias, conv, proj)]
    s = [x.nan_to_num() for x in state()]
    check(torch.ops.ttt.fast_weight_step.default, (*plain, pos, spec(), *s))
