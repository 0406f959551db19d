"""Pools when something goes wrong: refusals, errors half-way, other threads at the worst moment."""

from __future__ import annotations

import threading

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.runtime.test_pool import read, texts
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.errors import CacheError, NonFiniteWriteError, PoolError
from ttt_compiler.runtime import join, places


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


def assert_goes_on(model, pool, name, tokens, start):
    """``name`` has read the first ``start`` of ``tokens [1, T]``, and nothing else."""
    logits = read(model, pool, [name], tokens[:, start:])
    assert relative_error(logits, models.oracle(model, tokens)[:, start:]) < SEGMENTATION


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
    vacate = pool._places.vacate
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
    pool._places.vacate = vacate_and_wait
    with pool.use("new"):
        pass
    pool._places.vacate = vacate
    done.wait(30)
    finish.set()
    thread.join()
    assert pool.where("victim") == "parked"
    pool.close("new")
    goes_on(model, pool, "victim", 0, tokens, truth, 10, 20)


def before_it_lends(pool, run, *args):
    """Another thread runs ``run`` when the pool is about to lend."""
    lend = pool._lend

    def late(*given, **kwargs):
        pool._lend = lend
        thread = threading.Thread(target=run, args=args)
        thread.start()
        thread.join()
        return lend(*given, **kwargs)

    pool._lend = late


def test_a_fork_under_a_name_that_another_thread_takes(model, tokens, truth):
    pool = ttt.Pool(model, sequences=3)
    read(model, pool, ["a"], tokens[:1, :9])
    before_it_lends(pool, read, model, pool, ["x"], tokens[1:2, :7])
    with pytest.raises(PoolError, match="'x' exists already"):
        pool.fork("a", "x")
    goes_on(model, pool, "x", 1, tokens, truth, 7, 12)
    goes_on(model, pool, "a", 0, tokens, truth, 9, 12)


def test_a_fork_of_a_sequence_that_another_thread_closes(model, tokens):
    pool = ttt.Pool(model, sequences=3)
    read(model, pool, ["a"], tokens[:1, :9])
    before_it_lends(pool, pool.close, "a")
    with pytest.raises(PoolError, match="no sequence 'a'"):
        pool.fork("a", "x")
    assert pool.names == []


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
        with pytest.raises(CacheError, match="rows of their own, which a pool does not lend"):
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


def test_a_slot_that_cannot_be_filled_is_free_again(model, tokens, monkeypatch, tmp_path):
    pool = ttt.Pool(model, sequences=1, disk=tmp_path)
    read(model, pool, ["a"], tokens[:1, :9])
    read(model, pool, ["b"], tokens[1:2, :9])

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(places, "import_row", fail)
        pool.close("b")
        with pytest.raises(MemoryError):
            read(model, pool, ["a"], tokens[:1, 9:12])
    assert pool.where("a") == "disk"
    assert_goes_on(model, pool, "a", tokens[:1], 9)


def test_reset_of_sequences_of_different_lengths(model, tokens, truth):
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a"], tokens[:1, :15])
    read(model, pool, ["b"], tokens[1:2, :6])
    with pool.use("a", "b") as batch:
        batch.reset()
        logits = model(**batch.inputs(tokens[:2, :20])).logits
    assert relative_error(logits, truth[:2, :20]) < SEGMENTATION
    goes_on(model, pool, "b", 1, tokens, truth, 20, 27)


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
        with (
            pytest.raises(
                PoolError, match=f"'{name}' cannot go on.*slow weights were trained or loaded since"
            ),
            pool.use(name),
        ):
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


def test_slow_weights_that_change_after_a_file_was_read_for_a_fork(tmp_path):
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    tokens, _ = texts(model, 1)
    pool = ttt.Pool(model, sequences=2, disk=tmp_path)
    read(model, pool, ["a"], tokens[:, :18])
    pool.save("a")
    pool = ttt.Pool(model, sequences=2, disk=tmp_path)
    pool.fork("a", "b")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    for name in "ab":
        with pytest.raises(PoolError, match=f"'{name}' cannot go on.*slow weights"), pool.use(name):
            pass


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


def test_a_lost_sequence_makes_room(model, tokens, truth, tmp_path):
    pool = ttt.Pool(model, sequences=1, disk=tmp_path)
    with pool.use("bad") as batch:
        batch.state.lost = "a call failed half-way"
    logits = read(model, pool, ["good"], tokens[:1, :9])
    assert relative_error(logits, truth[:1, :9]) < SEGMENTATION
    with pytest.raises(PoolError, match="'bad' cannot go on: a call failed"):
        read(model, pool, ["bad"], tokens[:1, :2])


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
            pytest.raises(
                PoolError,
                match=f"'{name}' cannot go on: its keys and values could not be moved.*{error.__name__}",
            ),
            pool.use(name),
        ):
            pass
        pool.close(name)
    read(model, pool, ["a", "b"], tokens[:, :9])


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
