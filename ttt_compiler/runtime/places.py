"""Where the sequences of a pool are: in slots of its tables, parked in memory, on disk, or lost.

May be changed here: how a sequence moves from one place to another, and what keeps it from moving. Which one
moves, and when, belongs to ``pool.py``, whose lock is held by every caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt_compiler.errors import PoolError, PoolFullError, SnapshotError
from ttt_compiler.runtime import snapshot
from ttt_compiler.runtime.cache import cached_tokens
from ttt_compiler.runtime.layers import layer_bytes
from ttt_compiler.runtime.root import Root
from ttt_compiler.runtime.rows import Row, export_row, import_row
from ttt_compiler.runtime.session import Session
from ttt_compiler.runtime.state import FastWeightState

SUFFIX = ".ttt"


@dataclass
class Sequence:
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


class Places:
    """The places of one pool.

    Attributes:
        sequences: all that there are, by name.
        tables: what slots are rows of.
        free: rows that nobody has.
    """

    def __init__(
        self,
        model: nn.Module,
        root: Root,
        tables: FastWeightState,
        parked_memory: int,
        disk: Path | None,
        context: int | None,
    ) -> None:
        self.model, self._root, self.tables = model, root, tables
        self.parked_memory, self.disk, self.context = parked_memory, disk, context
        self.free = list(range(tables.batch_size))
        self.sequences: dict[str, Sequence] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        known = list(self.sequences.values())
        caches = {id(s.cache): s.cache for s in known}
        parked = sum(_row_bytes(s.parked) for s in known if s.parked)
        return self.tables.nbytes + parked + sum(map(layer_bytes, caches.values()))

    def seat(self, sequence: Sequence, loaded: tuple[FastWeightState, Any] | None) -> None:
        """Give a sequence a free slot, and what was parked, or loaded by :meth:`read`."""
        row = self.free.pop()
        try:
            with self._root.lock:
                seat = self._seat(row)
                seat.reset()
                rows = sequence.parked or {}
                if loaded is not None:
                    rows = {s.key: export_row(loaded[0], s.key, 0) for s in self._root.specs}
                for spec in self._root.specs:
                    if spec.key in rows:
                        import_row(seat, spec, 0, rows[spec.key], self._root.weight)
        except BaseException:
            self.free.append(row)
            raise
        if loaded is not None:
            # The file belongs to these slow weights, or it could not have been read.
            sequence.cache, sequence.owner = loaded[1], self._root.owner()
        sequence.row, sequence.parked, sequence.on_disk = row, None, False

    def refuse_ended(self, sequence: Sequence, what: str) -> None:
        """Raise when a sequence has ended.

        Raises:
            PoolError: with the reason, and ``what`` cannot be done.
        """
        why = self.ended(sequence)
        if why is not None:
            how = "Type" if sequence.lost is not None else "Put them back, or type"
            raise PoolError(f"{sequence.name!r} cannot {what}: {why}. {how} pool.close(name)")

    def ended(self, sequence: Sequence) -> str | None:
        """Why a sequence cannot go on."""
        if sequence.lost is None and sequence.owner not in (None, self._root.owner()):
            return "the model's slow weights were trained or loaded since it was read"
        return sequence.lost

    def vacate(self, sequence: Sequence) -> None:
        """Take a sequence's slot, if it has one; what stood there is gone."""
        if sequence.row is None:
            return
        with self._root.lock:
            self._seat(sequence.row).reset()
        self.free.append(sequence.row)
        sequence.row = None

    def drop(self, sequence: Sequence) -> None:
        """Free what a lost sequence holds; why it was lost is kept."""
        self.vacate(sequence)
        sequence.cache = None

    def park(self, sequence: Sequence) -> None:
        """Take the slot of an idle sequence; it waits in memory, or on disk, unless it has ended.

        Raises:
            PoolFullError: there is no room; nothing changed.
        """
        sequence.lost = self.ended(sequence)
        if sequence.lost is not None:
            self.drop(sequence)
            return
        size = _row_bytes(self._rows(sequence)) + layer_bytes(sequence.cache)
        if self._parked_bytes() + size <= self.parked_memory:
            # One lock for both: once the row is free, a call in another thread may write into its slot.
            with self._root.lock:
                rows = self._rows(sequence)
                parked = {k: {n: x.clone() for n, x in row.items()} for k, row in rows.items()}
                self.vacate(sequence)
            sequence.parked = parked
            return
        if self.disk is None:
            raise PoolFullError(
                f"all {self.tables.batch_size} slots are taken and parked_memory={self.parked_memory} has "
                f"no room for {size} bytes of {sequence.name!r}: pool.close(name) one, or build the pool "
                "with disk= or more parked_memory="
            )
        self.write(sequence)
        self.vacate(sequence)
        sequence.cache, sequence.on_disk = None, True

    def _parked_bytes(self) -> int:
        waiting = (s for s in self.sequences.values() if s.parked)
        return sum(_row_bytes(s.parked) + layer_bytes(s.cache) for s in waiting if s.parked)

    def _rows(self, sequence: Sequence) -> dict[str, Row]:
        """A sequence's fast weights, as views while it has a slot."""
        if sequence.parked is not None:
            return sequence.parked
        assert sequence.row is not None
        seat = self._seat(sequence.row)
        return {s.key: export_row(seat, s.key, 0) for s in self._root.specs}

    def write(self, sequence: Sequence) -> None:
        """Write a sequence's file; it stays where it is.

        Raises:
            PoolError: there is no folder, or the sequence has ended.
        """
        if self.disk is None:
            raise PoolError("this pool has no folder: build it with disk=")
        if sequence.on_disk:
            return
        self.refuse_ended(sequence, "be saved")
        with self._root.lock:
            state = self._private(sequence)
            snapshot.save(self.path(sequence.name), self.model, self._root, state, sequence.cache)

    def _private(self, sequence: Sequence) -> FastWeightState:
        """A sequence in tables of its own."""
        state = self._root.new_state(1, self.tables.revocable)
        for spec in self._root.specs:
            import_row(state, spec, 0, self._rows(sequence)[spec.key], self._root.weight)
        return state

    def read(self, sequence: Sequence) -> tuple[FastWeightState, Any]:
        """What a sequence's file holds: fast weights, and a cache.

        Raises:
            PoolError: it cannot be read, or does not fit the tables.
        """
        try:
            loaded = Session.load(self.model, self.path(sequence.name))
        except SnapshotError as e:
            raise PoolError(f"{sequence.name!r} cannot be read back: {e}. Type pool.close(name)") from e
        if loaded.batch_size != 1:
            raise PoolError(
                f"{sequence.name!r} was saved with {loaded.batch_size} sequences, a pool keeps one per name: "
                "open it with ttt.Session.load, or type pool.close(name), which deletes the file"
            )
        if loaded.state.revocable > self.tables.revocable:
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

    def path(self, name: str) -> Path:
        """A sequence's file."""
        assert self.disk is not None
        return self.disk / f"{name}{SUFFIX}"

    def _seat(self, row: int) -> FastWeightState:
        """A slot as a state of one sequence."""
        return FastWeightState(self._root.specs, self.tables.sites, torch.tensor([row]))


def _row_bytes(rows: dict[str, Row]) -> int:
    return sum(x.nbytes for row in rows.values() for x in row.values())
