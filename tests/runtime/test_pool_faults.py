"""Pools when something goes wrong: refusals, errors half-way, other threads at the worst moment."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.runtime.test_pool import read, texts
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.errors import CacheError, NonFiniteWriteError, PoolError, PoolFullError
from ttt_compiler.runtime import join
from ttt_compiler.runtime.cache_size import cache_bytes
from ttt_compiler.runtime.layers import layer_bytes


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


def in_another_thread(work):
    """Run to its end, so that the order of events is this one."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def assert_goes_on(model, pool, name, tokens, start):
    """``name`` has read the first ``start`` of ``tokens [1, T]``, and nothing else."""
    logits = read(model, pool, [name], tokens[:, start:])
    assert relative_error(logits, models.oracle(model, tokens)[:, start:]) < SEGMENTATION


OPERATIONS = {
    "repeated": lambda cache: cache.reorder_cache(torch.tensor([0, 0])),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "interleaved": lambda cache: cache.batch_repeat_interleave(2),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1])),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refused_operation_on_rows_changes_nothing(model, operation):
    tokens, _ = texts(model, 2)
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a", "b"], tokens[:, :9])
    with pool.use("a", "b") as batch:
        before = [(x.keys.clone(), x.values.clone()) for x in batch.cache.layers]
        with pytest.raises(CacheError, match="a pool does not lend"):
            OPERATIONS[operation](batch.cache)
        batch.cache.reorder_cache(torch.tensor([0, 1]))
        for layer, (keys, values) in zip(batch.cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
    for row, name in enumerate("ab"):
        assert_goes_on(model, pool, name, tokens[row : row + 1], 9)


def test_a_selection_that_keys_and_values_cannot_follow_is_undone(model, monkeypatch):
    tokens = models.ids(2, 12)
    session = ttt.Session(model, batch_size=2)
    model(tokens[:, :9], past_key_values=session.cache)

    def refuse(*_):
        raise NotImplementedError

    monkeypatch.setattr(type(session.cache.layers[0]), "batch_select_indices", refuse)
    with pytest.raises(NotImplementedError):
        session.cache.batch_select_indices(torch.tensor([1]))
    logits = model(tokens[:, 9:], past_key_values=session.cache).logits
    assert relative_error(logits, models.oracle(model, tokens)[:, 9:]) < SEGMENTATION


def test_a_fork_that_runs_meanwhile_does_not_write_into_a_slot_that_is_parked(model, monkeypatch):
    tokens, _ = texts(model, 2)
    pool = ttt.Pool(model, sequences=3, parked_memory=1 << 20)
    read(model, pool, ["a"], tokens[1:, :11])
    pool.fork("a", "fork")
    read(model, pool, ["parked"], tokens[:1, :10])
    with pool.use("a"):
        """Younger now than the one that has to go."""
    vacate, lock, ran = pool._places.vacate, pool._root.lock._lock, []
    with pool.use("fork") as fork:

        def write_a_chunk():
            if lock.acquire(blocking=False):
                ran.append(model(**fork.inputs(tokens[1:, 11:12])))
                lock.release()

        def vacate_and_let_others_run(sequence):
            vacate(sequence)
            in_another_thread(write_a_chunk)

        monkeypatch.setattr(pool._places, "vacate", vacate_and_let_others_run)
        read(model, pool, ["new"], tokens[:1, :2])
        monkeypatch.undo()
    assert pool.where("parked") == "parked"
    assert_goes_on(model, pool, "parked", tokens[:1], 10)
    assert_goes_on(model, pool, "fork", tokens[1:], 12 if ran else 11)


def test_a_fork_does_not_take_the_name_of_a_sequence_that_begins_meanwhile(model, monkeypatch):
    tokens, _ = texts(model, 2)
    pool = ttt.Pool(model, sequences=3)
    read(model, pool, ["a"], tokens[:1, :9])
    lend, began = pool._lend, []

    def begin():
        if pool._changed.acquire(blocking=False):
            pool._changed.release()
            began.append(read(model, pool, ["x"], tokens[1:, :7]))

    def lend_after_others(*args):
        monkeypatch.setattr(pool, "_lend", lend)
        in_another_thread(begin)
        return lend(*args)

    monkeypatch.setattr(pool, "_lend", lend_after_others)
    if began:
        with pytest.raises(PoolError, match="exists already"):
            pool.fork("a", "x")
    else:
        pool.fork("a", "x")
    row, start = (1, 7) if began else (0, 9)
    assert_goes_on(model, pool, "x", tokens[row : row + 1], start)


def test_slow_weights_that_change_end_what_was_written_on_them(tmp_path):
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    tokens, _ = texts(model, 1)
    pool = ttt.Pool(model, sequences=3, disk=tmp_path)
    read(model, pool, ["disk"], tokens[:, :18])
    with pool.use("new"):
        """It reads nothing yet."""
    for name in ("a", "b"):
        read(model, pool, [name], tokens[:, :18])
    assert pool.where("disk") == "disk"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    for name in ("a", "disk"):
        with pytest.raises(PoolError, match=f"'{name}' cannot go on.*slow weights"), pool.use(name):
            pass
    with pytest.raises(PoolError, match=r"'a' cannot be saved.*slow weights"):
        pool.save("a")
    assert_goes_on(model, pool, "new", tokens, 0)
    assert_goes_on(model, pool, "newer", tokens, 0)
    assert pool.where("a") == "lost", "its slot was needed"
    assert [p.name for p in tmp_path.iterdir()] == ["disk.ttt"], (
        "a file would pass for one of the new weights"
    )
    pool.close("a")
    assert_goes_on(model, pool, "a", tokens, 0)


def test_slow_weights_that_change_within_a_block(model):
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    tokens, _ = texts(model, 1)
    pool = ttt.Pool(model, sequences=2)
    with pool.use("a") as session:
        model(**session.inputs(tokens[:, :9]))
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1)
        with pytest.raises(CacheError, match="other slow weights"):
            model(**session.inputs(tokens[:, 9:]))
    with pytest.raises(PoolError, match="'a' cannot go on"), pool.use("a"):
        pass


def lose(model, pool, *names):
    """A call that fails half-way."""
    embeds = torch.zeros(len(names), 7, 32)
    embeds[:, 3] = torch.nan
    read(model, pool, names, models.ids(len(names), 6))
    with pytest.raises(NonFiniteWriteError), pool.use(*names) as batch:
        model(inputs_embeds=embeds, past_key_values=batch.cache)


@pytest.mark.parametrize("disk", [True, False])
def test_a_lost_sequence_is_in_nobodys_way(model, disk, tmp_path):
    tokens, _ = texts(model, 1)
    pool = ttt.Pool(model, sequences=2, disk=tmp_path if disk else None)
    lose(model, pool, "bad", "worse")
    read(model, pool, ["a"], tokens[:, :9])
    read(model, pool, ["b"], tokens[:, :9])
    for name in ("bad", "worse"):
        assert pool.where(name) == "lost"
        with (
            pytest.raises(PoolError, match=r"cannot go on: .*NonFiniteWriteError.*pool\.close"),
            pool.use(name),
        ):
            pass
        with pytest.raises(PoolError, match="cannot be saved" if disk else "no folder"):
            pool.save(name)
    assert pool.where("a") == pool.where("b") == "slot", "the lost ones pushed nobody out"
    pool.close("bad")
    assert_goes_on(model, pool, "a", tokens, 9)
    pool.close("a")
    assert_goes_on(model, pool, "bad", tokens, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_keys_and_values_that_are_not_taken_back_end_their_sequences(model, error, monkeypatch):
    tokens, _ = texts(model, 2)
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a", "b"], tokens[:, :9])

    def fail(*_):
        raise error

    monkeypatch.setattr("ttt_compiler.runtime.pool.split", fail)
    with pytest.raises(error):
        read(model, pool, ["a", "b"], tokens[:, 9:14])
    monkeypatch.undo()
    for name in "ab":
        with (
            pytest.raises(PoolError, match=f"cannot go on: .*not taken back.*{error.__name__}"),
            pool.use(name),
        ):
            pass
        pool.close(name)
    read(model, pool, ["a", "b"], tokens[:, :9])


def test_a_file_of_two_sequences(model, tmp_path):
    tokens, _ = texts(model, 2)
    session = ttt.Session(model, batch_size=2)
    model(tokens[:, :9], past_key_values=session.cache)
    session.save(tmp_path / "two.ttt")
    pool = ttt.Pool(model, sequences=2, disk=tmp_path)
    with pytest.raises(PoolError, match="holds 2 sequences"), pool.use("two"):
        pass
    read(model, pool, ["a", "b"], tokens[:, :9])


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


def test_a_batch_that_cannot_be_joined_leaves_its_members_as_they_were(model, monkeypatch):
    tokens, _ = texts(model, 2)
    pool = ttt.Pool(model, sequences=2)
    for row, (name, length) in enumerate((("a", 9), ("b", 5))):
        read(model, pool, [name], tokens[row : row + 1, :length])
    stacked, calls = join._stacked, []

    def fail_in_the_second_layer(*args):
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError
        return stacked(*args)

    monkeypatch.setattr(join, "_stacked", fail_in_the_second_layer)
    with pytest.raises(MemoryError), pool.use("a", "b"):
        pass
    monkeypatch.undo()
    assert_goes_on(model, pool, "a", tokens[:1], 9)
    assert_goes_on(model, pool, "b", tokens[1:], 5)


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


def test_a_file_of_more_than_the_pools_context(model, tmp_path):
    tokens, _ = texts(model, 1)
    pool = ttt.Pool(model, sequences=1, disk=tmp_path)
    read(model, pool, ["a"], tokens[:, :30])
    pool.save("a")
    with pytest.raises(PoolError, match="context=30"), ttt.Pool(model, 1, context=20, disk=tmp_path).use("a"):
        pass
