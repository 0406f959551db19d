"""Fast-weight state of running sequences: layout, bytes, and what happens to it with its rows.

Per site and sequence: ``w [D, F]`` fp32 (fp64 for fp64 models), the hidden and target rows of the
incomplete chunk, and two counters. Shapes and addresses are fixed while a batch runs, counters are
tensors, so no captured graph depends on how many tokens were seen. May be changed here: the layout,
together with ``fast_weight_step`` and the snapshot format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ttt_compiler.codegen.cpu.gemm import state_dtype
from ttt_compiler.codegen.cpu.step import SEEN, WRITES
from ttt_compiler.errors import CacheError, CropError
from ttt_compiler.spec import SiteSpec

TENSORS = ("w", "tail_h", "tail_t", "counts")


class SiteState:
    """Tensors of one site for a batch: see :class:`FastWeightState`."""

    def __init__(self, w: Tensor, tail_h: Tensor, tail_t: Tensor, counts: Tensor) -> None:
        self.w = w
        self.tail_h = tail_h
        self.tail_t = tail_t
        self.counts = counts

    @classmethod
    def zeros(cls, spec: SiteSpec, batch: int, dtype: torch.dtype, device: torch.device) -> SiteState:
        """State of ``batch`` sequences that have not begun."""
        return cls(
            torch.zeros(batch, spec.d_model, spec.d_ff, dtype=state_dtype(dtype), device=device),
            torch.zeros(batch, spec.chunk, spec.d_ff, dtype=dtype, device=device),
            torch.zeros(batch, spec.chunk, spec.d_target, dtype=dtype, device=device),
            torch.zeros(batch, 2, dtype=torch.int64, device=device),
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> SiteState:
        """A new state with ``fn`` applied to every tensor."""
        return SiteState(*(fn(getattr(self, name)) for name in TENSORS))


class FastWeightState:
    """Fast weights of a batch of running sequences, one :class:`SiteState` per site.

    Attributes:
        sites: per site key: ``w [B, D, F]``, ``tail_h [B, C, F]``, ``tail_t [B, C, Dt]``,
            ``counts [B, 2]`` int64 (tokens seen since the document began, chunks written).
        signature: the constants of its sites.
        owner: identity of the slow weights it was written on (see :meth:`Root.owner`).
    """

    def __init__(self, specs: Sequence[SiteSpec], sites: dict[str, SiteState], owner: object = None) -> None:
        self.specs = tuple(specs)
        self.sites = sites
        self.owner = owner

    @classmethod
    def zeros(
        cls,
        specs: Sequence[SiteSpec],
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        owner: object = None,
    ) -> FastWeightState:
        """State of ``batch`` sequences that have not begun: every row stands at the slow weights."""
        return cls(specs, {s.key: SiteState.zeros(s, batch, dtype, device) for s in specs}, owner)

    @property
    def signature(self) -> tuple[str, ...]:
        """Canonical form of the sites' constants."""
        return tuple(s.encode() for s in self.specs)

    @property
    def batch_size(self) -> int:
        """B."""
        return next(iter(self.sites.values())).counts.shape[0]

    @property
    def tokens_seen(self) -> list[int]:
        """Tokens since the document began, per row."""
        seen: list[int] = next(iter(self.sites.values())).counts[:, SEEN].tolist()
        return seen

    @property
    def chunks_written(self) -> dict[str, list[int]]:
        """Per site and row, how many chunks are in ``w``."""
        return {key: site.counts[:, WRITES].tolist() for key, site in self.sites.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held for the whole batch."""
        return sum(getattr(s, name).nbytes for s in self.sites.values() for name in TENSORS)

    def clone(self) -> FastWeightState:
        """An independent copy, bit for bit."""
        return self._map(Tensor.clone)

    def select(self, rows: Tensor) -> None:
        """Row i becomes row ``rows[i]`` (int64 ``[B']``): beam reorder, batch selection."""
        self._replace(lambda x: x.index_select(0, rows.to(x.device)))

    def repeat_interleave(self, repeats: int) -> None:
        """Every row becomes ``repeats`` rows."""
        self._replace(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Back to the slow weights and an empty tail, in place, for the given rows or all."""
        index = slice(None) if rows is None else list(rows)
        for site in self.sites.values():
            site.counts[index] = 0

    def crop(self, tokens: int) -> None:
        """Take back the last ``tokens`` tokens of every row. Exact inside the incomplete chunk.

        Raises:
            CropError: a row would have to undo a chunk that is already written; nothing changed.
        """
        if tokens <= 0:
            return
        for spec in self.specs:
            counts = self.sites[spec.key].counts
            room = counts[:, SEEN] % spec.chunk
            if bool((room < tokens).any()):
                raise CropError(
                    f"cannot take back {tokens} tokens of {spec.key}: only {room.min().item()} stand "
                    "after the "
                    "last written chunk. Fork or save the session before tokens that may be "
                    "rejected, or use a "
                    "larger chunk_size"
                )
        for site in self.sites.values():
            site.counts[:, SEEN] -= tokens

    def drift(self, weights: dict[str, Tensor]) -> dict[str, list[float]]:
        """``||W - W0||_F / ||W0||_F`` per site and row; ``weights`` maps a site's key to W0 ``[D, F]``."""
        out = {}
        for key, site in self.sites.items():
            w0 = weights[key].detach().to(site.w.dtype)
            norm = w0.norm()
            out[key] = [
                float((site.w[b] - w0).norm() / norm) if writes else 0.0
                for b, writes in enumerate(site.counts[:, WRITES].tolist())
            ]
        return out

    def _map(self, fn: Callable[[Tensor], Tensor]) -> FastWeightState:
        return FastWeightState(self.specs, {k: s.map(fn) for k, s in self.sites.items()}, self.owner)

    def _replace(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.sites = self._map(fn).sites


def bytes_per_sequence(specs: Sequence[SiteSpec], dtype: torch.dtype) -> int:
    """Bytes that one sequence's state takes, known before anything is allocated."""
    acc, element = state_dtype(dtype).itemsize, dtype.itemsize
    return sum(s.d_model * s.d_ff * acc + s.chunk * (s.d_ff + s.d_target) * element + 2 * 8 for s in specs)


def check_fits(
    state: FastWeightState, specs: Sequence[SiteSpec], batch: int, like: Tensor, owner: object
) -> None:
    """Raise unless ``state`` can run on a model with these sites, weights like ``like`` and ``batch`` rows.

    Raises:
        CacheError: with what differs and what to do.
    """
    fresh = "Start a new one: ttt.Session(model), or leave past_key_values out"
    if state.signature != tuple(s.encode() for s in specs):
        raise CacheError(f"this cache carries the fast weights of another model or configuration. {fresh}")
    if state.batch_size != batch:
        raise CacheError(
            f"this cache carries fast weights of {state.batch_size} sequences, but the call has "
            f"{batch}. Make one with ttt.Session(model, batch_size=...)"
        )
    tail = state.sites[specs[0].key].tail_h
    if tail.dtype != like.dtype or tail.device != like.device:
        raise CacheError(
            f"this cache carries fast weights of a model in {tail.dtype} on {tail.device}; the model "
            "is now in "
            f"{like.dtype} on {like.device}. {fresh}"
        )
    if state.owner != owner:
        if any(state.tokens_seen):
            raise CacheError(
                "this cache carries fast weights written on other slow weights: it belongs to "
                "another model, or "
                f"the model's weights were trained or loaded since. {fresh}"
            )
        state.owner = owner
