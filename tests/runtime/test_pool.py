"""Pools: slots that are lent, sequences that wait, batches of strangers, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch

import ttt_compiler as ttt
from tests import models, unusual
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.codegen.layout import FACTORED
from ttt_compiler.errors import CacheError, PoolError, PoolFullError


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


def texts(model, count, length=40):
    """Token rows and their logits when read alone by the oracle."""
    tokens = models.ids(count, length, seed=7)
    return tokens, models.oracle(model, tokens)


def read(model, pool, names, tokens):
    with pool.use(*names) as batch:
        return model(**batch.inputs(tokens)).logits


def test_sequences_go_on_where_they_stood_in_any_company(model):
    tokens, expected = texts(model, 3)
    pool = ttt.Pool(model, sequences=3)
    names, at = ["a", "b", "c"], [0, 0, 0]
    for members, size in (([0], 5), ([1, 2], 3), ([2, 0], 6), ([0, 1, 2], 4), ([1], 9), ([2, 1, 0], 5)):
        new = torch.stack([tokens[i, at[i] : at[i] + size] for i in members])
        logits = read(model, pool, [names[i] for i in members], new)
        for row, i in enumerate(members):
            error = relative_error(logits[row], expected[i, at[i] : at[i] + size])
            assert error < SEGMENTATION, (members, i)
            at[i] += size
    assert pool.names == names


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "parked"])
def test_more_sequences_than_slots(model, disk, tmp_path):
    tokens, expected = texts(model, 5)
    room = {"disk": tmp_path} if disk else {"parked_memory": 1 << 20}
    pool = ttt.Pool(model, sequences=2, **room)
    for start in range(0, 40, 10):
        for i in range(5):
            logits = read(model, pool, [f"s{i}"], tokens[i : i + 1, start : start + 10])
            assert relative_error(logits[0], expected[i, start : start + 10]) < SEGMENTATION
    places = [pool.where(f"s{i}") for i in range(5)]
    assert places == ["disk" if disk else "parked"] * 3 + ["slot"] * 2


def test_a_pool_on_disk_is_found_again(model, tmp_path):
    tokens, expected = texts(model, 2)
    pool = ttt.Pool(model, sequences=2, disk=tmp_path)
    for i, name in enumerate(("a", "b")):
        read(model, pool, [name], tokens[i : i + 1, :17])
        pool.save(name)
    again = ttt.Pool(model, sequences=1, disk=tmp_path)
    assert again.names == ["a", "b"]
    logits = read(model, again, ["b"], tokens[1:, 17:])
    assert relative_error(logits, expected[1:, 17:]) < SEGMENTATION
    again.close("b")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ttt"]


def test_a_fork_costs_no_matrix_and_goes_its_own_way(model):
    tokens, _ = texts(model, 2)
    pool = ttt.Pool(model, sequences=3)
    read(model, pool, ["a"], tokens[:1, :18])
    held = pool.nbytes
    pool.fork("a", "b")
    assert pool.nbytes < held * 2
    key = pool._root.specs[0].key
    rows = pool._tables.sites[key].rows
    slots = {name: int(rows[pool._sequences[name].row, 4]) for name in ("a", "b")}
    assert slots["a"] == slots["b"], "a fork reads its parent's matrix"
    for name, row in (("b", 1), ("a", 0)):
        whole = torch.cat([tokens[:1, :18], tokens[row : row + 1, 18:]], 1)
        logits = read(model, pool, [name], tokens[row : row + 1, 18:])
        assert relative_error(logits, models.oracle(model, whole)[:, 18:]) < SEGMENTATION
    with pytest.raises(PoolError, match="exists already"):
        pool.fork("a", "b")


def test_no_graph_is_compiled_again_when_members_change(compiles):
    model = models.converted()
    model.compile(backend="inplace_ttt", fullgraph=True, dynamic=True)
    tokens, _ = texts(model, 4)
    pool = ttt.Pool(model, sequences=4)
    for names in (["a", "b"], ["c", "d"], ["a", "d"]):
        read(model, pool, names, tokens[:2, : 7 + 2 * (names != ["a", "d"])])
    before = compiles.count
    for names in (["d", "c"], ["b", "c"], ["b", "a"]):
        read(model, pool, names, tokens[:2, :5])
    assert compiles.count == before


def test_two_threads_take_turns_on_one_sequence_and_share_the_pool(model):
    tokens, expected = texts(model, 2)
    pool, errors = ttt.Pool(model, sequences=2), []

    def run(name, row):
        try:
            for start in range(0, 40, 4):
                with pool.use(name, wait=None) as batch:
                    part = tokens[row : row + 1, start : start + 4]
                    logits = model(part, past_key_values=batch.cache).logits
                    error = relative_error(logits, expected[row : row + 1, start : start + 4])
                    assert error < SEGMENTATION
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(n, i)) for i, n in enumerate("ab")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_models_without_a_cache():
    torch.manual_seed(0)
    net = ttt.convert(unusual.Stack(unusual.MLP()), unusual.CONFIG, example_inputs=((unusual.inputs(),), {}))
    models.randomize(net)
    net.compile(backend="inplace_ttt_eager")
    pool = ttt.Pool(net, sequences=2)
    x = unusual.inputs()
    alone = ttt.Session(net, batch_size=2)
    with torch.no_grad():
        expected = net(x, ttt_state=alone.state)
        for row, name in enumerate(("a", "b")):
            with pool.use(name) as one:
                y = net(x[row : row + 1], ttt_state=one.state)
            assert relative_error(y, expected[row : row + 1]) < SEGMENTATION


def test_factored_rows_are_shared_and_parked_too(model, tmp_path):
    small = models.converted(chunk_size=2)
    small.compile(backend="inplace_ttt_eager", dynamic=True)
    tokens, expected = texts(small, 2, 12)
    pool = ttt.Pool(small, sequences=2, disk=tmp_path)
    read(small, pool, ["a", "b"], tokens[:, :9])
    key = pool._root.specs[0].key
    assert pool._tables.column(key, FACTORED) == [8, 8]
    read(small, pool, ["c"], tokens[:1, :3])
    assert pool.where("a") == "disk"
    logits = read(small, pool, ["a", "b"], tokens[:, 9:])
    assert relative_error(logits, expected[:, 9:]) < SEGMENTATION


class TestRefusals:
    def test_arguments(self, model):
        with pytest.raises(PoolError, match="either sequences= or memory="):
            ttt.Pool(model)
        with pytest.raises(PoolError, match="at least 1"):
            ttt.Pool(model, sequences=0)
        with pytest.raises(PoolError, match="one sequence takes"):
            ttt.Pool(model, memory=1000)

    def test_a_budget_is_turned_into_slots(self, model):
        one = ttt.Pool(model, sequences=1, context=64)
        pool = ttt.Pool(model, memory=one.bytes_per_sequence * 3 + 5, context=64)
        assert pool.capacity == 3
        tokens, _ = texts(model, 3, 60)
        read(model, pool, ["a", "b", "c"], tokens)
        assert pool.nbytes <= 3 * one.bytes_per_sequence

    def test_a_context_beyond_the_plan(self, model):
        pool = ttt.Pool(model, sequences=1, context=16)
        tokens, expected = texts(model, 1)
        read(model, pool, ["a"], tokens[:, :10])
        with pytest.raises(PoolError, match="16 per sequence"):
            read(model, pool, ["a"], tokens[:, 10:20])
        logits = read(model, pool, ["a"], tokens[:, 10:16])
        assert relative_error(logits, expected[:, 10:16]) < SEGMENTATION, "a refused call changed nothing"

    def test_no_slot_and_nowhere_to_wait(self, model):
        pool = ttt.Pool(model, sequences=1)
        tokens, _ = texts(model, 1)
        read(model, pool, ["a"], tokens[:, :5])
        with pytest.raises(PoolFullError, match="disk="):
            read(model, pool, ["b"], tokens[:, :5])
        assert pool.names == ["a"]
        with pytest.raises(PoolFullError, match="does not fit a pool of 1"):
            read(model, pool, ["a", "b"], tokens[:, :5])
        pool.close("a")
        read(model, pool, ["b"], tokens[:, :5])

    def test_names(self, model):
        pool = ttt.Pool(model, sequences=2)
        for names in ((), ("a", "a"), ("../a",), (".a",), ("a" * 65,)):
            with pytest.raises(PoolError), pool.use(*names):
                pass
        with pytest.raises(PoolError, match="no sequence 'x'"):
            pool.close("x")

    def test_a_lent_sequence(self, model):
        pool = ttt.Pool(model, sequences=2)
        with pool.use("a") as session:
            with pytest.raises(PoolError, match="in use by another block"), pool.use("a"):
                pass
            with pytest.raises(PoolError, match="in use"):
                pool.close("a")
            with pytest.raises(CacheError, match="1 sequences, but the call has 2"):
                model.generate(models.ids(1, 4), past_key_values=session.cache, num_beams=2, max_new_tokens=2)
        with pytest.raises(CacheError, match="taken its slots back"):
            model(models.ids(1, 4), past_key_values=session.cache)

    def test_a_fork_of_a_lent_sequence_leaves_the_pool(self, model):
        tokens, expected = texts(model, 1)
        pool = ttt.Pool(model, sequences=1)
        with pool.use("a") as session:
            model(tokens[:, :9], past_key_values=session.cache)
            fork = session.fork()
        read(model, pool, ["a"], tokens[:, :7])
        logits = model(tokens[:, 9:], past_key_values=fork.cache).logits
        assert relative_error(logits, expected[:, 9:]) < SEGMENTATION

    def test_a_damaged_file(self, model, tmp_path):
        (tmp_path / "a.ttt").write_bytes(b"nothing")
        pool = ttt.Pool(model, sequences=1, disk=tmp_path)
        with pytest.raises(PoolError, match=r"cannot be read back.*pool\.close"), pool.use("a"):
            pass
        assert (tmp_path / "a.ttt").read_bytes() == b"nothing"
