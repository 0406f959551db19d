"""What went wrong in a pool once, forced again: interleavings, refusals half-way, limits."""

from __future__ import annotations

import threading

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.errors import CacheError, PoolError
from ttt_compiler.runtime import pool as pools
from ttt_compiler.runtime.layers import layer_bytes


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


@pytest.fixture(scope="module")
def tokens():
    return models.ids(4, 60, seed=7)


@pytest.fixture(scope="module")
def truth(model, tokens):
    return models.oracle(model, tokens)


def read(model, pool, names, ids):
    with pool.use(*names) as batch:
        return model(**batch.inputs(ids)).logits


def goes_on(model, pool, name, row, tokens, truth, start, stop):
    logits = read(model, pool, [name], tokens[row : row + 1, start:stop])
    assert relative_error(logits[0], truth[row, start:stop]) < SEGMENTATION


def test_a_fork_that_writes_while_another_is_parked(model, tokens, truth):
    """The fork takes a free slot the moment the parked sequence has given its own back."""
    pool = ttt.Pool(model, sequences=3, parked_memory=1 << 24)
    read(model, pool, ["a"], tokens[1:2, :11])
    pool.fork("a", "fork")
    read(model, pool, ["victim"], tokens[:1, :10])
    with pool.use("a"):
        pass  # now "victim" is the one used longest ago
    vacate = pool._vacate
    ready, go, done, finish = (threading.Event() for _ in range(4))

    def other():
        with pool.use("fork") as batch:
            ready.set()
            go.wait(30)
            model(**batch.inputs(tokens[1:2, 11:12]))
            done.set()
            finish.wait(30)

    def vacate_and_wait(sequence):
        vacate(sequence)
        if sequence.name == "victim":
            go.set()
            # The other call cannot run while this lock is held; without it it would, here.
            done.wait(0.5)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(30)
    pool._vacate = vacate_and_wait
    with pool.use("new"):
        pass
    pool._vacate = vacate
    done.wait(30)
    finish.set()
    thread.join()
    assert pool.where("victim") == "parked"
    pool.close("new")
    goes_on(model, pool, "victim", 0, tokens, truth, 10, 20)


def test_changed_slow_weights_are_noticed(tokens):
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a"], tokens[:1, :18])
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(PoolError, match="slow weights were trained or loaded since"):
        read(model, pool, ["a"], tokens[:1, 18:20])
    read(model, pool, ["new"], tokens[:1, :18])


def test_a_refused_operation_leaves_keys_and_values(model, tokens, truth):
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a", "b"], tokens[:2, :9])
    with pool.use("a", "b") as batch:
        for rows in ([0, 0], [1, 0]):
            with pytest.raises(CacheError, match="rows of their own"):
                batch.cache.reorder_cache(torch.tensor(rows))
    with pool.use("a") as batch, pytest.raises(CacheError, match="rows of their own"):
        batch.cache.batch_repeat_interleave(2)
    for row, name in enumerate(("a", "b")):
        goes_on(model, pool, name, row, tokens, truth, 9, 14)


def test_reset_of_sequences_of_different_lengths(model, tokens, truth):
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a"], tokens[:1, :15])
    read(model, pool, ["b"], tokens[1:2, :6])
    with pool.use("a", "b") as batch:
        batch.reset()
        logits = model(**batch.inputs(tokens[:2, :20])).logits
    assert relative_error(logits, truth[:2, :20]) < SEGMENTATION
    goes_on(model, pool, "b", 1, tokens, truth, 20, 27)


def test_a_lost_sequence_makes_room(model, tokens, truth, tmp_path):
    pool = ttt.Pool(model, sequences=1, disk=tmp_path)
    with pool.use("bad") as batch:
        batch.state.lost = "a call failed half-way"
    logits = read(model, pool, ["good"], tokens[:1, :9])
    assert relative_error(logits, truth[:1, :9]) < SEGMENTATION
    with pytest.raises(PoolError, match="'bad' cannot go on: a call failed"):
        read(model, pool, ["bad"], tokens[:1, :2])


def test_keys_and_values_count_as_parked(model, tokens):
    probe = ttt.Pool(model, sequences=1, parked_memory=1 << 24)
    read(model, probe, ["a"], tokens[:1, :50])
    read(model, probe, ["b"], tokens[:1, :2])
    size = probe._parked_bytes()
    assert size > layer_bytes(probe._sequences["a"].cache) > 0
    for memory, fits in ((size, True), (size - 1, False)):
        pool = ttt.Pool(model, sequences=1, parked_memory=memory)
        read(model, pool, ["a"], tokens[:1, :50])
        if fits:
            read(model, pool, ["b"], tokens[:1, :2])
        else:
            with pytest.raises(PoolError, match="has no room for"):
                read(model, pool, ["b"], tokens[:1, :2])


def test_a_batch_holds_its_keys_and_values_once(model, tokens):
    pool = ttt.Pool(model, sequences=3)
    for i in range(3):
        read(model, pool, [f"s{i}"], tokens[i : i + 1, :50])
    apart = pool.nbytes
    with pool.use("s0", "s1", "s2"):
        assert pool.nbytes == apart
    assert pool.nbytes == apart


def test_an_interruption_while_sequences_are_taken_apart(model, tokens, monkeypatch):
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a", "b"], tokens[:2, :9])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pools, "split", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(model, pool, ["a", "b"], tokens[:2, 9:14])
    with pytest.raises(PoolError, match="'a' cannot go on: its keys and values could not be moved"):
        read(model, pool, ["a"], tokens[:1, 14:15])


def test_a_fork_under_a_name_that_another_thread_takes(model, tokens, truth):
    pool = ttt.Pool(model, sequences=3)
    read(model, pool, ["a"], tokens[:1, :9])
    lend = pool._lend

    def late(*args, **kwargs):
        pool._lend = lend
        thread = threading.Thread(target=read, args=(model, pool, ["x"], tokens[1:2, :7]))
        thread.start()
        thread.join()
        return lend(*args, **kwargs)

    pool._lend = late
    with pytest.raises(PoolError, match="'x' exists already"):
        pool.fork("a", "x")
    goes_on(model, pool, "x", 1, tokens, truth, 7, 12)
    goes_on(model, pool, "a", 0, tokens, truth, 9, 12)


def test_a_file_of_several_sequences(model, tokens, tmp_path):
    session = ttt.Session(model, batch_size=2)
    model(tokens[:2, :9], past_key_values=session.cache)
    session.save(tmp_path / "two.ttt")
    pool = ttt.Pool(model, sequences=1, disk=tmp_path)
    with pytest.raises(PoolError, match="saved with 2 sequences"):
        read(model, pool, ["two"], tokens[:1, 9:12])


def test_a_cache_that_cannot_be_joined_loses_nothing(tokens):
    """Refused before anything is moved: both go on alone."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=models.VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = models.randomize(
        ttt.convert(MistralForCausalLM(config).eval(), ttt.TTTConfig(layers="all", chunk_size=4, lr=0.3))
    )
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    pool = ttt.Pool(model, sequences=2)
    first = [read(model, pool, [name], tokens[i : i + 1, :9]) for i, name in enumerate("ab")]
    with pytest.raises(CacheError, match="cannot be cut or joined"):
        read(model, pool, ["a", "b"], tokens[:2, 9:10])
    assert all(x.isfinite().all() for x in first)
    for i, name in enumerate("ab"):
        assert read(model, pool, [name], tokens[i : i + 1, 9:12]).isfinite().all()
