"""What a process that serves for days relies on: nothing leaks, rows and threads do not meet, errors end."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import ttt_compiler as ttt
from tests import models
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.codegen.layout import FACTORED, SKIPPED, WRITES
from ttt_compiler.errors import CacheError, NonFiniteWriteError, SnapshotError
from ttt_compiler.runtime.rows import export_row
from ttt_compiler.runtime.state import FastWeightState

MIB = 1 << 20
# 450 sessions and as many forks hold 24 KiB of fast weights each, together 21 MiB; an allocator's noise is
# a fraction of this.
LEAK = 6 * MIB
# Keys and values of 192k tokens would be 48 MiB, a factored state of as many tokens 168 MiB.
FLAT = 24 * MIB


def compiled(model):
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


@pytest.fixture(scope="module")
def model():
    return compiled(models.converted())


@pytest.fixture(scope="module")
def skipping():
    """Chunks of two tokens: rows of a batch of four go from factored to dense after 16 tokens."""
    return compiled(models.converted(chunk_size=2, on_nonfinite="skip"))


def read(model, session, tokens):
    """Logits of one more piece: token ids, or embeddings ``[B, T, D]``."""
    name = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
    with torch.no_grad():
        return model(**{name: tokens}, past_key_values=session.cache).logits


def exported(session, row=0):
    return {
        (key, name): x.clone()
        for key in session.state.sites
        for name, x in export_row(session.state, key, row).items()
    }


def same(a, b):
    """Bitwise, NaN included."""
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(7.5), b[k].nan_to_num(7.5)) for k in a)


def rss():
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def alive(kind):
    gc.collect()
    return sum(type(x) is kind for x in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_sessions_that_are_dropped_leave_nothing(model):
    tokens = models.ids(1, 7)
    before = alive(FastWeightState), alive(ttt.Session)
    held, start = [], 0
    for i in range(500):
        session = ttt.Session(model)
        read(model, session, tokens[:, :6])
        branch = session.fork()
        read(model, branch, tokens[:, 6:])
        held += [weakref.ref(x) for x in (session, branch, session.state, branch.state, session.cache)]
        del session, branch
        if i == 49:
            start = rss()
    assert rss() - start < LEAK
    assert not any(ref() for ref in held)
    assert (alive(FastWeightState), alive(ttt.Session)) == before


def test_a_failed_call_leaves_nothing_either(model):
    before = alive(FastWeightState)
    for _ in range(3):
        session = ttt.Session(model)
        with pytest.raises(NonFiniteWriteError):
            read(model, session, torch.full((1, 5, 32), torch.nan))
        del session
    assert alive(FastWeightState) == before


PIECES = [5, 1, 1, 6, 1, 4, 1, 3]  # 22 tokens; the 17th makes a row dense


def run_batch(model, pieces):
    """Per piece: logits and every row's exported state."""
    session = ttt.Session(model, batch_size=4)
    out = []
    for piece in pieces:
        logits = read(model, session, piece)
        out.append((logits, [exported(session, row) for row in range(4)]))
    return session, out


def assert_others_equal(first, second, changed=1):
    for step, ((a, rows_a), (b, rows_b)) in enumerate(zip(first, second, strict=True)):
        for row in {0, 1, 2, 3} - {changed}:
            assert torch.equal(a[row], b[row]), (step, row)
            assert same(rows_a[row], rows_b[row]), (step, row)
        assert not same(rows_a[changed], rows_b[changed]), step


def test_a_row_does_not_see_what_others_read(skipping):
    tokens = models.ids(4, 22)
    other = tokens.clone()
    other[1] = models.ids(1, 22, seed=9)[0]
    session, first = run_batch(skipping, tokens.split(PIECES, 1))
    kinds = [{"w" if ("w" in {n for _, n in r}) else "keys" for r in rows} for _, rows in first]
    assert kinds[4] == {"keys"}
    assert kinds[-1] == {"w"}
    assert session.state.column(session.state.specs[0].key, FACTORED) == [0, 0, 0, 0]
    assert_others_equal(first, run_batch(skipping, other.split(PIECES, 1))[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [2, 10, 6, 18], ids=["first", "prefill", "decode", "dense"])
def test_a_row_of_nan_is_nobody_elses(skipping, value, at):
    """Attention spreads it over its own row, back to the start of its piece (0 * NaN under the mask)."""
    clean = skipping.get_input_embeddings()(models.ids(4, 22)).detach()
    bad = clean.clone()
    bad[1, at] = value
    _, first = run_batch(skipping, clean.split(PIECES, 1))
    session, second = run_batch(skipping, bad.split(PIECES, 1))
    begin = next(i for i in range(len(PIECES)) if sum(PIECES[: i + 1]) > at)
    key, good = session.state.specs[-1].key, sum(PIECES[:begin]) // 2
    assert session.state.column(key, SKIPPED) == [0, 11 - good, 0, 0]
    assert session.state.column(key, WRITES) == [11, good, 11, 11]
    assert second[begin][0][1].isnan().any()
    for step in range(begin):
        assert torch.equal(first[step][0], second[step][0])
    assert_others_equal(first[begin:], second[begin:])


def alone(model, number):
    """What one conversation computes: prefill, decode, a longer piece, decode."""
    session = ttt.Session(model)
    tokens = models.ids(1, 34, seed=20 + number)
    logits = [read(model, session, piece) for piece in tokens.split([9, *[1] * 6, 13, *[1] * 6], 1)]
    return torch.cat(logits, 1), exported(session)


def side_by_side(model, count):
    barrier, results, errors = threading.Barrier(count), {}, []

    def work(number):
        try:
            barrier.wait()
            results[number] = alone(model, number)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    return results


@pytest.mark.parametrize("first", [False, True], ids=["warm", "compiling"])
@pytest.mark.parametrize("count", [2, 4])
def test_threads_do_not_meet(count, first):
    """Also when the call that compiles is one of theirs."""
    torch._dynamo.reset()
    expected_by = compiled(models.converted())
    expected = [alone(expected_by, i) for i in range(count)]
    model = compiled(models.converted()) if first else expected_by
    for _ in range(1 if first else 3):
        results = side_by_side(model, count)
        for number, (logits, state) in enumerate(expected):
            assert torch.equal(results[number][0], logits), number
            assert same(results[number][1], state), number


def test_a_call_that_fails_half_way_ends_its_own_session_only(model, tmp_path):
    tokens = models.ids(1, 23)
    embeds = model.get_input_embeddings()(tokens).detach()
    bad = embeds[:, 6:13].clone()
    bad[0, 3, 0] = float("nan")
    session, other = ttt.Session(model), ttt.Session(model)
    first = read(model, session, tokens[:, :6])
    assert torch.equal(read(model, other, tokens[:, :6]), first)
    other.save(tmp_path / "before.ttt")
    with pytest.raises(NonFiniteWriteError, match="would write NaN or Inf"):
        read(model, session, bad)
    for _ in range(2):
        with pytest.raises(CacheError, match=r"can no longer be used.*NonFiniteWriteError.*reset\(\)"):
            read(model, session, tokens[:, 6:])
    with pytest.raises(SnapshotError, match="can no longer be used"):
        session.save(tmp_path / "lost.ttt")
    assert [p.name for p in tmp_path.iterdir()] == ["before.ttt"]
    with pytest.raises(CacheError, match="can no longer be used"):
        read(model, session.fork(), tokens[:, 6:])
    rest = read(model, other, tokens[:, 6:])
    assert other.tokens_seen == [23]
    assert torch.equal(read(model, ttt.Session.load(model, tmp_path / "before.ttt"), tokens[:, 6:]), rest)
    session.reset()
    assert session.tokens_seen == [0]
    assert torch.equal(read(model, session, tokens[:, :6]), first)
    assert torch.equal(read(model, session, tokens[:, 6:]), rest)
    assert same(exported(session), exported(other))


def test_a_refused_call_changes_nothing(model):
    tokens = models.ids(1, 12)
    session, other = ttt.Session(model), ttt.Session(model)
    for s in (session, other):
        read(model, s, tokens[:, :6])
    before = exported(session)
    with pytest.raises(CacheError, match="1 sequences, but the call has 2"):
        read(model, session, models.ids(2, 3))
    assert session.state.lost is None
    assert same(exported(session), before)
    assert session.cache.get_seq_length() == 6
    assert torch.equal(read(model, session, tokens[:, 6:]), read(model, other, tokens[:, 6:]))


LONG, QUARTER = 1 << 18, 1 << 16


def long_model():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=models.VOCAB,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=64,
        max_position_embeddings=LONG,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    options = ttt.TTTConfig(
        layers="all", chunk_size=256, lr=1.0, decay=0.97, normalize_keys="unit", max_write_ratio=0.05
    )
    return compiled(models.randomize(ttt.convert(MistralForCausalLM(config).eval(), options)))


def read_long(model, tokens, piece, decoded):
    """The whole text in pieces, ``decoded`` tokens one by one before every 16k; RSS at every quarter."""
    session, at, sizes = ttt.Session(model), 0, {}
    with torch.no_grad():
        while at < LONG:
            step = 1 if at % (LONG // 16) < decoded else min(piece, LONG // 16 - at % (LONG // 16))
            logits = model(tokens[:, at : at + step], past_key_values=session.cache, logits_to_keep=1).logits
            at += step
            if at % QUARTER == 0:
                sizes[at] = rss()
    return session, logits, sizes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_a_quarter_of_a_million_tokens():
    """Pieces are short because attention inside of one takes memory and time with its square."""
    torch._dynamo.reset()
    model, tokens = long_model(), models.ids(1, LONG)
    session, logits, sizes = read_long(model, tokens, 1024, decoded=4)
    assert max(sizes.values()) - sizes[QUARTER] < FLAT, sizes
    assert session.tokens_seen == [LONG]
    assert session.describe()["cache_bytes"] < MIB
    for s in ttt.stats(session):
        assert (s.chunks, s.written, s.skipped) == (LONG // 256, LONG // 256, 0)
        assert 0.05 < s.drift < 0.05 / (1 - 0.97)
    other, expected, _ = read_long(model, tokens, 640, decoded=3)
    assert relative_error(logits, expected) < SEGMENTATION
    for spec in session.state.specs:
        w0 = session.weight(spec)
        ours, theirs = (s.state.matrix(spec.key, 0, w0) for s in (session, other))
        assert ours.isfinite().all()
        assert relative_error(ours, theirs) < SEGMENTATION
