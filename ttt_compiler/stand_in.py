"""A CPU in the place of a GPU: graphs of a GPU can be recorded, generated and compiled where there is none.

What decides by a tensor's device before code is generated asks here. May be changed here: who is told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# How many :func:`stands_for_gpu` are open.
_open = 0


@contextlib.contextmanager
def stands_for_gpu() -> Iterator[None]:
    """Inside, graphs of tensors on a CPU are recorded as a GPU's."""
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def runs_on_cpu(device: torch.device) -> bool:
    """Whether what is recorded for ``device`` is for a CPU."""
    return device.type == "cpu" and not _open
