"""What a pool may hold: bytes of batches and of those that wait, and files that do not fit it."""

from __future__ import annotations

import weakref

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.runtime.test_pool import read, texts
from ttt_compiler.errors import PoolError, PoolFullError
from ttt_compiler.runtime.cache_size import cache_bytes
from ttt_compiler.runtime.layers import layer_bytes


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


def test_a_budget_is_kept_within_a_block_too(model):
    each = ttt.Pool(model, sequences=1, context=64).bytes_per_sequence
    pool = ttt.Pool(model, memory=3 * each, context=64)
    tokens, _ = texts(model, 3, 64)
    for row, name in enumerate("abc"):
        read(model, pool, [name], tokens[row : row + 1, : 60 - row])
    alone = [weakref.ref(pool._sequences[name].cache.layers[0].keys) for name in "abc"]
    with pool.use("a", "b", "c") as batch:
        assert not any(ref() is not None for ref in alone), "keys of members exist twice"
        model(**batch.inputs(tokens[:, :3]))
        assert pool._tables.nbytes + layer_bytes(batch.cache) == pool.nbytes <= 3 * each
        together = weakref.ref(batch.cache.layers[0].keys)
    assert together() is None
    assert pool.nbytes <= 3 * each


def test_a_batch_holds_its_keys_and_values_once(model):
    tokens, _ = texts(model, 3, 50)
    pool = ttt.Pool(model, sequences=3)
    for i in range(3):
        read(model, pool, [f"s{i}"], tokens[i : i + 1, :50])
    apart = pool.nbytes
    with pool.use("s0", "s1", "s2"):
        assert pool.nbytes == apart
    assert pool.nbytes == apart


def test_memory_of_those_that_wait_counts_keys_and_values(model, tmp_path):
    tokens, _ = texts(model, 1, 400)

    def waiting(pool):
        """Bytes, by counting."""
        found = [s for s in pool._sequences.values() if pool.where(s.name) == "parked"]
        rows = (x.nbytes for s in found for row in s.parked.values() for x in row.values())
        return sum(rows) + sum(layer_bytes(s.cache) for s in found)

    def fill(pool, count=4):
        for i in range(count):
            read(model, pool, [f"s{i}"], tokens)
            assert waiting(pool) <= pool.parked_memory
        return [pool.where(name) for name in pool.names]

    pool = ttt.Pool(model, sequences=1, context=400, parked_memory=1 << 30)
    assert fill(pool, 2) == ["parked", "slot"]
    one = waiting(pool)
    assert one > cache_bytes(model.config, 400, torch.float32)
    places = fill(ttt.Pool(model, sequences=1, context=400, parked_memory=one, disk=tmp_path))
    assert places == ["parked", "disk", "disk", "slot"]
    with pytest.raises(PoolFullError, match="has no room"):
        fill(ttt.Pool(model, sequences=1, context=400, parked_memory=one - 1))


def test_a_file_of_two_sequences(model, tmp_path):
    tokens, _ = texts(model, 2)
    session = ttt.Session(model, batch_size=2)
    model(tokens[:, :9], past_key_values=session.cache)
    session.save(tmp_path / "two.ttt")
    pool = ttt.Pool(model, sequences=2, disk=tmp_path)
    with pytest.raises(PoolError, match="saved with 2 sequences"), pool.use("two"):
        pass
    read(model, pool, ["a", "b"], tokens[:, :9])


def test_a_file_of_more_than_the_pools_context(model, tmp_path):
    tokens, _ = texts(model, 1)
    pool = ttt.Pool(model, sequences=1, disk=tmp_path)
    read(model, pool, ["a"], tokens[:, :30])
    pool.save("a")
    with pytest.raises(PoolError, match="context=30"), ttt.Pool(model, 1, context=20, disk=tmp_path).use("a"):
        pass
