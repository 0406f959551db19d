"""A bounded pool of sequences for servers: slots, a budget, and a place for those that wait.

All sequences of a pool share one set of tables, so a batch of any of them is a tensor of row numbers and no
graph is compiled again when the members of a batch change. May be changed here: who gets a slot, and who
loses it; how sequences move is in ``places.py``, what is lent in ``lent.py``. Lending for a block
(:meth:`Pool.use`) is the only door, so that nothing is taken from a call that runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ttt_compiler.errors import PoolError, PoolFullError
from ttt_compiler.runtime.cache import attach_state
from ttt_compiler.runtime.cache_size import cache_bytes
from ttt_compiler.runtime.join import joined, split
from ttt_compiler.runtime.layers import fork_cache
from ttt_compiler.runtime.lent import PooledSession, PooledState
from ttt_compiler.runtime.places import SUFFIX, Places, Sequence
from ttt_compiler.runtime.root import Root, require_root
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.runtime.tables import bytes_per_sequence, has_room_to_spread

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class Pool:
    """A bounded number of sequences of one model, kept by name.

    ```python
    pool = ttt.Pool(model, sequences=8, context=4096, disk="sessions")
    with pool.use("alice", "bob") as batch:
        logits = model(**batch.inputs(ids)).logits  # ids [2, T]: the next tokens of both
    ```

    Args:
        model: a converted model.
        sequences: slots: how many sequences can run at once.
        memory: instead of ``sequences``, a budget in bytes for fast weights and full contexts of keys and
            values. A batch is held once: its members' keys and values move into it, layer by layer, and back.
        context: most tokens whose keys and values one sequence may keep; default the model's own limit.
        bytes_per_sequence: what a full sequence takes, for models whose caches do not say.
        parked_memory: bytes of memory for sequences without a slot, keys and values included.
        disk: folder for those beyond that; sequences found there are part of the pool.
        revocable: how many of the last tokens can be taken back across a chunk's end.

    Raises:
        PoolError: the budget does not hold a single sequence, or the arguments contradict each other.
        NotConvertedError: the model carries no fast weights.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: int | None = None,
        *,
        memory: int | None = None,
        context: int | None = None,
        bytes_per_sequence: int | None = None,
        parked_memory: int = 0,
        disk: str | os.PathLike[str] | None = None,
        revocable: int = 0,
    ) -> None:
        self.model, self._root = require_root(model)
        self.context = context if context is not None else _own_context(self.model)
        if bytes_per_sequence is None:
            bytes_per_sequence = _bytes(self._root, self.model, self.context, revocable)
        self.bytes_per_sequence = bytes_per_sequence
        self.capacity = _capacity(sequences, memory, self.bytes_per_sequence)
        self.parked_memory = parked_memory
        self.disk = None if disk is None else Path(disk)
        like = self._root.like(self._root.specs[0])
        self._tables = FastWeightState.zeros(
            self._root.specs,
            self.capacity,
            like.dtype,
            like.device,
            None,
            revocable,
            shared_lanes=True,
            spread=has_room_to_spread(like.device, revocable),
        )
        self._places = Places(self.model, self._root, self._tables, parked_memory, self.disk, self.context)
        self._sequences = self._places.sequences
        self._changed = threading.Condition()
        self._tick = 0
        if self.disk is not None:
            self.disk.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.disk.glob(f"*{SUFFIX}")):
                if _NAME.fullmatch(path.stem):
                    self._sequences[path.stem] = Sequence(path.stem, None, on_disk=True)

    def __contains__(self, name: object) -> bool:
        return name in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def names(self) -> list[str]:
        """All sequences, wherever they are."""
        return sorted(self._sequences)

    @property
    def nbytes(self) -> int:
        """Bytes that are held now: tables, keys and values, parked sequences."""
        with self._changed:
            return self._places.nbytes

    def where(self, name: str) -> str:
        """``"slot"``, ``"parked"`` or ``"disk"``; ``"lost"`` after an error half-way through a call.

        Raises:
            PoolError: no such sequence.
        """
        sequence = self._known(name)
        if sequence.lost is not None:
            return "lost"
        return "slot" if sequence.row is not None else "disk" if sequence.on_disk else "parked"

    @contextlib.contextmanager
    def use(self, *names: str, wait: float | None = 0.0) -> Iterator[PooledSession]:
        """Lend sequences for a block as one batch, in this order; new names begin at the slow weights.

        Args:
            names: one or more, each once.
            wait: seconds to wait for sequences and slots that others hold; None waits for ever.

        Raises:
            PoolFullError: there are not as many slots, or they are all lent.
            PoolError: a name is lent already, given twice, or no name; or the sequence cannot go on, because
                an error ended it or the slow weights were changed since.
        """
        members = self._lend(names, wait)
        try:
            session = self._session(members)
            try:
                yield session
            finally:
                self._take_back(members, session)
        finally:
            with self._changed:
                for member in members:
                    member.lent = False
                    if member.lost is not None:
                        self._places.drop(member)
                self._changed.notify_all()

    def fork(self, name: str, branch: str) -> None:
        """A new sequence ``branch`` that stands where ``name`` stands; it shares memory until it writes.

        Raises:
            PoolError: ``branch`` exists, or ``name`` does not.
            PoolFullError: no slot can be had.
        """
        self._known(name)
        self._refuse_known(branch)
        source, target = self._lend((name, branch), 0.0, new=branch)
        try:
            with self._root.lock:
                assert source.row is not None
                assert target.row is not None
                self._tables.copy_row(source.row, target.row)
            target.cache, target.owner = fork_cache(source.cache), source.owner
        except BaseException:
            with self._changed:
                self._places.vacate(self._sequences.pop(branch))
            raise
        finally:
            with self._changed:
                source.lent = target.lent = False
                self._changed.notify_all()

    def close(self, name: str) -> None:
        """Forget a sequence, its file included.

        Raises:
            PoolError: no such sequence, or it is lent.
        """
        with self._changed:
            sequence = self._known(name)
            self._refuse_lent(sequence)
            self._places.vacate(sequence)
            if self.disk is not None:
                self._places.path(name).unlink(missing_ok=True)
            del self._sequences[name]
            self._changed.notify_all()

    def save(self, name: str) -> None:
        """Write a sequence to ``disk`` now, and keep it where it is.

        Raises:
            PoolError: the pool has no folder, or the sequence is lent.
        """
        with self._changed:
            sequence = self._known(name)
            self._refuse_lent(sequence)
            self._places.write(sequence)

    def _known(self, name: str) -> Sequence:
        if name not in self._sequences:
            raise PoolError(f"there is no sequence {name!r}; with pool.use({name!r}) begins one")
        return self._sequences[name]

    def _refuse_known(self, name: str) -> None:
        if name in self:
            raise PoolError(f"{name!r} exists already: pool.close({name!r}) first, or choose another name")

    @staticmethod
    def _refuse_lent(sequence: Sequence) -> None:
        if sequence.lent:
            raise PoolError(f"{sequence.name!r} is in use: leave its block first")

    def _lend(self, names: tuple[str, ...], wait: float | None, *, new: str | None = None) -> list[Sequence]:
        """Every named sequence in a slot, and marked as lent; all or none. Given ``new``, it alone is new."""
        self._check_names(names)
        with self._changed:
            if not self._changed.wait_for(lambda: self._can_lend(names), wait):
                busy = [n for n in names if n in self and self._sequences[n].lent]
                if busy:
                    raise PoolError(f"{busy[0]!r} is in use by another block; pass wait= to wait for it")
                raise PoolFullError(
                    f"{len(names)} sequences need slots and {self.capacity} slots are lent to others; pass "
                    "wait= to wait, or build the pool with more sequences="
                )
            # Here, not before: while this waited, others may have begun sequences or closed them.
            if new is not None:
                self._refuse_known(new)
            for name in names:
                if name in self or new not in (None, name):
                    self._places.refuse_ended(self._known(name), "go on")
            made = [n for n in names if n not in self]
            for name in made:
                cache = None if self._root.make_cache is None else self._root.make_cache()
                self._sequences[name] = Sequence(name, cache)
            members = [self._sequences[n] for n in names]
            for member in members:
                member.lent = True
            try:
                for member in members:
                    self._seat(member)
            except BaseException:
                for member in members:
                    member.lent = False
                for name in made:
                    self._places.vacate(self._sequences.pop(name))
                raise
            return members

    def _check_names(self, names: tuple[str, ...]) -> None:
        if not names or len(set(names)) != len(names):
            raise PoolError("name one or more sequences, each once")
        for name in names:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise PoolError(
                    f"{name!r} is no name for a sequence: 1 to 64 letters, digits, '_', '-', '.', not "
                    "beginning with '.' or '-'"
                )
        if len(names) > self.capacity:
            raise PoolFullError(
                f"a batch of {len(names)} does not fit a pool of {self.capacity}: use fewer, or build the "
                "pool with more sequences="
            )

    def _can_lend(self, names: tuple[str, ...]) -> bool:
        held = {s.name for s in self._sequences.values() if s.lent}
        return held.isdisjoint(names) and len(held) + len(names) <= self.capacity

    def _seat(self, sequence: Sequence) -> None:
        """Give a sequence a slot, from the least recently used one that is not lent when none is free."""
        self._tick += 1
        sequence.used = self._tick
        if sequence.row is not None:
            return
        loaded = self._places.read(sequence) if sequence.on_disk else None
        if not self._places.free:
            idle = [s for s in self._sequences.values() if s.row is not None and not s.lent]
            self._places.park(min(idle, key=lambda s: s.used))
        self._places.seat(sequence, loaded)

    def _session(self, members: list[Sequence]) -> PooledSession:
        rows = torch.tensor([m.row for m in members], device=self._tables.device)
        state = PooledState(self._tables, rows, self._root.owner(), self.context)
        cache, make = None, self._root.make_cache
        if make is not None:
            cache, padding = joined([m.cache for m in members], lambda: attach_state(make(), state))
            attach_state(cache, state)
            state.pad(padding)
            for member in members:
                member.cache = cache
        return PooledSession(self.model, self._root, state, cache, [m.name for m in members])

    def _take_back(self, members: list[Sequence], session: PooledSession) -> None:
        state = session.state
        assert isinstance(state, PooledState)
        try:
            for member, seen in zip(members, state.tokens_seen, strict=True):
                member.lost = state.lost
                member.owner = state.owner if seen else None
            if state.lost is None and session.cache is not None and self._root.make_cache is not None:
                caches = split(session.cache, session.real, self._root.make_cache)
                for member, cache in zip(members, caches, strict=True):
                    member.cache = cache
        except BaseException as e:
            for member in members:
                why = f"its keys and values could not be moved ({type(e).__name__}: {e})"
                member.lost = member.lost or why
            raise
        finally:
            state.lost = "the pool has taken its slots back; lend it again: with pool.use(name) as session"


def _own_context(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None)


def _bytes(root: Root, model: nn.Module, context: int | None, revocable: int) -> int:
    """Bytes of one sequence: fast weights, and keys and values of a full context."""
    like = root.like(root.specs[0])
    dtype, spread = like.dtype, has_room_to_spread(like.device, revocable)
    fast = bytes_per_sequence(root.specs, dtype, revocable=revocable, shared_lanes=True, spread=spread)
    if root.make_cache is None:
        return fast
    if context is None:
        raise PoolError("this model names no limit of tokens: pass context=, what one sequence may keep")
    return fast + cache_bytes(model.config, context, dtype)


def _capacity(sequences: int | None, memory: int | None, each: int) -> int:
    if (sequences is None) == (memory is None):
        raise PoolError("pass either sequences= or memory=")
    if memory is not None:
        if memory < each:
            raise PoolError(
                f"one sequence takes {each} bytes and memory={memory}: give more, or a smaller context="
            )
        return memory // each
    assert sequences is not None
    if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
        raise PoolError(f"sequences={sequences!r} must be an integer of at least 1")
    return sequences
