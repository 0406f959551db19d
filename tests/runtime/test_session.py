"""Sessions: fork, reset, evict, save and load, and files that lie."""

from __future__ import annotations

import errno
import pickle
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.runtime import hostile
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.codegen.layout import DONE, LEFT, SEEN, VALUES, WRITES
from ttt_compiler.errors import CacheError, ConfigError, CropError, NotConvertedError, SnapshotError
from ttt_compiler.runtime.files import read_header, read_tensors, write_tensors
from ttt_compiler.runtime.root import require_root
from ttt_compiler.runtime.rows import export_row
from ttt_compiler.runtime.tables import bytes_per_sequence

KEY = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt", dynamic=True)
    return model


def read(model, tokens, session):
    return model(tokens, past_key_values=session.cache).logits


def same(a, b):
    return all(
        torch.equal(x, y)
        for k in a.state.sites
        for row in range(a.batch_size)
        for x, y in zip(*(export_row(s.state, k, row).values() for s in (a, b)), strict=True)
    ) and all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values)
        for x, y in zip(a.cache.layers, b.cache.layers, strict=True)
    )


def test_fork_is_independent_and_reset_starts_over(model):
    tokens = models.ids(2, 23)
    session = ttt.Session(model, batch_size=2)
    first = read(model, tokens[:, :10], session)
    branch = session.fork()
    assert same(session, branch)
    continued = read(model, tokens[:, 10:], session)
    assert branch.tokens_seen == [10, 10]
    assert torch.equal(read(model, tokens[:, 10:], branch), continued)
    session.reset()
    assert session.tokens_seen == [0, 0]
    assert all(d == [0.0, 0.0] for d in session.drift().values())
    assert torch.equal(read(model, tokens[:, :10], session), first)


@pytest.mark.parametrize("rows", [[True, False, True], [-1, 0]], ids=["mask", "from the end"])
def test_rows_are_selected_as_keys_and_values_are(model, rows):
    tokens, kept = models.ids(3, 14), torch.tensor(rows)
    session = ttt.Session(model, batch_size=3)
    read(model, tokens[:, :9], session)
    session.cache.batch_select_indices(kept)
    assert session.batch_size == session.cache.layers[0].keys.shape[0] == 2
    out = read(model, tokens[kept, 9:], session)
    assert relative_error(out, models.oracle(model, tokens[kept])[:, 9:]) < SEGMENTATION


def test_a_fork_that_runs_meanwhile_does_not_write_into_what_is_copied(model):
    tokens = models.ids(1, 10)
    session = ttt.Session(model)
    read(model, tokens, session)
    branch, kept = session.fork(), session.state.matrix(KEY, 0, torch.zeros(32, 80))

    class Sharers(weakref.WeakSet):
        def discard(self, item):
            """The moment from which the other one is alone."""
            super().discard(item)
            if item is session.state:
                branch.state.own()
                branch.state.sites[KEY].w.fill_(7.0)

    session.state._sharers = branch.state._sharers = Sharers([session.state, branch.state])
    session.state.own()
    assert torch.equal(session.state.matrix(KEY, 0, torch.zeros(32, 80)), kept)


def test_keeping_tokens_revocable_waits_for_a_call(model):
    session = ttt.Session(model)
    thread = threading.Thread(target=session.keep_revocable, args=(8,))
    with require_root(model)[1].lock:
        thread.start()
        thread.join(0.2)
        assert session.state.revocable == 0
    thread.join()
    assert session.state.revocable == 8


def test_save_and_load_are_bitwise(model, tmp_path):
    tokens = models.ids(2, 23)
    session = ttt.Session(model, batch_size=2)
    read(model, tokens[:, :10], session)
    session.save(tmp_path / "s.ttt")
    loaded = ttt.Session.load(model, tmp_path / "s.ttt")
    assert same(session, loaded)
    assert loaded.describe() == session.describe()
    assert torch.equal(read(model, tokens[:, 10:], loaded), read(model, tokens[:, 10:], session))
    assert [p.name for p in tmp_path.iterdir()] == ["s.ttt"], "no temporary file is left"


def test_a_session_of_format_version_1_is_read(model):
    """Written by the last commit that wrote it, from the same model and tokens."""
    loaded = ttt.Session.load(model, Path(__file__).parent / "data" / "session_v1.ttt")
    tokens = models.ids(2, 23)
    assert loaded.tokens_seen == [10, 10]
    oracle = models.oracle(model, torch.cat([models.ids(2, 10), tokens], 1))[:, 10:]
    assert relative_error(read(model, tokens, loaded), oracle) < SEGMENTATION


def test_a_session_of_format_version_2_is_read(model, tmp_path):
    """It had a counter fewer per row, the last one."""
    session = ttt.Session(model)
    read(model, models.ids(1, 10), session)
    session.save(tmp_path / "s.ttt")
    tensors, header = read_tensors(tmp_path / "s.ttt", SnapshotError)
    old = {name: x[:8].clone() if name.endswith(".rows") else x for name, x in tensors.items()}
    write_tensors(tmp_path / "s.ttt", old, {**header, "version": 2}, SnapshotError)
    assert same(session, ttt.Session.load(model, tmp_path / "s.ttt"))


def while_writing(model, session, tokens):
    """Reads ``tokens`` one by one, and stops in the middle of a write."""
    for i in range(tokens.shape[1]):
        read(model, tokens[:, i : i + 1], session)
    assert all(site.rows[:, LEFT].all() for site in session.state.sites.values())


@pytest.fixture(scope="module")
def writing_model():
    """Chunks are long enough for a write of several steps."""
    config = ttt.TTTConfig(layers="all", chunk_size=16, lr=1.0)
    model = models.randomize(ttt.convert(models.tiny(), config))
    model.compile(backend="inplace_ttt", dynamic=True)
    return model


@pytest.mark.parametrize("past", [0, 16], ids=["first write", "later write"])
def test_a_write_in_progress_goes_through_files_forks_and_pools_bit_for_bit(writing_model, tmp_path, past):
    model, tokens = writing_model, models.ids(1, past + 40)
    session = ttt.Session(model)
    if past:
        read(model, tokens[:, :past], session)
    while_writing(model, session, tokens[:, past : past + 17])
    session.save(tmp_path / "s.ttt")
    assert read_tensors(tmp_path / "s.ttt", SnapshotError)[1]["version"] == 3
    loaded = ttt.Session.load(model, tmp_path / "s.ttt")
    assert same(session, loaded)
    fork = session.fork()
    pool = ttt.Pool(model, sequences=2, context=64, disk=tmp_path / "pool")
    with pool.use("a") as batch:
        for i in range(past + 17):
            model(**batch.inputs(tokens[:, i : i + 1]))
    pool.fork("a", "b")
    with pool.use("c") as batch:
        model(**batch.inputs(tokens[:, :1]))
    assert "disk" in {pool.where("a"), pool.where("b")}
    rest = [tokens[:, i : i + 1] for i in range(past + 17, past + 40)]
    want = [read(model, x, session) for x in rest]
    for other in (loaded, fork):
        assert all(torch.equal(read(model, x, other), y) for x, y in zip(rest, want, strict=True))
    branches = []
    for name in ("a", "b"):
        with pool.use(name) as batch:
            branches.append(torch.cat([model(**batch.inputs(x)).logits for x in rest], 1))
    assert torch.equal(*branches)
    oracle = models.oracle(model, tokens)[:, past + 17 :]
    for got in (torch.cat(want, 1), branches[0]):
        assert relative_error(got, oracle) < SEGMENTATION
    # A pool with tokens that may be taken back has no room for a write in progress: it is finished first.
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "s.ttt", tmp_path / "other" / "d.ttt")
    other = ttt.Pool(model, sequences=1, context=64, disk=tmp_path / "other", revocable=4)
    with other.use("d") as batch:
        got = [model(**batch.inputs(x)).logits for x in rest]
    assert relative_error(torch.cat(got, 1), oracle) < SEGMENTATION


def test_a_session_that_shall_take_tokens_back_is_saved_while_it_writes(writing_model, tmp_path):
    """As assisted decoding asks for it in the middle of a text."""
    tokens = models.ids(1, 40)
    session = ttt.Session(writing_model)
    while_writing(writing_model, session, tokens[:, :17])
    session.keep_revocable(4)
    session.save(tmp_path / "s.ttt")
    loaded = ttt.Session.load(writing_model, tmp_path / "s.ttt")
    a, b = (read(writing_model, tokens[:, 17:], x) for x in (session, loaded))
    oracle = models.oracle(writing_model, tokens)[:, 17:]
    assert relative_error(a, oracle) < SEGMENTATION
    assert relative_error(b, oracle) < SEGMENTATION


def test_a_pool_keeps_v_from_one_use_to_the_next(writing_model):
    tokens = models.ids(1, 16)
    pool = ttt.Pool(writing_model, sequences=1, context=64)
    for i in range(15):
        with pool.use("a") as batch:
            writing_model(**batch.inputs(tokens[:, i : i + 1]))
            values = [site.rows[0, VALUES].item() for site in batch.state.sites.values()]
    assert values == [6] * len(values)


@pytest.mark.parametrize(
    "change",
    [
        {LEFT: 0},
        {LEFT: 10**9},
        {LEFT: -1},
        {VALUES: 1},
        {WRITES: 0},
        {DONE: 0},
        {SEEN: 16 + 6},
    ],
)
def test_counters_that_no_write_in_progress_has_are_refused(writing_model, tmp_path, change):
    session = ttt.Session(writing_model)
    while_writing(writing_model, session, models.ids(1, 17))
    session.save(tmp_path / "s.ttt")
    tensors, header = read_tensors(tmp_path / "s.ttt", SnapshotError)
    name = next(n for n in tensors if n.endswith(".rows"))
    rows = tensors[name].clone()
    for column, value in change.items():
        rows[column] = value
    write_tensors(tmp_path / "s.ttt", {**tensors, name: rows}, header, SnapshotError)
    with pytest.raises(SnapshotError, match="nothing was changed"):
        ttt.Session.load(writing_model, tmp_path / "s.ttt")


def test_a_first_write_in_progress_does_not_save_what_another_sequence_left(writing_model, tmp_path):
    session = ttt.Session(writing_model)
    read(writing_model, models.ids(1, 40), session)
    session.reset()
    while_writing(writing_model, session, models.ids(1, 17))
    session.save(tmp_path / "s.ttt")
    tensors, _ = read_tensors(tmp_path / "s.ttt", SnapshotError)
    for name, rows in tensors.items():
        if name.endswith(".rows"):
            w = tensors[name.removesuffix("rows") + "w"]
            assert not w[:, -int(rows[LEFT]) :].any()
            assert w.any()


@pytest.mark.parametrize(("method", "bound"), [("bf16", 2**-8), ("int8", 0.02), ("lowrank:4", 0.9)])
def test_a_smaller_file_says_what_it_loses(model, tmp_path, method, bound):
    session = ttt.Session(model)
    read(model, models.ids(1, 41), session)
    session.save(tmp_path / "whole.ttt")
    session.save(tmp_path / "small.ttt", compress=method)
    assert (tmp_path / "small.ttt").stat().st_size < 0.8 * (tmp_path / "whole.ttt").stat().st_size
    said = read_header(tmp_path / "small.ttt", SnapshotError)[0]["compress"]
    loaded = ttt.Session.load(model, tmp_path / "small.ttt")
    assert said["method"] == method
    for spec in session.state.specs:
        w0 = session.weight(spec)
        exact = session.state.matrix(spec.key, 0, w0) - w0
        error = (loaded.state.matrix(spec.key, 0, w0) - w0 - exact).norm() / exact.norm()
        assert 0 < error < bound
        assert abs(said["relative_errors"][f"{spec.key}.0"] - float(error)) < 1e-3 * bound
    assert loaded.tokens_seen == [41]


def test_an_unknown_compression(model, tmp_path):
    with pytest.raises(ConfigError, match="lowrank:r"):
        ttt.Session(model).save(tmp_path / "s.ttt", compress="zip")
    assert not list(tmp_path.iterdir())


def test_an_empty_session_round_trips(model, tmp_path):
    ttt.Session(model).save(tmp_path / "s.ttt")
    loaded = ttt.Session.load(model, tmp_path / "s.ttt")
    assert loaded.tokens_seen == [0]
    tokens = models.ids(1, 9)
    assert relative_error(read(model, tokens, loaded), models.oracle(model, tokens)) < SEGMENTATION


@pytest.mark.parametrize("rows", [[0, 1], [1, 1, 0]], ids=["kept", "selected"])
def test_inference_mode(rows):
    """Sessions of it go on outside of it, and calls of it leave nothing that others cannot write into."""
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    tokens = models.ids(2, 23)
    with torch.inference_mode():
        model(tokens, use_cache=False)
        session = ttt.Session(model, batch_size=2)
        read(model, tokens[:, :10], session)
        branch = session.fork()
        inside = read(model, tokens[:, 10:], branch)
        session.keep_revocable(3)
        session.cache.batch_select_indices(torch.tensor(rows))
        other = ttt.Session(model, batch_size=2)
        other.reset()
    expected = models.oracle(model, tokens)
    assert relative_error(inside, expected[:, 10:]) < SEGMENTATION
    assert relative_error(read(model, tokens[rows, 10:], session), expected[rows, 10:]) < SEGMENTATION
    assert relative_error(read(model, tokens, other), expected) < SEGMENTATION
    model(tokens, use_cache=False).logits.square().mean().backward()


def test_generate_continues_a_session(model):
    tokens = models.ids(1, 11)
    session = ttt.Session(model)
    out = model.generate(tokens, past_key_values=session.cache, max_new_tokens=6, do_sample=False)
    more = model.generate(out, past_key_values=session.cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(more, model.generate(tokens, max_new_tokens=12, do_sample=False))


def test_evict_keeps_fast_weights(model):
    tokens = models.ids(1, 23)
    session = ttt.Session(model)
    read(model, tokens, session)
    before = session.state.clone()
    keys = session.cache.layers[0].keys.clone()
    session.evict(keep=5, sink=2)
    assert session.cache.get_seq_length() == 7
    assert torch.equal(session.cache.layers[0].keys, torch.cat([keys[..., :2, :], keys[..., -5:, :]], -2))
    assert all(torch.equal(session.state.sites[k].w, before.sites[k].w) for k in before.sites)
    assert session.tokens_seen == [23]
    session.evict(keep=100)
    assert session.cache.get_seq_length() == 7
    session.evict(keep=0)
    assert session.cache.get_seq_length() == 0
    with pytest.raises(CacheError, match="at least 0"):
        session.evict(keep=-1)


def test_a_crop_does_not_reach_what_was_evicted(model, tmp_path):
    """It would take the sink for the tokens in front of the window."""
    tokens = models.ids(1, 22)
    session = ttt.Session(model, revocable=8)
    read(model, tokens[:, :20], session)
    session.evict(keep=4, sink=1)
    session.evict(keep=100)
    model(tokens[:, 20:], past_key_values=session.cache, position_ids=torch.tensor([[20, 21]]))
    session.save(tmp_path / "s.ttt")
    loaded = ttt.Session.load(model, tmp_path / "s.ttt")
    for each in (session.fork(), loaded, session):
        with pytest.raises(CropError, match=r"cannot take back 7 tokens: .*evicted"):
            each.cache.crop(-7)
        assert (each.cache.get_seq_length(), each.tokens_seen) == (7, [22])
        if each is not loaded:  # a file does not say where tokens are missing
            each.cache.crop(-6)
            assert (each.cache.get_seq_length(), each.tokens_seen) == (1, [16])


def test_state_bytes_are_known_before_allocation_and_do_not_grow(model):
    """Law 12."""
    session = ttt.Session(model, batch_size=3)
    specs = session.state.specs
    assert session.state.nbytes == 3 * bytes_per_sequence(specs, torch.float32, spread=True)
    before = session.describe()["fast_weight_bytes"]
    read(model, models.ids(3, 40), session)
    assert session.describe()["fast_weight_bytes"] == before
    assert all(min(d) > 0 for d in session.drift().values())


def test_a_session_needs_a_converted_model():
    with pytest.raises(NotConvertedError, match=r"ttt\.convert"):
        ttt.Session(models.tiny())


class TestHostileFiles:
    @pytest.fixture
    def path(self, model, tmp_path):
        session = ttt.Session(model)
        read(model, models.ids(1, 10), session)
        session.save(tmp_path / "s.ttt")
        return tmp_path / "s.ttt"

    @staticmethod
    def edit(path, change):
        """Rewrite the header of a safetensors file, with a checksum that fits."""
        hostile.edit(path, change)

    def meta(self, path, **values):
        hostile.edit_ours(path, **values)

    def test_truncated(self, model, path):
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(SnapshotError, match="cannot be read"):
            ttt.Session.load(model, path)

    def test_missing(self, model, path):
        with pytest.raises(SnapshotError, match="cannot be read"):
            ttt.Session.load(model, path.parent / "nothing.ttt")

    def test_pickle_is_never_executed(self, model, path):
        class Evil:
            def __reduce__(self):
                return (exec, ("raise SystemExit('executed')",))

        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(SnapshotError, match="cannot be read"):
            ttt.Session.load(model, path)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"format": "x"}, "no saved session"),
            ({"version": 99}, "version 99"),
            ({"sites": []}, "another fast-weight configuration"),
            ({"model": "0" * 64}, "other weights"),
            ({"batch_size": 0}, "no positive integer"),
            ({"batch_size": True}, "no positive integer"),
            ({"batch_size": 2}, "missing or contradict"),
            ({"revocable": -1}, "no count of tokens"),
            ({"revocable": 1 << 40}, "no count of tokens"),
        ],
        ids=str,
    )
    def test_header(self, model, path, values, message):
        self.meta(path, **values)
        with pytest.raises(SnapshotError, match=message):
            ttt.Session.load(model, path)

    def test_header_that_is_no_json(self, model, path):
        self.edit(path, lambda h: h["__metadata__"].update(ttt="{"))
        with pytest.raises(SnapshotError, match="no JSON"):
            ttt.Session.load(model, path)

    def test_renamed_and_missing_tensors(self, model, path):
        def rename(header):
            header["cache.0.other"] = header.pop("cache.0.keys")

        self.edit(path, rename)
        with pytest.raises(SnapshotError, match="lacks its keys"):
            ttt.Session.load(model, path)

    @pytest.mark.parametrize("index", ["²", "-1", "7"])
    def test_layers_that_do_not_exist(self, model, path, index):
        def rename(header):
            for part in ("keys", "values"):
                header[f"cache.{index}.{part}"] = header.pop(f"cache.1.{part}")

        self.edit(path, rename)
        with pytest.raises(SnapshotError, match="lacks its keys"):
            ttt.Session.load(model, path)

    def test_nan_in_the_state(self, model, path):
        session = ttt.Session(model)
        read(model, models.ids(1, 10), session)
        next(iter(session.state.sites.values())).w[:] = float("nan")
        session.save(path)
        with pytest.raises(SnapshotError, match="NaN or Inf"):
            ttt.Session.load(model, path)

    def test_wrong_shape(self, model, path):
        def reshape(header):
            entry = next(v for k, v in header.items() if k.endswith("tail_h"))
            entry["shape"] = entry["shape"][::-1]

        self.edit(path, reshape)
        with pytest.raises(SnapshotError, match="expected"):
            ttt.Session.load(model, path)

    def test_contradicting_counters(self, model, path):
        session = ttt.Session(model)
        for site in session.state.sites.values():
            site.rows[:, :3] = torch.tensor([3, 0, 7])
        session.save(path)
        with pytest.raises(SnapshotError, match="contradict"):
            ttt.Session.load(model, path)

    def test_other_weights_and_other_adapter(self, path):
        for change in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.ttt_conv"):
            other = models.converted()
            with torch.no_grad():
                other.get_parameter(change).add_(1)
            with pytest.raises(SnapshotError, match="other weights"):
                ttt.Session.load(other, path)

    def test_a_failed_save_keeps_the_old_file(self, model, path, monkeypatch):
        before = path.read_bytes()
        session = ttt.Session(model)
        monkeypatch.setattr("os.fsync", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
        with pytest.raises(SnapshotError, match=r"disk full.*nothing was changed"):
            session.save(path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["s.ttt"]
