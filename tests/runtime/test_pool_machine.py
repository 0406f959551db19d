"""A pool under any order of operations, against lists of tokens from which all is computed anew.

What is known of a sequence is the tokens that it has read; its logits follow from those by the reference,
whatever company it had, and wherever it waited in between.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections import Counter
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.fx.experimental import _config as shapes

import ttt_compiler as ttt
from tests import models
from tests.tolerances import FP64, relative_error
from ttt_compiler.errors import CropError, PoolError, PoolFullError
from ttt_compiler.runtime.layers import layer_bytes

NAMES = ("a", "b", "c", "d")
MOST_TOKENS, CONTEXT, REVOCABLE = 9, 40, 5
names = st.sampled_from(NAMES)
groups = st.lists(names, min_size=1, max_size=3, unique=True)


@functools.cache
def model():
    settings = ttt.TTTConfig(layers="all", chunk_size=4, lr=0.3)
    model = models.randomize(ttt.convert(models.tiny(layers=1), settings)).double()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


@functools.lru_cache(maxsize=20000)
def logits(tokens):
    """Of the last :data:`MOST_TOKENS` of them, ``[n, vocabulary]``."""
    with torch.no_grad():
        return models.oracle(model(), torch.tensor([tokens]))[0, -MOST_TOKENS:]


class PoolMachine(RuleBasedStateMachine):
    """One pool, closed and opened again now and then; see the module."""

    # What has happened in the whole run, over all examples.
    met: ClassVar[Counter[str]] = Counter()

    @initialize(
        sequences=st.integers(2, 3),
        parked=st.sampled_from([0, 30_000, 1 << 20]),
        disk=st.sampled_from([True, True, True, False]),
    )
    def begin(self, sequences, parked, disk):
        self.known: dict[str, tuple[int, ...]] = {}
        self.stack = contextlib.ExitStack()
        folder = self.stack.enter_context(tempfile.TemporaryDirectory()) if disk else None
        self.options = {
            "sequences": sequences,
            "parked_memory": parked,
            "disk": folder,
            "revocable": REVOCABLE,
            "context": CONTEXT,
        }
        self.pool = ttt.Pool(model(), **self.options)
        self.token = 0

    def teardown(self):
        if hasattr(self, "stack"):
            self.stack.close()

    @rule(group=groups, size=st.integers(1, MOST_TOKENS))
    def advance_alike(self, group, size):
        self._advance(group, [size] * len(group))

    @rule(group=groups, sizes=st.lists(st.integers(1, MOST_TOKENS), min_size=3, max_size=3))
    def advance(self, group, sizes):
        """Of several sizes, with padding to the right."""
        self._advance(group, sizes[: len(group)])

    @rule(group=groups, steps=st.integers(2, 6))
    def decode(self, group, steps):
        """Token by token within one block."""
        with self._lent(*group) as batch:
            if batch is None or self._cached(batch) + steps > CONTEXT:
                return
            for _ in range(steps):
                new = [self._next(1) for _ in group]
                got = model()(**batch.inputs(torch.tensor(new))).logits
                for row, name in enumerate(group):
                    self.known[name] += tuple(new[row])
                    self._check(got[row], name)
        self._note("decode")

    @rule(group=groups)
    def reset(self, group):
        with self._lent(*group) as batch:
            if batch is None:
                return
            batch.reset()
            self.known |= dict.fromkeys(group, ())
        self._note("reset")

    @precondition(lambda self: self.known)
    @rule(data=st.data(), tokens=st.integers(1, 6))
    def crop(self, data, tokens):
        group = data.draw(st.lists(st.sampled_from(sorted(self.known)), min_size=1, max_size=2, unique=True))
        with self._lent(*group) as batch:
            if batch is None:
                return
            try:
                batch.cache.crop(-tokens)
            except CropError:
                self._note("refused crop")
                return
            for name in group:
                self.known[name] = self.known[name][:-tokens]
        self._note("crop")

    @rule(group=groups, data=st.data())
    def move_rows(self, group, data):
        """Refused, and nothing has changed."""
        with self._lent(*group) as batch:
            if batch is None:
                return
            order = data.draw(
                st.lists(st.integers(0, len(group) - 1), min_size=len(group), max_size=len(group))
            )
            with contextlib.suppress(ttt.errors.CacheError):
                batch.cache.reorder_cache(torch.tensor(order))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), branch=names)
    def fork(self, data, branch):
        name = data.draw(st.sampled_from(sorted(self.known)))
        free = sorted(set(NAMES) - set(self.known))
        if not free:
            with pytest.raises(PoolError, match="exists already"):
                self.pool.fork(name, branch)
            self.close(branch)
            return
        branch = data.draw(st.sampled_from(free))
        try:
            self.pool.fork(name, branch)
        except PoolFullError:
            assert branch not in self.pool
            self._note("no room")
            return
        self.known[branch] = self.known[name]
        self._note("fork")

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def close_one(self, data):
        self.close(data.draw(st.sampled_from(sorted(self.known))))

    @precondition(lambda self: self.options["disk"])
    @rule(sequences=st.integers(2, 3))
    def open_again(self, sequences):
        for name in self.known:
            self.pool.save(name)
        self.options["sequences"] = sequences
        self.pool = ttt.Pool(model(), **self.options)
        self._note("open again")

    # -- what must hold ------------------------------------------------------------------------------------

    @invariant()
    def the_pool_is_what_is_known(self):
        pool = self.pool
        assert pool.names == sorted(self.known)
        places = Counter(pool.where(name) for name in self.known)
        for place, count in places.items():
            self.met[place] += count
        assert places["slot"] <= pool.capacity
        assert places["slot"] + len(pool._places.free) == pool.capacity
        assert places["lost"] == 0
        waiting = [s for s in pool._sequences.values() if s.parked]
        parked = sum(x.nbytes for s in waiting for row in s.parked.values() for x in row.values())
        assert parked + sum(layer_bytes(s.cache) for s in waiting) <= pool.parked_memory
        # Every slot holds no more than what a full sequence takes.
        assert pool.nbytes <= pool.capacity * pool.bytes_per_sequence + pool.parked_memory
        for name, tokens in self.known.items():
            sequence = pool._sequences[name]
            if sequence.row is not None:
                assert pool._tables.tokens_seen[sequence.row] == len(tokens)
            if sequence.cache is not None:
                assert sequence.cache.get_seq_length() == len(tokens)

    # -- helpers -------------------------------------------------------------------------------------------

    def close(self, name):
        self.pool.close(name)
        del self.known[name]
        with pytest.raises(PoolError, match="no sequence"):
            self.pool.close(name)

    def _advance(self, group, sizes):
        with self._lent(*group) as batch:
            if batch is None:
                return
            width = max(sizes)
            if self._cached(batch) + width > CONTEXT:
                with pytest.raises(PoolError, match="per sequence"):
                    model()(**batch.inputs(torch.zeros(len(group), width, dtype=torch.int64)))
                self._note("full context")
                return
            new = [self._next(size) for size in sizes]
            ids = torch.tensor([[*x, *[0] * (width - len(x))] for x in new])
            mask = torch.tensor([[1] * size + [0] * (width - size) for size in sizes])
            got = model()(**batch.inputs(ids, None if mask.all() else mask)).logits
            for row, name in enumerate(group):
                self.known[name] += tuple(new[row])
                self._check(got[row, : sizes[row]], name)
        self._note("together" if len(group) > 1 else "alone")
        if len(set(sizes)) > 1:
            self._note("padded")

    @contextlib.contextmanager
    def _lent(self, *group):
        """None where there is no room, which has to be so."""
        before = self.pool.names
        try:
            block = self.pool.use(*group)
            batch = block.__enter__()
        except PoolFullError:
            assert self.pool.names == before
            options = self.options
            there = len(set(self.known) | set(group))
            assert len(group) > options["sequences"] or (not options["disk"] and there > options["sequences"])
            self._note("no room")
            yield None
            return
        for name in group:
            self.known.setdefault(name, ())
        with contextlib.ExitStack() as stack:
            stack.push(block.__exit__)
            yield batch

    @staticmethod
    def _cached(batch):
        return int(batch.cache.get_seq_length())

    def _next(self, count):
        """Tokens that differ, as far as the vocabulary reaches."""
        self.token += count
        return [(7 * (self.token + i)) % models.VOCAB for i in range(count)]

    def _check(self, got, name):
        wanted = logits(self.known[name])[-len(got) :]
        error = relative_error(got, wanted)
        assert error < FP64, (name, error)

    def _note(self, what):
        type(self).met[what] += 1
        event(what)


@pytest.mark.slow
def test_a_pool_is_its_sequences_whatever_happens():
    PoolMachine.met.clear()
    # Pools of several sizes in one process: sizes that are equal by chance would be compiled for.
    with torch._dynamo.config.patch(recompile_limit=64), shapes.patch(use_duck_shape=False):
        run_state_machine_as_test(
            PoolMachine,
            settings=settings(
                max_examples=50,
                stateful_step_count=30,
                deadline=None,
                print_blob=True,
                report_multiple_bugs=False,
                # Shrinking takes minutes; what is printed is a handful of calls as it is.
                phases=[Phase.explicit, Phase.reuse, Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )
    wanted = (
        *("slot", "parked", "disk", "alone", "together", "padded", "decode"),
        *("reset", "crop", "refused crop", "fork", "no room", "open again"),
    )
    missing = [what for what in wanted if PoolMachine.met[what] == 0]
    assert not missing, f"the machine never met {missing}: {PoolMachine.met}"
