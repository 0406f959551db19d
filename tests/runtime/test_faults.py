"""What went wrong with running sequences once, forced again: each silent or late before it was mended."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.codegen import ops, reference  # noqa: F401
from ttt_compiler.codegen.layout import CLIPPED, FACTORED, SEEN, SKIPPED
from ttt_compiler.errors import CacheError, ConfigError, CropError, PositionError, SnapshotError
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, WriteRule


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


def test_a_call_under_inference_mode_does_not_spoil_later_ones():
    """In a thread of its own: workspaces are kept per thread."""
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    tokens, found = models.ids(1, 40), []

    def run():
        with torch.inference_mode():
            model(tokens, use_cache=False)
            session = ttt.Session(model)
            model(tokens[:, :20], past_key_values=session.cache)
            fork = session.fork()
            model(tokens[:, 20:30], past_key_values=fork.cache)
        model(tokens, use_cache=False).logits.sum().backward()
        with torch.no_grad():
            fork.keep_revocable(5)
            model(tokens[:, 30:], past_key_values=fork.cache)
            found.append(model(tokens[:, 20:], past_key_values=session.cache).logits)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (logits,) = found
    assert relative_error(logits, models.oracle(model, tokens)[:, 20:]) < SEGMENTATION


def test_decay_of_a_narrow_state_is_not_rounded_away():
    """gamma = 0.999 lies closer to 1 than bfloat16 resolves: factored rows would never fade."""
    d, f, chunk, chunks, gamma = 24, 40, 2, 7, 0.999
    spec = SiteSpec("w", d, f, d, chunk, 0.3, "hidden_states", True, 5, "m", rule=WriteRule(decay=gamma))
    w0, conv, proj = torch.randn(d, f) * 0.1, torch.randn(d, 1, 5), torch.randn(d, d) * 0.1
    h, t = torch.randn(4, chunk * chunks, f), torch.randn(4, chunk * chunks, d)
    small = [x.bfloat16() for x in (h, t, w0, conv, proj)]
    state = FastWeightState.zeros([spec], 4, torch.bfloat16, torch.device("cpu"))
    for i in range(chunks):
        part = slice(i * chunk, (i + 1) * chunk)
        torch.ops.ttt.fast_weight_step(
            *(x[:, part].contiguous() for x in small[:2]), small[2], None, *small[3:], None, spec.encode(),
            *state.sites["w"], state.batch,
        )  # fmt: skip
    assert not any(state.column("w", FACTORED))
    wide = [x.double() for x in small]
    _, exact = reference.chunked(wide[0][0], wide[1][0], *wide[2:], spec.lr, chunk, rule=spec.rule)
    _, never = reference.chunked(wide[0][0], wide[1][0], *wide[2:], spec.lr, chunk)
    delta = state.matrix("w", 0, small[2]).double() - wide[2]
    # Rounding of v is of one size with what such a decay changes in so few chunks; so compare the fading
    # alone: with decay left out the first chunk would weigh 1 instead of gamma ** 6.
    fade = float(((delta - (never - wide[2])) * (exact - never)).sum() / (exact - never).square().sum())
    assert 0.5 < fade < 1.5


def test_a_fork_in_another_thread_keeps_off_what_is_being_copied(model):
    tokens = models.ids(2, 17)
    session = ttt.Session(model)
    with torch.no_grad():
        model(tokens[:1, :10], past_key_values=session.cache)
    fork = session.fork()
    seen = []

    class Watched(weakref.WeakSet):
        def discard(self, item):
            # Whoever leaves has its own tensors by now.
            seen.append({x.data_ptr() for site in item.sites.values() for x in site if x.numel()})
            super().discard(item)

    watched = Watched([session.state, fork.state])
    session.state._sharers = fork.state._sharers = watched
    session.keep_revocable(8)
    theirs = {x.data_ptr() for site in fork.state.sites.values() for x in site if x.numel()}
    assert seen
    assert seen[0].isdisjoint(theirs)


def test_padding_cannot_be_taken_back_as_tokens(model):
    tokens = models.ids(2, 20)
    session = ttt.Session(model, 2)
    mask = torch.ones(2, 13, dtype=torch.int64)
    mask[1, 11:] = 0
    with torch.no_grad():
        model(tokens[:, :10], past_key_values=session.cache)
        model(tokens[:, 10:13], past_key_values=session.cache, attention_mask=mask)
    before = session.tokens_seen
    with pytest.raises(CropError, match="padding in a row"):
        session.cache.crop(-2)
    assert session.tokens_seen == before
    assert session.cache.get_seq_length() == 13


def test_a_document_that_began_cannot_be_taken_back(model):
    tokens = models.ids(1, 20)
    session = ttt.Session(model)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=session.cache)
        model(tokens[:, 6:8], past_key_values=session.cache, position_ids=torch.arange(2)[None])
    with pytest.raises(CropError, match="a document begins"):
        session.cache.crop(-2)
    assert session.tokens_seen == [2]
    session.cache.crop(-1)
    assert session.tokens_seen == [1]


def test_a_document_that_began_first_after_loading_cannot_be_taken_back(model, tmp_path):
    """What the file holds came before the first call that is remembered."""
    tokens = models.ids(1, 20)
    session = ttt.Session(model)
    with torch.no_grad():
        model(tokens[:, :6], past_key_values=session.cache)
        session.save(tmp_path / "s.ttt")
        loaded = ttt.Session.load(model, tmp_path / "s.ttt")
        model(tokens[:, 6:8], past_key_values=loaded.cache, position_ids=torch.arange(2)[None])
    with pytest.raises(CropError, match="a document begins"):
        loaded.cache.crop(-2)
    assert (loaded.tokens_seen, loaded.cache.get_seq_length()) == ([2], 8)


def test_everything_may_be_taken_back_and_read_again(model):
    tokens = models.ids(1, 12)
    session = ttt.Session(model, revocable=16)
    with torch.no_grad():
        model(tokens, past_key_values=session.cache, position_ids=torch.arange(12)[None])
        session.cache.crop(-12)
        assert session.tokens_seen == [0]
        logits = model(tokens, past_key_values=session.cache).logits
    assert relative_error(logits, models.oracle(model, tokens)) < SEGMENTATION


def test_what_was_evicted_bounds_what_may_be_taken_back(model):
    tokens = models.ids(1, 20)
    session = ttt.Session(model, revocable=16)
    with torch.no_grad():
        model(tokens, past_key_values=session.cache)
    session.evict(keep=4, sink=1)
    with pytest.raises(CropError, match="evicted"):
        session.cache.crop(-5)
    assert session.cache.get_seq_length() == 5
    session.cache.crop(-4)
    assert session.cache.get_seq_length() == 1


def test_recording_ends_with_generate(model):
    tokens = models.ids(1, 60)
    session = ttt.Session(model)
    model.generate(
        tokens[:, :13],
        past_key_values=session.cache,
        prompt_lookup_num_tokens=3,
        max_new_tokens=5,
        do_sample=False,
    )
    kept = session.state.revocable
    with torch.no_grad():
        for start in range(0, 60, 20):
            model(tokens[:, start : start + 20], past_key_values=session.cache)
    assert session.state.revocable == kept
    assert min(session.state.chunks_written.values()) > [5]


@pytest.mark.parametrize(
    ("bounds", "rows"),
    [([0, 8, 16, 32], 2), ([8, 16], 1), ([0, 5, 3, 16], 1), ([0, 9], 1), ([16], 1), ([[0, 16]], 1)],
)
def test_boundaries_that_do_not_fit(model, bounds, rows):
    with pytest.raises(PositionError, match="boundaries of documents"):
        model(models.ids(rows, 16), use_cache=False, ttt_cu_seqlens=torch.tensor(bounds))


def test_rows_chosen_by_a_mask(model):
    tokens = models.ids(3, 30)
    session = ttt.Session(model, 3)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=session.cache)
        session.cache.batch_select_indices(torch.tensor([True, False, True]))
        assert session.batch_size == 2
        logits = model(tokens[[0, 2], 20:], past_key_values=session.cache).logits
    assert relative_error(logits, models.oracle(model, tokens)[[0, 2], 20:]) < SEGMENTATION


def test_saving_and_forking_wait_for_a_call(model, tmp_path):
    """Saved while another thread is inside of a call: the file and the fork stand between two calls."""
    tokens = models.ids(1, 20)
    session, inside, go_on = ttt.Session(model), threading.Event(), threading.Event()
    with torch.no_grad():
        model(tokens[:, :10], past_key_values=session.cache)

    def pause(*_):
        inside.set()
        go_on.wait(30)

    def call():
        with torch.no_grad():
            model(tokens[:, 10:17], past_key_values=session.cache)

    handle = model.model.layers[1].register_forward_pre_hook(pause)
    caller = threading.Thread(target=call)
    forks = []
    workers = [
        threading.Thread(target=session.save, args=(tmp_path / "s.ttt",)),
        threading.Thread(target=lambda: forks.append(session.fork())),
        threading.Thread(target=lambda: forks.append(session.describe())),
    ]
    try:
        caller.start()
        assert inside.wait(300)
        for worker in workers:
            worker.start()
            worker.join(0.2)
            # A second thread is kept out while the first one is inside.
            assert worker.is_alive()
    finally:
        go_on.set()
        handle.remove()
        for thread in (caller, *workers):
            thread.join()
    loaded = ttt.Session.load(model, tmp_path / "s.ttt")
    for other in (loaded, next(f for f in forks if isinstance(f, ttt.Session))):
        columns = {tuple(other.state.column(s.key, 0)) for s in other.state.specs}
        assert columns == {(17,)}
        with torch.no_grad():
            logits = model(tokens[:, 17:], past_key_values=other.cache).logits
        assert relative_error(logits, models.oracle(model, tokens)[:, 17:]) < SEGMENTATION


def test_a_small_file_cannot_ask_for_all_memory(model, tmp_path, monkeypatch):
    from ttt_compiler.runtime import snapshot

    ttt.Session(model, revocable=1 << 20).save(tmp_path / "s.ttt")
    monkeypatch.setattr(snapshot, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(SnapshotError, match="1048576 revocable tokens need"):
        ttt.Session.load(model, tmp_path / "s.ttt")


@pytest.mark.parametrize(
    "given", [{"revocable": -3}, {"revocable": (1 << 20) + 1}, {"batch_size": 0}, {"batch_size": "2"}]
)
def test_numbers_of_a_session(model, given):
    with pytest.raises(ConfigError):
        ttt.Session(model, **given)


def test_a_session_is_loaded_into_an_empty_cache_only(model, tmp_path):
    session = ttt.Session(model)
    with torch.no_grad():
        model(models.ids(1, 9), past_key_values=session.cache)
    session.save(tmp_path / "s.ttt")
    for cache in (session.cache, ttt.Session(model).cache, object()):
        with pytest.raises(CacheError, match="empty"):
            ttt.Session.load(model, tmp_path / "s.ttt", cache=cache)
    assert session.tokens_seen == [9]


@pytest.mark.parametrize("name", ["", "a\0b", "/", "/dev/full"])
def test_what_is_no_file_is_not_written(model, name):
    with pytest.raises(SnapshotError, match=r"cannot be written: (no name|a folder)"):
        ttt.Session(model).save(name)


@pytest.mark.parametrize("column", [SKIPPED, CLIPPED, SEEN])
def test_counters_that_contradict_each_other(model, tmp_path, column):
    from ttt_compiler.runtime.files import read_tensors, write_tensors

    session = ttt.Session(model)
    with torch.no_grad():
        model(models.ids(1, 9), past_key_values=session.cache)
    session.save(tmp_path / "s.ttt")
    tensors, header = read_tensors(tmp_path / "s.ttt", SnapshotError)
    name = next(n for n in tensors if n.endswith(".rows"))
    tensors[name] = tensors[name].clone()
    tensors[name][column] = 1 << 62
    write_tensors(tmp_path / "s.ttt", tensors, header, SnapshotError)
    with pytest.raises(SnapshotError, match="contradict each other"):
        ttt.Session.load(model, tmp_path / "s.ttt")
