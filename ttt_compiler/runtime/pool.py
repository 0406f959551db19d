"""A bounded pool of sequences for servers: slots, a budget, and a place for those that wait.

All sequences of a pool share one set of tables, so a batch of any of them is a tensor of row numbers and no
graph is compiled again when the members of a batch change. May be changed here: who gets a slot, who loses
it, and where it waits. Lending for a block (:meth:`Pool.use`) is the only door, so that nothing is taken
from a call that runs.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.codegen.layout import CACHED
from ttt_compiler.errors import CacheError, CropError, PoolError, PoolFullError, SnapshotError
from ttt_compiler.runtime import snapshot
from ttt_compiler.runtime.cache import attach_state, cached_tokens, plain_layers
from ttt_compiler.runtime.cache_size import cache_bytes
from ttt_compiler.runtime.join import joined, split
from ttt_compiler.runtime.layers import fork_cache, layer_bytes
from ttt_compiler.runtime.root import Root, require_padding_mask, require_root
from ttt_compiler.runtime.rows import Row, export_row, import_row
from ttt_compiler.runtime.session import Session
from ttt_compiler.runtime.state import FastWeightState, bytes_per_sequence

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
SUFFIX = ".ttt"


@dataclass
class _Sequence:
    """What the pool knows of one sequence.

    Exactly one of row, parked, on_disk and lost says where it is; one that is lost holds nothing. The cache
    of one that is lent is that of its batch. The owner is that of :meth:`Root.owner`, once it has begun.
    """

    name: str
    cache: Any
    row: int | None = None
    parked: dict[str, Row] | None = None
    on_disk: bool = False
    lent: bool = False
    lost: str | None = None
    owner: object = None
    used: int = 0


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
            self._root.specs, self.capacity, like.dtype, like.device, None, revocable, shared_lanes=True
        )
        self._free = list(range(self.capacity))
        self._sequences: dict[str, _Sequence] = {}
        self._changed = threading.Condition()
        self._tick = 0
        if self.disk is not None:
            self.disk.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.disk.glob(f"*{SUFFIX}")):
                if _NAME.fullmatch(path.stem):
                    self._sequences[path.stem] = _Sequence(path.stem, None, on_disk=True)

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
        known = list(self._sequences.values())
        caches = {id(s.cache): s.cache for s in known}
        parked = sum(_row_bytes(s.parked) for s in known if s.parked)
        return self._tables.nbytes + parked + sum(map(layer_bytes, caches.values()))

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
                        self._drop(member)
                self._changed.notify_all()

    def fork(self, name: str, branch: str) -> None:
        """A new sequence ``branch`` that stands where ``name`` stands; it shares memory until it writes.

        Raises:
            PoolError: ``branch`` exists, or ``name`` does not.
            PoolFullError: no slot can be had.
        """
        with self._changed:
            self._known(name)
            if branch in self:
                raise PoolError(
                    f"{branch!r} exists already: pool.close({branch!r}) first, or choose another name"
                )
            source, target = self._lend((name, branch), 0.0)
        try:
            with self._root.lock:
                for site in self._tables.sites.values():
                    for table in (site.rows, site.lanes, site.norms):
                        table[target.row] = table[source.row]
                    site.rows[target.row, CACHED] = 0
            target.cache, target.owner = fork_cache(source.cache), source.owner
        except BaseException:
            with self._changed:
                self._vacate(self._sequences.pop(branch))
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
            self._vacate(sequence)
            if self.disk is not None:
                self._path(name).unlink(missing_ok=True)
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
            self._write(sequence)

    def _known(self, name: str) -> _Sequence:
        if name not in self._sequences:
            raise PoolError(f"there is no sequence {name!r}; with pool.use({name!r}) begins one")
        return self._sequences[name]

    @staticmethod
    def _refuse_lent(sequence: _Sequence) -> None:
        if sequence.lent:
            raise PoolError(f"{sequence.name!r} is in use: leave its block first")

    def _refuse_ended(self, sequence: _Sequence, what: str) -> None:
        why = self._ended(sequence)
        if why is not None:
            raise PoolError(f"{sequence.name!r} cannot {what}: {why}. Type pool.close(name)")

    def _ended(self, sequence: _Sequence) -> str | None:
        """Why a sequence cannot go on."""
        if sequence.lost is None and sequence.owner not in (None, self._root.owner()):
            return "its fast weights were written on slow weights that were trained or loaded since"
        return sequence.lost

    def _path(self, name: str) -> Path:
        assert self.disk is not None
        return self.disk / f"{name}{SUFFIX}"

    def _lend(self, names: tuple[str, ...], wait: float | None) -> list[_Sequence]:
        """Every named sequence in a slot, and marked as lent; all or none."""
        self._check_names(names)
        with self._changed:
            # Waiting, even for no time, would let others in.
            ready = self._can_lend(names)
            if not ready and (wait == 0 or not self._changed.wait_for(lambda: self._can_lend(names), wait)):
                busy = [n for n in names if n in self and self._sequences[n].lent]
                if busy:
                    raise PoolError(f"{busy[0]!r} is in use by another block; pass wait= to wait for it")
                raise PoolFullError(
                    f"{len(names)} sequences need slots and {self.capacity} slots are lent to others; pass "
                    "wait= to wait, or build the pool with more sequences="
                )
            for name in names:
                if name in self:
                    self._refuse_ended(self._sequences[name], "go on")
            made = [n for n in names if n not in self]
            for name in made:
                cache = None if self._root.make_cache is None else self._root.make_cache()
                self._sequences[name] = _Sequence(name, cache)
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
                    self._vacate(self._sequences.pop(name))
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

    def _seat(self, sequence: _Sequence) -> None:
        """Give a sequence a slot, from the least recently used one that is not lent when none is free."""
        self._tick += 1
        sequence.used = self._tick
        if sequence.row is not None:
            return
        loaded = self._read(sequence) if sequence.on_disk else None
        if not self._free:
            idle = [s for s in self._sequences.values() if s.row is not None and not s.lent]
            self._park(min(idle, key=lambda s: s.used))
        row = self._free.pop()
        with self._root.lock:
            seat = FastWeightState(self._root.specs, self._tables.sites, torch.tensor([row]))
            seat.reset()
            rows = sequence.parked or {}
            if loaded is not None:
                state, sequence.cache = loaded
                rows = {s.key: export_row(state, s.key, 0) for s in self._root.specs}
            for spec in self._root.specs:
                if spec.key in rows:
                    import_row(seat, spec, 0, rows[spec.key])
        sequence.row, sequence.parked, sequence.on_disk = row, None, False

    def _vacate(self, sequence: _Sequence) -> None:
        if sequence.row is None:
            return
        with self._root.lock:
            FastWeightState(self._root.specs, self._tables.sites, torch.tensor([sequence.row])).reset()
        self._free.append(sequence.row)
        sequence.row = None

    def _drop(self, sequence: _Sequence) -> None:
        """Free what a lost sequence holds; why it was lost is kept."""
        self._vacate(sequence)
        sequence.cache = None

    def _park(self, sequence: _Sequence) -> None:
        """Take the slot of an idle sequence; it waits in memory, or on disk, unless it has ended."""
        sequence.lost = self._ended(sequence)
        if sequence.lost is not None:
            self._drop(sequence)
            return
        rows = self._rows(sequence)
        size = _row_bytes(rows) + layer_bytes(sequence.cache)
        if self._parked_bytes() + size <= self.parked_memory:
            with self._root.lock:
                # A slot is anybody's as soon as its row is vacated: a fork that is lent may write into it.
                parked = {k: {n: x.clone() for n, x in row.items()} for k, row in rows.items()}
                self._vacate(sequence)
            sequence.parked = parked
            return
        if self.disk is None:
            raise PoolFullError(
                f"all {self.capacity} slots are taken and parked_memory={self.parked_memory} has no room for "
                f"{size} bytes of {sequence.name!r}: pool.close(name) one, or build the pool with disk= or "
                "more parked_memory="
            )
        self._write(sequence)
        self._vacate(sequence)
        sequence.cache, sequence.on_disk = None, True

    def _parked_bytes(self) -> int:
        waiting = (s for s in self._sequences.values() if s.parked)
        return sum(_row_bytes(s.parked) + layer_bytes(s.cache) for s in waiting if s.parked)

    def _rows(self, sequence: _Sequence) -> dict[str, Row]:
        """A sequence's fast weights, as views while it has a slot."""
        if sequence.parked is not None:
            return sequence.parked
        seat = FastWeightState(self._root.specs, self._tables.sites, torch.tensor([sequence.row]))
        return {s.key: export_row(seat, s.key, 0) for s in self._root.specs}

    def _write(self, sequence: _Sequence) -> None:
        if self.disk is None:
            raise PoolError("this pool has no folder: build it with disk=")
        if sequence.on_disk:
            return
        self._refuse_ended(sequence, "be saved")
        with self._root.lock:
            state = self._private(sequence)
            snapshot.save(self._path(sequence.name), self.model, self._root, state, sequence.cache)

    def _private(self, sequence: _Sequence) -> FastWeightState:
        """A sequence in tables of its own."""
        state = self._root.new_state(1, self._tables.revocable)
        for spec in self._root.specs:
            import_row(state, spec, 0, self._rows(sequence)[spec.key])
        return state

    def _read(self, sequence: _Sequence) -> tuple[FastWeightState, Any]:
        try:
            loaded = Session.load(self.model, self._path(sequence.name))
        except SnapshotError as e:
            raise PoolError(f"{sequence.name!r} cannot be read back: {e}. Type pool.close(name)") from e
        if loaded.batch_size != 1:
            raise PoolError(
                f"{sequence.name!r} cannot be read back: its file holds {loaded.batch_size} sequences, a "
                "pool's hold one. ttt.Session.load reads it"
            )
        if loaded.state.revocable > self._tables.revocable:
            raise PoolError(
                f"{sequence.name!r} was saved with {loaded.state.revocable} revocable tokens: build the pool "
                f"with revocable={loaded.state.revocable}"
            )
        cached = 0 if loaded.cache is None else cached_tokens(loaded.cache)
        if self.context is not None and cached > self.context:
            raise PoolError(
                f"{sequence.name!r} was saved with {cached} tokens of keys and values: build the pool with "
                f"context={cached} or more"
            )
        return loaded.state, loaded.cache

    def _session(self, members: list[_Sequence]) -> PooledSession:
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

    def _take_back(self, members: list[_Sequence], session: PooledSession) -> None:
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
                member.lost = f"its keys and values were not taken back ({type(e).__name__}: {e})"
            raise
        finally:
            state.lost = "the pool has taken its slots back; lend it again: with pool.use(name) as session"


class PooledState(FastWeightState):
    """Sequences that a pool has lent: rows of its tables.

    Attributes:
        context: most tokens whose keys and values one sequence may keep.
        real: bool ``[B, n]`` on the CPU: which of the first n cached positions hold a token. All others do.
    """

    def __init__(self, tables: FastWeightState, rows: Tensor, owner: object, context: int | None) -> None:
        super().__init__(tables.specs, tables.sites, rows, owner)
        self.context = context
        self.real = torch.ones(len(rows), 0, dtype=torch.bool)

    def pad(self, padding: list[int]) -> None:
        """As many positions in front of every sequence are empty."""
        self.real = torch.arange(max(padding))[None] >= torch.tensor(padding)[:, None]

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """As :meth:`FastWeightState.reset`; all rows are reset together with their keys and values."""
        super().reset(rows)
        if rows is None:
            self.real = self.real[:, :0]

    def crop(self, tokens: int) -> None:
        """As :meth:`FastWeightState.crop`, of as many positions as tokens.

        Raises:
            CropError: some of the positions may be empty; nothing changed.
        """
        if bool((self.real[:, :-1] & ~self.real[:, 1:]).any()):
            raise CropError(
                "cannot take back tokens: some positions of this batch are padding between tokens. Take them "
                "back in a block of their own, with pool.use(name): it holds tokens alone"
            )
        super().crop(tokens)

    def own(self) -> None:
        """The tables are the pool's, and rows of others are never touched."""

    def admit(self, cached: int, tokens: int) -> None:
        """Raise before a call whose keys and values would not fit what the pool has planned for.

        Raises:
            PoolError: naming the limit.
        """
        if self.context is not None and cached + tokens > self.context:
            raise PoolError(
                f"{cached} tokens are cached and {tokens} more are to come, but this pool holds "
                f"{self.context} per sequence. Build it with a larger context=, or session.evict(keep=...)"
            )

    def clone(self) -> FastWeightState:
        """A copy in tables of its own: a fork of a lent sequence leaves the pool."""
        device = self.device
        other = FastWeightState.zeros(
            self.specs, self.batch_size, self.dtype, device, self.owner, self.revocable
        )
        for spec in self.specs:
            for b in range(self.batch_size):
                import_row(other, spec, b, export_row(self, spec.key, b))
        other.lost = self.lost
        return other

    def select(self, rows: Tensor) -> None:
        """Raise unless every sequence stays where it is: names and slots are in this order.

        Raises:
            CacheError: nothing changed.
        """
        if rows.dtype == torch.bool or rows.tolist() != list(range(self.batch_size)):
            raise CacheError(
                "beams, repeated and reordered sequences need rows of their own, which a pool does not lend: "
                "generate on session.fork(), which leaves the pool"
            )

    def keep_revocable(self, tokens: int) -> None:
        """Raise unless the pool was built for it."""
        if tokens > self.revocable:
            raise CacheError(
                f"{tokens} tokens must stay revocable and this pool keeps {self.revocable}: build it with "
                f"revocable={tokens}"
            )


class PooledSession(Session):
    """One or more sequences of a pool, as one batch; good for the block that it was lent for.

    Attributes:
        names: the sequences, in the order of the batch.
    """

    def __init__(
        self, model: nn.Module, root: Root, state: PooledState, cache: Any, names: list[str]
    ) -> None:
        self.model, self._root, self._state, self.cache = model, root, state, cache
        self.names = names

    @property
    def real(self) -> Tensor:
        """Bool ``[B, cached]``: which positions of the cache hold a token of their sequence."""
        assert isinstance(self.state, PooledState)
        cached = 0 if self.cache is None else cached_tokens(self.cache)
        known = self.state.real[:, :cached]
        return torch.nn.functional.pad(known, (0, cached - known.shape[1]), value=True)

    @property
    def padding(self) -> list[int]:
        """Per sequence, how many positions of the cache in front of its tokens are empty."""
        out: list[int] = (self.real.cumsum(1) == 0).sum(1).tolist()
        return out

    def attention_mask(self, new_tokens: int) -> Tensor:
        """int64 ``[B, cached + new_tokens]``: 0 where the cache is empty."""
        return torch.nn.functional.pad(self.real, (0, new_tokens), value=True).long()

    def inputs(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """What a transformers model is called with to read ``ids [B, T]``, the next of every sequence.

        Args:
            ids: token ids.
            mask: ``[B, T]``, 0 where ``ids`` is padding, for sequences of which some read fewer tokens. It is
                remembered for the block, and left out when the pool takes its sequences back.

        Raises:
            CacheError: there is padding, and the cache keeps more than all keys and values.
            PositionError: a mask of another shape.
        """
        new = torch.ones(ids.shape, dtype=torch.bool, device="cpu") if mask is None else mask.cpu().bool()
        require_padding_mask(new, ids)
        whole = torch.cat([self.real, new], 1)
        if not bool(new.all()):
            plain_layers(self.cache)
        assert isinstance(self.state, PooledState)
        self.state.real = whole
        seen = torch.tensor(self.tokens_seen)[:, None] + new.cumsum(1) - 1
        return {
            # A slice's offset into its storage is part of what a graph is compiled for.
            "input_ids": ids.clone(),
            "attention_mask": whole.long().to(ids.device),
            "position_ids": seen.clamp(min=0).to(ids.device),
            "past_key_values": self.cache,
        }

    def evict(self, keep: int, sink: int = 0) -> None:
        """As :meth:`Session.evict`; of sequences of different lengths, one at a time."""
        if not bool(self.real.all()):
            raise CacheError("sequences of different lengths are evicted one at a time: pool.use(name)")
        super().evict(keep, sink)


def _row_bytes(rows: dict[str, Row]) -> int:
    return sum(x.nbytes for row in rows.values() for x in row.values())


def _own_context(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None)


def _bytes(root: Root, model: nn.Module, context: int | None, revocable: int) -> int:
    """Bytes of one sequence: fast weights, and keys and values of a full context."""
    dtype = root.like(root.specs[0]).dtype
    fast = bytes_per_sequence(root.specs, dtype, revocable=revocable, shared_lanes=True)
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
