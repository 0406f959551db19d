"""Fast-weight state of running sequences: what exists, what it costs, and what happens to it with its rows.

Shapes and addresses are fixed while a batch runs and counters are tensors, so no captured graph depends on
how many tokens were seen. Rows of a batch are numbers: beams reorder integers, a fork shares every matrix
until one of both runs. May be changed here: operations on rows; where the numbers stand is
:mod:`ttt_compiler.codegen.layout`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.spread import finish_write, spread_matrix
from ttt_compiler.codegen.layout import (
    CACHED,
    DONE,
    FACTORED,
    LEFT,
    SEEN,
    SLOT,
    VALUES,
    WRITES,
    StateTensors,
    factored_rows,
)
from ttt_compiler.compat import mark_static
from ttt_compiler.errors import CacheError, CropError
from ttt_compiler.runtime.tables import selected, with_tail, zeros
from ttt_compiler.spec import SiteSpec

# What is written while a sequence runs; a fork shares these until then, and copies counters at once.
_HEAVY = ("w", "tail_h", "tail_t", "tail_v", "lanes")


class FastWeightState:
    """Fast weights of a batch of running sequences, one :class:`StateTensors` per site.

    Attributes:
        specs: constants of the sites.
        sites: per site key, its tensors: tables of at least B rows.
        batch: int64 ``[B]``, which row of the tables is sequence b.
        owner: identity of the slow weights it was written on (see :meth:`Root.owner`).
        adapter: identity of the conv and P that chunks in waiting were made by (see :meth:`follow`).
        lost: why the state can no longer be used, after an error in the middle of a call; else None.
    """

    def __init__(
        self, specs: Sequence[SiteSpec], sites: dict[str, StateTensors], batch: Tensor, owner: object = None
    ) -> None:
        self.specs = tuple(specs)
        self.sites = sites
        self.batch = batch
        self.owner = owner
        self.adapter: object = None
        self.lost: str | None = None
        self._settled: dict[str, StateTensors] = {}
        self._sharers: weakref.WeakSet[FastWeightState] = weakref.WeakSet([self])

    @classmethod
    def zeros(
        cls,
        specs: Sequence[SiteSpec],
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        owner: object = None,
        revocable: int = 0,
        *,
        shared_lanes: bool = False,
        spread: bool = False,
    ) -> FastWeightState:
        """State of ``batch`` sequences that have not begun: every row stands at the slow weights.

        Args:
            specs: the sites.
            batch: B.
            dtype: of the model's activations.
            device: where.
            owner: see the class.
            revocable: R, the number of last tokens that can be taken back across a chunk's end.
            shared_lanes: whether rows may share entries of a tail from the start (pools, beams).
            spread: whether there is room to spread a chunk's write over steps (CPU, and R = 0).
        """
        # Tensors made under inference mode could not be written by a later call outside of it.
        with torch.inference_mode(False):
            sites = {s.key: zeros(s, batch, dtype, device, revocable, shared_lanes, spread) for s in specs}
            return cls(specs, sites, torch.arange(batch, device=device), owner)

    @property
    def signature(self) -> tuple[str, ...]:
        """Canonical form of the sites' constants."""
        return tuple(s.encode() for s in self.specs)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.batch)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tails: the model's."""
        return self._first().tail_h.dtype

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._first().tail_h.device

    @property
    def revocable(self) -> int:
        """R: how many of the last tokens can be taken back across a chunk's end."""
        return self._first().revocable(self.specs[0])

    @property
    def holds_values(self) -> bool:
        """Whether v of tokens that are not written is kept from call to call."""
        return any(site.tail_v.shape[1] > 0 for site in self.sites.values())

    @property
    def tokens_seen(self) -> list[int]:
        """Tokens since the document began, per sequence."""
        return self.column(self.specs[0].key, SEEN)

    @property
    def chunks_written(self) -> dict[str, list[int]]:
        """Per site and sequence, how many chunks are in its matrix."""
        return {spec.key: self.column(spec.key, WRITES) for spec in self.specs}

    @property
    def nbytes(self) -> int:
        """Bytes of all tables; forks that have not run since count what they share."""
        return sum(x.nbytes for site in self.sites.values() for x in site) + self.batch.nbytes

    def column(self, key: str, column: int) -> list[int]:
        """One counter of a site per sequence; see :mod:`ttt_compiler.codegen.layout`."""
        values: list[int] = self.sites[key].rows[self.batch, column].tolist()
        return values

    def clone(self) -> FastWeightState:
        """An independent copy, bit for bit, that shares memory with this one until either runs."""
        with torch.inference_mode(False):
            sites = {k: s._replace(rows=s.rows.clone(), norms=s.norms.clone()) for k, s in self.sites.items()}
            other = FastWeightState(self.specs, sites, self.batch.clone(), self.owner)
        other.lost, other.adapter = self.lost, self.adapter
        other._sharers = self._sharers
        self._sharers.add(other)
        return other

    def __deepcopy__(self, memo: object) -> FastWeightState:
        return self.clone()

    def own(self) -> None:
        """Before the state is written: have memory of its own, a copy where a fork shares it."""
        if len(self._sharers) > 1:
            with torch.inference_mode(False):
                self.sites = {
                    k: s._replace(**{n: getattr(s, n).clone() for n in _HEAVY}) for k, s in self.sites.items()
                }
            # Only now: a fork that runs in another thread must not take what is being copied for its own.
            self._sharers.discard(self)
            self._sharers = weakref.WeakSet([self])

    def follow(self, adapter: object) -> None:
        """Before a call: chunks that wait get the v that its conv and P give, not other ones."""
        if self.adapter != adapter:
            for site in self.sites.values():
                site.forget_values(self.batch)
            self.adapter = adapter

    def settle(self) -> None:
        """Before a call: its tensors stay where they are from now on, for CUDA graphs."""
        for key, site in self.sites.items():
            if self._settled.get(key) is not site:
                for x in site:
                    mark_static(x)
                self._settled[key] = site

    def admit(self, cached: int, tokens: int) -> None:
        """Raise before a call of ``tokens`` more tokens that this state has no room for; a pool's may."""

    def arrived(self, cache: Any, tokens: int, pos: Tensor | None) -> None:
        """After a call of ``tokens`` tokens at ``pos``, which ``cache`` holds now; a pool's notes padding."""

    def holding(self, cached: int) -> Tensor | None:
        """Bool ``[B, cached]`` on the CPU, which cached positions hold tokens; None: nobody noted."""
        return None

    def select(self, rows: Tensor) -> None:
        """Sequence i becomes sequence ``rows[i]``: beam reorder, batch selection.

        Integers move, matrices do not: several sequences may read one until they write.

        Args:
            rows: int64 ``[B']``, or a mask ``[B]`` of sequences that stay.
        """
        rows = rows.to(self.device)
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        if torch.equal(rows, torch.arange(self.batch_size, device=self.device)):
            return
        with torch.inference_mode(False):
            chosen = self.batch[rows.clone()]
            for spec in self.specs:
                self.sites[spec.key] = selected(self.sites[spec.key], chosen)
            self.batch = torch.arange(len(rows), device=self.device)

    def copy_row(self, source: int, target: int) -> None:
        """Row ``target`` of the tables becomes what row ``source`` is; both read the same slot and lanes."""
        for site in self.sites.values():
            for table in (site.rows, site.lanes, site.norms):
                table[target] = table[source]
            # v is kept per row.
            site.forget_values(target)
            if site.spreads and site.rows[source, LEFT]:
                site.tail_v[target] = site.tail_v[source]

    def repeat_interleave(self, repeats: int) -> None:
        """Every sequence becomes ``repeats`` sequences."""
        self.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Back to the slow weights and an empty tail, in place, for the given sequences or all."""
        chosen = self.batch if rows is None else self.batch[torch.tensor(list(rows), dtype=torch.int64)]
        for site in self.sites.values():
            slots = site.rows[chosen, SLOT]
            site.rows[chosen] = 0
            site.rows[chosen, SLOT] = slots
            site.norms[chosen] = 0
        if rows is None:
            self.lost = None

    def crop(self, tokens: int) -> None:
        """Take back the last ``tokens`` tokens of every sequence, exactly.

        Raises:
            CropError: a sequence would have to undo a chunk that is already written; nothing changed.
        """
        if tokens <= 0:
            return
        for spec in self.specs:
            counts = self.sites[spec.key].rows[self.batch]
            room = counts[:, SEEN] - counts[:, DONE] * spec.chunk
            if bool((room < tokens).any()):
                raise CropError(
                    f"cannot take back {tokens} tokens of {spec.key}: only {room.min().item()} stand after "
                    "the last written chunk. Say before they are read how many may be rejected: "
                    "session.keep_revocable(n); or fork the session and drop the fork"
                )
        for spec in self.specs:
            rows = self.sites[spec.key].rows
            counts = rows[self.batch]
            counts[:, SEEN] -= tokens
            complete = counts[:, SEEN] // spec.chunk - counts[:, DONE]
            counts[:, CACHED] = torch.minimum(counts[:, CACHED], complete)
            # No column in tables without room to spread a write.
            counts[:, VALUES : VALUES + 1] = 0
            rows[self.batch] = counts

    def keep_revocable(self, tokens: int) -> None:
        """From now on keep the last ``tokens`` tokens in a form that can be taken back.

        A chunk is then written once its end is that old; until then its tokens act from the tail. The tail
        grows by ``tokens`` rows per site; it never shrinks, so that captured graphs stay valid.
        """
        if tokens <= self.revocable:
            return
        self.own()
        with torch.inference_mode(False):
            for spec in self.specs:
                self.sites[spec.key] = with_tail(self.sites[spec.key], spec, tokens)

    def finish_writes(self, weight: Callable[[SiteSpec], Tensor]) -> None:
        """Bring writes that are spread over steps to their end; ``weight`` gives W0 ``[D, F]`` of a site."""
        for spec in self.specs:
            site = self.sites[spec.key]
            if not site.spreads or not bool(site.rows[self.batch, LEFT].any()):
                continue
            self.own()
            site = self.sites[spec.key]
            table = site.rows.tolist()
            for row in self.batch.tolist():
                finish_write(table, row, site, spec, weight(spec))
            site.rows.copy_(torch.tensor(table))

    def matrix(self, key: str, sequence: int, w0: Tensor) -> Tensor:
        """W ``[D, F]`` of a sequence in the state's dtype, a new tensor; ``w0 [D, F]`` is its slow weight."""
        site = self.sites[key]
        counts = site.rows[self.batch[sequence]].tolist()
        base = w0.detach().to(site.w.dtype)
        if counts[WRITES] == 0:
            return base.clone()
        slot = site.w[counts[SLOT]]
        if site.spreads and counts[LEFT]:
            spec = next(s for s in self.specs if s.key == key)
            return spread_matrix(site, int(self.batch[sequence]), spec, base)
        if counts[FACTORED] == 0:
            return slot.clone()
        keys, values = factored_rows(slot, site.tail_h.dtype, counts[FACTORED])
        return torch.addmm(base, values.to(base.dtype).t(), keys.to(base.dtype))

    def drift(self, weights: dict[str, Tensor]) -> dict[str, list[float]]:
        """``||W - W0||_F / ||W0||_F`` per site and sequence; ``weights`` holds W0 ``[D, F]`` per key."""
        out = {}
        for key, written in self.chunks_written.items():
            w0 = weights[key].detach().to(self.sites[key].w.dtype)
            norm = w0.norm()
            out[key] = [
                float((self.matrix(key, b, w0) - w0).norm() / norm) if writes else 0.0
                for b, writes in enumerate(written)
            ]
        return out

    def _first(self) -> StateTensors:
        return self.sites[self.specs[0].key]


def check_fits(
    state: FastWeightState, specs: Sequence[SiteSpec], batch: int, like: Tensor, owner: object
) -> None:
    """Raise unless ``state`` can run on a model with these sites, weights like ``like`` and ``batch`` rows.

    Raises:
        CacheError: with what differs and what to do.
    """
    fresh = "Start a new one: ttt.Session(model), or leave past_key_values out"
    if state.lost is not None:
        raise CacheError(f"these sequences can no longer be used: {state.lost}")
    if state.signature != tuple(s.encode() for s in specs):
        raise CacheError(f"this cache carries the fast weights of another model or configuration. {fresh}")
    if state.batch_size != batch:
        raise CacheError(
            f"this cache carries fast weights of {state.batch_size} sequences, but the call has "
            f"{batch}. Make one with ttt.Session(model, batch_size=...)"
        )
    if state.dtype != like.dtype or state.device != like.device:
        raise CacheError(
            f"this cache carries fast weights of a model in {state.dtype} on {state.device}; the model "
            f"is now in {like.dtype} on {like.device}. {fresh}"
        )
    if state.owner != owner:
        if any(state.tokens_seen):
            raise CacheError(
                "this cache carries fast weights written on other slow weights: it belongs to another "
                f"model, or the model's weights were trained or loaded since. {fresh}"
            )
        state.owner = owner
