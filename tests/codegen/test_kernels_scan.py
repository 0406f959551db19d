"""The scan kernel, interpreted, against its naive reference in fp64: every mask, every flag."""

from __future__ import annotations

import pytest
import torch

from tests.tolerances import assert_within_budget, relative_error
from ttt_compiler.codegen.kernels.chunk_scan import Carried, chunk_scan_partial, naive_chunk_scan
from ttt_compiler.codegen.kernels.chunk_table import chunk_table
from ttt_compiler.codegen.kernels.tiles import Tile
from ttt_compiler.offline import interpreter

# With the number of programs that share the columns of W.
TILES = [
    (Tile(16, 16, 32, 4, 1), 2),
    (Tile(32, 16, 16, 4, 1), 2),
    (Tile(16, 64, 64, 4, 1), 1),
    (Tile(16, 16, 16, 4, 1), 1),
]
PACKED = torch.stack(
    [
        torch.cat([torch.full((3,), -1), torch.arange(20), torch.arange(14)]),
        torch.cat([torch.arange(30), torch.full((7,), -1)]),
    ]
)
# Rows that go on from a state: one document only, and a second one that starts in the call.
CONTINUED = torch.stack([torch.arange(37) + 5, torch.cat([torch.arange(20) + 4, torch.arange(17)])])


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    interpreter.install()


def operands(batch, length, inner, outer, dtype, *, shared, base, transposed):
    q = torch.randn(batch, length, inner).to(dtype)
    k = q if shared else torch.randn(batch, length, inner).to(dtype)
    v = (0.1 * torch.randn(batch, length, outer)).to(dtype)
    w0 = torch.randn(inner, outer).t() if transposed else torch.randn(outer, inner)
    return q, k, v, w0.to(dtype) if base else None


def check(
    sizes=(2, 37, 50, 23),
    chunk=8,
    tile=TILES[0],
    dtype=torch.float32,
    pos=None,
    shared=True,
    base=True,
    transposed=False,
    carried=False,
    **kwargs,
):
    q, k, v, w0 = operands(*sizes, dtype, shared=shared, base=base, transposed=transposed)
    table = None if pos is None else chunk_table(pos, chunk)
    groups = min(tile[1], tile[0].group_choices(sizes[2])[-1])
    states = {}
    for wide in (torch.float32, dtype, torch.float64):
        before = torch.randn(4, sizes[3], sizes[2], generator=torch.Generator().manual_seed(1)).to(wide)
        slots = torch.tensor([-1, 2], dtype=torch.int32)
        after = torch.zeros_like(before)
        # The first row starts from the base, the second leaves nothing behind.
        states[wide] = (
            {"init": Carried(before, slots), "final": Carried(after, slots.flip(0) + (slots.flip(0) > 0))}
            if carried
            else {}
        )
    ours = chunk_scan_partial(
        q, k, v, w0, table, chunk, tile[0], groups, **states[torch.float32], **kwargs
    ).sum(0)

    def naive(to):
        given = [None if x is None else x.to(to) for x in (q, k, v, w0)]
        return naive_chunk_scan(*given, table, chunk, **states[to], **kwargs)

    plain, exact = naive(dtype), naive(torch.float64)
    assert ours.isfinite().all()
    assert_within_budget(ours.to(dtype), plain, exact)
    if carried:
        got, want = (states[d]["final"].states for d in (torch.float32, torch.float64))
        assert relative_error(got, want) < 1e-6
        assert bool(got[3].any())
        assert not bool(got[2].any())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_dtypes_and_tiles(tile, dtype, reverse):
    check(tile=tile, dtype=dtype, reverse=reverse, base=not reverse)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 7, 5, 3), (1, 64, 32, 16), (3, 41, 97, 53), (1, 40, 129, 17)]
)
@pytest.mark.parametrize("chunk", [1, 5, 16, 40, 100])
def test_every_mask(sizes, chunk):
    check(sizes, chunk)
    check(sizes, chunk, shared=False, base=False, reverse=True)


@pytest.mark.parametrize("pos", [PACKED, PACKED[:1], CONTINUED, CONTINUED[1:]])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_documents_and_padding(pos, reverse, decay):
    check(pos=pos, reverse=reverse, decay=decay, base=not reverse, shared=False)


@pytest.mark.parametrize("pos", [None, CONTINUED, CONTINUED[:1]])
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("tile", TILES[:2])
def test_states_come_in_and_go_out(pos, decay, tile):
    check(pos=pos, decay=decay, carried=True, tile=tile)


def test_a_transposed_base():
    check(transposed=True)
    check(transposed=True, shared=False, decay=0.5)


def test_what_is_not_written_cannot_harm():
    """NaN in an incomplete chunk stays in its own rows: neither a later document nor a state sees it."""
    q, _, v, w0 = operands(1, 30, 40, 18, torch.float32, shared=True, base=True, transposed=False)
    pos = torch.cat([torch.arange(10), torch.arange(20)])[None]
    q[0, 9] = float("nan")
    final = Carried(torch.zeros(1, 18, 40), torch.zeros(1, dtype=torch.int32))
    y = chunk_scan_partial(q, q, v, w0, chunk_table(pos, 8), 8, *TILES[0], final=final).sum(0)
    assert y[0, 9].isnan().all()
    assert y[0, :9].isfinite().all()
    assert y[0, 10:].isfinite().all()
    assert final.states.isfinite().all()


def test_rows_do_not_touch_each_other():
    q, _, v, w0 = operands(3, 33, 40, 24, torch.float32, shared=True, base=True, transposed=False)
    together = chunk_scan_partial(q, q, v, w0, None, 8, *TILES[1])
    for b in range(3):
        # The number of groups depends on the batch: sums have another order.
        alone = chunk_scan_partial(q[b : b + 1], q[b : b + 1], v[b : b + 1], w0, None, 8, *TILES[1])
        assert relative_error(together.sum(0)[b], alone.sum(0)[0]) < 1e-6
    q[1:] = 7e8
    assert torch.equal(chunk_scan_partial(q, q, v, w0, None, 8, *TILES[1])[:, 0], together[:, 0])


def test_strides_beyond_int32_are_kept():
    """Rows of a batch lie more than 2^31 elements apart: offsets are 64 bits wide."""
    length, inner = 20, 48
    storage = torch.UntypedStorage(4 * (2**31 + 4096))  # never touched between the two rows
    far = torch.empty(0).set_(storage, 0, (2, length, inner), (2**31, inner, 1))
    far[0], far[1] = torch.randn(length, inner), torch.randn(length, inner)
    v, w0 = torch.randn(2, length, 8), torch.randn(8, inner)
    y = chunk_scan_partial(far, far, v, w0, None, 8, *TILES[0]).sum(0)
    near = far.clone(memory_format=torch.contiguous_format)
    assert torch.equal(y, chunk_scan_partial(near, near, v, w0, None, 8, *TILES[0]).sum(0))


def test_the_table_of_chunks():
    starts, kinds = chunk_table(PACKED[:1], 8)[0].tolist()
    n = starts[-1]
    assert starts[: n + 1] == [0, 3, 11, 19, 23, 31, 37]
    assert kinds[: n + 1] == [2, 1, 0, 0, 1, 0, 1]
    assert chunk_table(torch.zeros(2, 1, dtype=torch.int64), 4).shape == (2, 2, 3)


def test_a_program_without_a_tile_is_refused():
    q, _, v, w0 = operands(1, 8, 20, 18, torch.float32, shared=True, base=True, transposed=False)
    with pytest.raises(ValueError, match="3 programs cannot share 2 tiles"):
        chunk_scan_partial(q, q, v, w0, None, 8, Tile(16, 16, 16, 4, 1), 3)


def test_groups():
    tile = Tile(16, 16, 32, 4, 1)
    assert tile.group_choices(32) == [1]
    assert tile.group_choices(160) == [1, 2, 3, 4, 5]
    assert tile.group_choices(320) == [1, 2, 3, 4, 6, 8]
    assert tile.groups(16, 320, 5) == 6
    assert tile.groups(160, 320, 3) == 1
    assert tile.groups(16, 320, 1000) == 8
