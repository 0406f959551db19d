"""From position ids to the runs of tokens that one kernel call may treat alike.

The rule (one for new sequences, left padding and packing): position 0 starts a document, a negative
position is padding. May be changed here: how runs are found; not the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_compiler.errors import PositionError


@dataclass(frozen=True)
class Run:
    """Tokens ``[start, stop)`` of one row: padding, or consecutive tokens of one document.

    ``fresh`` means that the document starts here; otherwise the run continues what came before.
    """

    start: int
    stop: int
    fresh: bool
    padding: bool


def row_runs(pos: Tensor | None, batch: int, length: int) -> list[list[Run]]:
    """Runs of every row.

    Args:
        pos: int64 ``[B or 1, T]`` or None (one run that continues).
        batch: B.
        length: T.
    """
    if length == 0:
        return [[] for _ in range(batch)]
    if pos is None:
        return [[Run(0, length, fresh=False, padding=False)]] * batch
    rows = [_runs(row, length) for row in pos.detach().cpu().unbind(0)]
    return rows if len(rows) == batch else rows * batch


def _runs(pos: Tensor, length: int) -> list[Run]:
    padding = pos < 0
    starts = pos == 0
    starts[0] = True
    starts[1:] |= padding[1:] != padding[:-1]
    bounds = [*torch.nonzero(starts).flatten().tolist(), length]
    head = pos[torch.tensor(bounds[:-1])].tolist()
    return [
        Run(s, e, fresh=p == 0, padding=p < 0) for s, e, p in zip(bounds[:-1], bounds[1:], head, strict=True)
    ]


def documents(runs: list[Run]) -> list[Run]:
    """Document runs of a row that starts without any state, padding left out.

    Raises:
        PositionError: padding splits a document. Only a running state can join its halves.
    """
    docs: list[Run] = []
    for run in runs:
        if run.padding:
            continue
        if docs and not run.fresh:
            raise PositionError(
                f"padding before token {run.start} splits a document. Without a cache a document must be "
                "contiguous: pad on one side only, or restart position_ids at 0 where a document starts"
            )
        docs.append(run)
    return docs
