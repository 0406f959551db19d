"""How calls of a converted model run: one after another, and without gradients where they run on a state.

May be changed here: the modes of torch that surround a call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from ttt_compiler.compat import visible_mlps


class CallLock:
    """Calls of one model run one after another; a copy of the model has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: object) -> CallLock:
        return CallLock()

    def __reduce__(self) -> tuple[type[CallLock], tuple[()]]:
        return CallLock, ()


@contextlib.contextmanager
def call_mode(stateful: bool) -> Iterator[None]:
    """How a converted model is run.

    A running state is inference: its writes are not differentiable, so such a call records no graph. And
    ``nn.TransformerEncoderLayer`` must not take its fused path, which hides its MLP from any compiler.
    """
    with torch.no_grad() if stateful else contextlib.nullcontext(), visible_mlps():
        yield
