"""Memory that outlives a call: buffers that no result lies in, and results whose memory comes back.

A large tensor that is new costs the kernel's clearing of its pages, about as long as filling it eight times.
Held per thread is what one site takes, the one that was used last. May be changed here: what is held, and how
long.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

# Bytes of results that a thread holds at most.
MOST_LEASED = 256 << 20

_local = threading.local()


def release_workspaces() -> None:
    """Free this thread's memory; the next call makes what it needs. Results that are in use stay."""
    _local.__dict__.clear()


def workspace(slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer, one per thread and slot; its content is undefined.

    Only the last size per slot is kept, so what is held is one site of the model used last.
    """
    held: dict[str, Tensor] = _local.__dict__.setdefault("held", {})
    buffer = held.get(slot)
    if buffer is None or buffer.shape != shape or buffer.dtype != dtype:
        buffer = held[slot] = _empty(shape, dtype)
    return buffer


def leased(slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A result of undefined content, contiguous, in the memory of this slot's last one if nobody uses it.

    It is the caller's for as long as it, a view of it, or anything that shares its memory exists: then its
    storage gives up the object that stands for the loan, whichever thread that happens in. While it exists,
    another call gets new memory, which the slot holds from then on. Like a tensor over a numpy array, it
    cannot be resized to more than it is.
    """
    size = math.prod(shape) * dtype.itemsize
    loans: dict[str, tuple[Tensor, weakref.ref[Any]]] = _local.__dict__.setdefault("loans", {})
    memory, loan = loans.get(slot, (None, None))
    if memory is None or loan is None or loan() is not None or len(memory) != size:
        # What lies there is freed first, if it can be, so that both are never held at once.
        del memory
        loans.pop(slot, None)
        if not size or size + sum(len(held) for held, _ in loans.values()) > MOST_LEASED:
            return torch.empty(shape, dtype=dtype, device="cpu")
        memory = _empty((size,), torch.uint8)
    elif _fills_memory():
        # Not a number in any floating-point dtype.
        memory.fill_(255)
    lent = (ctypes.c_char * size).from_address(memory.data_ptr())
    lent.memory = memory  # type: ignore[attr-defined]  # held by the loan, whatever becomes of the slot
    loans[slot] = memory, weakref.ref(lent)
    # No view of anything to autograd, unlike view().
    return torch.frombuffer(lent, dtype=dtype).resize_(shape)


def _fills_memory() -> bool:
    """Whether ``torch.empty`` leaves no memory as it is."""
    asked: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return asked and torch.are_deterministic_algorithms_enabled()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # A buffer made under inference mode could not be written by a later call outside of it.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")
