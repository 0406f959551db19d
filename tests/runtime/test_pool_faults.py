"""Pools when something goes wrong: refusals, errors half-way, other threads at the worst moment."""

from __future__ import annotations

import threading

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.runtime.test_pool import read, texts
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.errors import CacheError


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
    vacate, lock, ran = pool._vacate, pool._root.lock._lock, []
    with pool.use("fork") as fork:

        def write_a_chunk():
            if lock.acquire(blocking=False):
                ran.append(model(**fork.inputs(tokens[1:, 11:12])))
                lock.release()

        def vacate_and_let_others_run(sequence):
            vacate(sequence)
            in_another_thread(write_a_chunk)

        monkeypatch.setattr(pool, "_vacate", vacate_and_let_others_run)
        read(model, pool, ["new"], tokens[:1, :2])
        monkeypatch.undo()
    assert pool.where("parked") == "parked"
    assert_goes_on(model, pool, "parked", tokens[:1], 10)
    assert_goes_on(model, pool, "fork", tokens[1:], 12 if ran else 11)
