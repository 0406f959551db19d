"""What a pool lends for a block: rows of its tables as a state, and a session around them.

May be changed here: what a lent batch can do. Whose rows they are, and for how long, belongs to ``pool.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.errors import CacheError, PoolError, PositionError
from ttt_compiler.runtime.cache import cached_tokens, plain_layers
from ttt_compiler.runtime.root import Root
from ttt_compiler.runtime.rows import export_row, import_row
from ttt_compiler.runtime.session import Session
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.runtime.tables import has_room_to_spread


class PooledState(FastWeightState):
    """Sequences that a pool has lent: rows of its tables.

    Attributes:
        context: most tokens whose keys and values one sequence may keep.
    """

    def __init__(self, tables: FastWeightState, rows: Tensor, owner: object, context: int | None) -> None:
        super().__init__(tables.specs, tables.sites, rows, owner)
        self.context, self._tables = context, tables
        # Which of the first cached positions hold a token; all others do.
        self._real = torch.ones(len(rows), 0, dtype=torch.bool)

    def pad(self, padding: list[int]) -> None:
        """As many positions in front of every sequence are empty."""
        self._real = torch.arange(max(padding))[None] >= torch.tensor(padding)[:, None]

    def arrived(self, cache: Any, tokens: int, pos: Tensor | None) -> None:
        """As :meth:`FastWeightState.arrived`, whoever made the mask that says which are padding."""
        real = self.holding(max(0, cached_tokens(cache) - tokens))
        new = torch.ones(self.batch_size, tokens, dtype=torch.bool, device="cpu")
        if pos is not None:
            new &= pos.cpu() >= 0
        self._real = torch.cat([real, new], 1)

    def holding(self, cached: int) -> Tensor:
        """As :meth:`FastWeightState.holding`."""
        known = self._real[:, :cached]
        return torch.nn.functional.pad(known, (0, cached - known.shape[1]), value=True)

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """As :meth:`FastWeightState.reset`; all rows are reset together with their keys and values."""
        super().reset(rows)
        if rows is None:
            self._real = self._real[:, :0]

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
            self.specs,
            self.batch_size,
            self.dtype,
            device,
            self.owner,
            self.revocable,
            spread=has_room_to_spread(device, self.revocable),
        )
        for spec in self.specs:
            for b in range(self.batch_size):
                import_row(other, spec, b, export_row(self, spec.key, b))
        other.lost = self.lost
        return other

    def follow(self, adapter: object) -> None:
        """As :meth:`FastWeightState.follow`, of the whole pool: v outlives what was lent."""
        self._tables.follow(adapter)

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
        return self.state.holding(0 if self.cache is None else cached_tokens(self.cache))

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
        if new.shape != ids.shape:
            raise PositionError(
                f"mask {list(new.shape)} for tokens {list(ids.shape)}: pass 1 or 0 for each, those that come "
                "alone; the pool knows which are cached"
            )
        whole = torch.cat([self.real, new], 1)
        if not bool(new.all()):
            plain_layers(self.cache)
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
