"""What fast weights have done so far, in numbers: how far they moved, how large their writes were.

May be changed here: what is reported. Nothing is computed while a sequence runs but what the state counts
anyway; distances are found when somebody asks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ttt_compiler.codegen.layout import CLIPPED, DONE, LAST, PEAK, SEEN, SKIPPED, TOTAL, WRITES
from ttt_compiler.runtime.session import Session


@dataclass(frozen=True)
class SiteStats:
    """One fast-weight layer of one sequence, since its document began.

    Attributes:
        layer: key of the site: its weight's name.
        sequence: row of the batch.
        tokens: tokens seen.
        chunks: complete chunks.
        written: how many of them are in the matrix.
        skipped: how many were left out because they held NaN or Inf.
        clipped: how many writes were scaled down to the limit.
        delta_norm: ``||W - W0||_F``; None where W0 exists inside of the forward pass only.
        drift: ``||W - W0||_F / ||W0||_F``; None as above.
        write_norm: Frobenius norm of the last write, of the largest, and their mean: exact where a limit is
            set, otherwise the upper bound ``||v||_F ||h||_F``.
    """

    layer: str
    sequence: int
    tokens: int
    chunks: int
    written: int
    skipped: int
    clipped: int
    delta_norm: float | None
    drift: float | None
    write_norm_last: float
    write_norm_peak: float
    write_norm_mean: float
    write_norm_exact: bool


class Stats(tuple[SiteStats, ...]):
    """Per layer and sequence one :class:`SiteStats`; prints as a table."""

    __slots__ = ()

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-ready."""
        return [dataclasses.asdict(site) for site in self]

    def __str__(self) -> str:
        head = ("layer", "row", "tokens", "chunks", "written", "skipped", "clipped", "drift", "last", "peak")
        lines = [head, *(_cells(s) for s in self)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        rows = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        exact = all(s.write_norm_exact for s in self)
        return "\n".join([*rows, f"last, peak: norm of a write{'' if exact else ', upper bound'}"])


def stats(session: Session) -> Stats:
    """How far each fast weight of ``session`` has moved, and what was written, skipped and clipped."""
    with session.standing_still():
        return _stats(session)


def _stats(session: Session) -> Stats:
    state, out = session.state, []
    for spec in state.specs:
        w0 = None if spec.derived or spec.inner else session.weight(spec).detach()
        norm0 = None if w0 is None else float(torch.linalg.vector_norm(w0.to(state.sites[spec.key].w.dtype)))
        table = state.sites[spec.key].rows[state.batch].tolist()
        norms = state.sites[spec.key].norms[state.batch].tolist()
        for b, (counts, written) in enumerate(zip(table, norms, strict=True)):
            delta = None
            if w0 is not None:
                moved = state.matrix(spec.key, b, w0) - w0
                delta = float(torch.linalg.vector_norm(moved)) if counts[WRITES] else 0.0
            out.append(
                SiteStats(
                    layer=spec.key,
                    sequence=b,
                    tokens=counts[SEEN],
                    chunks=counts[DONE],
                    written=counts[WRITES],
                    skipped=counts[SKIPPED],
                    clipped=counts[CLIPPED],
                    delta_norm=delta,
                    drift=None if delta is None or not norm0 else delta / norm0,
                    write_norm_last=written[LAST],
                    write_norm_peak=written[PEAK],
                    write_norm_mean=written[TOTAL] / max(1, counts[WRITES]),
                    write_norm_exact=spec.rule.limited,
                )
            )
    return Stats(out)


def _cells(s: SiteStats) -> tuple[str, ...]:
    drift = "-" if s.drift is None else f"{s.drift:.3%}"
    counters = (s.sequence, s.tokens, s.chunks, s.written, s.skipped, s.clipped)
    return (s.layer, *map(str, counters), drift, f"{s.write_norm_last:.3g}", f"{s.write_norm_peak:.3g}")
