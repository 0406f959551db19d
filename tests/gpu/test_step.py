"""A running site on a device, one call after another, against the CPU's: where programs run at once.

The interpreter runs them one by one, so rows that share slots and lanes are what only a device can show.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.codegen.test_step import KEY, RULES, expected, feed, fresh
from tests.tolerances import SEGMENTATION, assert_within_budget, relative_error
from ttt_compiler.codegen import ops  # noqa: F401
from ttt_compiler.codegen.layout import CLIPPED, DONE, FACTORED, SEEN, SKIPPED, WRITES
from ttt_compiler.runtime.rows import export_row
from ttt_compiler.spec import SiteSpec

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0",
    reason="needs a CUDA device and TRITON_INTERPRET=0",
)
COUNTED = [SEEN, DONE, WRITES, SKIPPED, CLIPPED]
SMALL, WIDE = (24, 40, 3), (256, 768, 16)


def site(sizes, rule="official"):
    d, f, chunk = sizes
    return SiteSpec(KEY, d, f, d, chunk, 0.02, "hidden_states", True, 5, "site", rule=RULES[rule])


def operands(one, batch, length, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    d, f = one.d_model, one.d_ff
    shapes = ((batch, length, f), (batch, length, d), (d, f), (d, 1, 5), (d, d), (d,))
    scales = (1, 1, 1, 1, d**-0.5, 1)
    return [(torch.randn(s, generator=g) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)]


def same(ours, theirs, w0):
    a, b = ours.sites[KEY], theirs.sites[KEY]
    assert torch.equal(a.rows.cpu()[:, COUNTED], b.rows[:, COUNTED])
    assert relative_error(a.norms.cpu(), b.norms) < SEGMENTATION
    for row in range(ours.batch_size):
        mine = ours.matrix(KEY, row, w0.cuda()).cpu()
        assert relative_error(mine, theirs.matrix(KEY, row, w0)) < SEGMENTATION
        x, y = export_row(ours, KEY, row), export_row(theirs, KEY, row)
        assert torch.equal(x["tail_h"].cpu(), y["tail_h"])
        assert torch.equal(x["tail_t"].cpu(), y["tail_t"])


@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("revocable", [0, 7])
def test_histories(sizes, rule, revocable):
    """Single tokens, parts and many chunks; documents, padding, forks and permutations."""
    one, batch = site(sizes, rule), 3
    states = [fresh(one, batch, torch.float32, d, revocable=revocable) for d in ("cuda", "cpu")]
    g = torch.Generator().manual_seed(7)
    weights = operands(one, batch, 1, seed=99)[2:]
    for call, length in enumerate([1] * 9 + [one.chunk + 1, 1, 1, 5 * one.chunk + 2] + [1] * 8):
        args = [*operands(one, batch, length, seed=call)[:2], *weights]
        draw = torch.rand(batch, length, generator=g)
        pos = torch.full((batch, length), 3).masked_fill(draw < 0.1, -1)
        pos = pos.masked_fill(draw > (0.98 if length > 1 else 0.95), 0) if call > 3 else None
        y, want = (feed(s, one, args, 0, length, pos) for s in states)
        assert relative_error(y.cpu(), want) < SEGMENTATION, call
        if call % 4 == 3:
            order = torch.randint(0, batch, (batch,), generator=g)
            for state in states:
                state.select(order.to(state.batch.device))
    same(*states, weights[0])


@pytest.mark.parametrize("rule", ["official", "decay"])
@pytest.mark.parametrize("revocable", [0, 20])
def test_sixteen_rows_share_and_part(rule, revocable):
    """Forks of factored rows and of matrices, at every token: any run must leave the bits of the first."""
    one, batch, length = site(WIDE, rule), 16, 260
    args = operands(one, batch, length)
    g = torch.Generator().manual_seed(5)
    orders = [torch.randint(0, batch, (batch,), generator=g) for _ in range(length)]
    # Rows stand at different places of their chunks.
    pos = torch.where(torch.rand(batch, length, generator=g) < 0.2, -1, 5)

    def history(device):
        state, out = fresh(one, batch, torch.float32, device, revocable=revocable), []
        for i in range(length):
            out.append(feed(state, one, args, i, i + 1, pos))
            if i % 5 == 4:
                state.select(orders[i].to(device))
        return state, torch.cat(out, 1)

    args = [x.cuda() for x in args]
    pos = pos.cuda()
    (first, y), *others = (history("cuda") for _ in range(8))
    args, pos = [x.cpu() for x in args], pos.cpu()
    state, want = history("cpu")
    assert max(state.column(KEY, WRITES)) > 3
    assert relative_error(y.cpu(), want) < SEGMENTATION
    same(first, state, args[2])
    for other, again in others:
        assert torch.equal(y, again)
        assert torch.equal(first.sites[KEY].rows, other.sites[KEY].rows)
        assert torch.equal(first.sites[KEY].w.nan_to_num(), other.sites[KEY].w.nan_to_num())


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_forks_of_factored_rows_decay_in_any_order(order):
    one = site((256, 768, 2), "decay")
    states = [fresh(one, 3, torch.float32, d) for d in ("cuda", "cpu")]
    outs = []
    first = operands(one, 3, 2, seed=1)
    args = [*operands(one, 3, 6, seed=2)[:2], *first[2:]]
    for state in states:
        for i in range(2):
            feed(state, one, first, i, i + 1)
        assert state.column(KEY, FACTORED)[0] > 0
        state.select(torch.tensor([0, 0, 0], device=state.batch.device))
        state.batch = torch.tensor(order, device=state.batch.device)
        outs.append(torch.cat([feed(state, one, args, i, i + 1) for i in range(6)], 1))
        state.batch = torch.arange(3, device=state.batch.device)
    assert relative_error(outs[0].cpu(), outs[1]) < SEGMENTATION
    same(*states, args[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1] * 60, [37, 1, 1, 21]])
@pytest.mark.parametrize("batch", [1, 3])
def test_error_budget(dtype, lengths, batch):
    one = site(WIDE)
    args = operands(one, batch, 60, dtype)
    state, out, start = fresh(one, batch, dtype, "cuda"), [], 0
    for size in lengths:
        out.append(feed(state, one, args, start, start + size))
        start += size
    exact = expected(one, [a.double() for a in args])
    assert_within_budget(torch.cat(out, 1).cpu(), expected(one, args), exact)


@pytest.mark.parametrize("rule", ["official", "everything"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_recorded_step_goes_on_through_chunks(rule, batch):
    """One CUDA graph of a call of one token, replayed across borders of chunks, is the calls themselves."""
    one = site(WIDE, rule)
    args = [x.cuda() for x in operands(one, batch, 60)]
    states = [fresh(one, batch, torch.float32, "cuda") for _ in range(2)]
    weights = args[2:]
    h, t = (x[:, :1].clone() for x in args[:2])
    # What is compiled, is compiled outside of the capture; two rows of tables are then as before.
    kept = [x.clone() for x in states[0].sites[KEY]]
    feed(states[0], one, [h, t, *weights], 0, 1)
    for x, before in zip(states[0].sites[KEY], kept, strict=True):
        x.copy_(before)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = feed(states[0], one, [h, t, *weights], 0, 1)
    for x, before in zip(states[0].sites[KEY], kept, strict=True):
        x.copy_(before)
    for i in range(60):
        h.copy_(args[0][:, i : i + 1])
        t.copy_(args[1][:, i : i + 1])
        graph.replay()
        assert torch.equal(y, feed(states[1], one, args, i, i + 1)), i
    assert states[0].column(KEY, WRITES) == [3] * batch
    for a, b in zip(*(s.sites[KEY] for s in states), strict=True):
        assert torch.equal(a.nan_to_num() if a.is_floating_point() else a, b.nan_to_num())
