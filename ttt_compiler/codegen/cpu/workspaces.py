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
    """A result of undefined content, contiguous, in memory that an earlier one of this slot has given up.

    It is the caller's for as long as it, a view of it, or anything that shares its memory exists: then its
    storage gives up the object that stands for the loan, whichever thread that happens in. A slot holds as
    much as was in use at once, of the size that was asked for last. Like a tensor over a numpy array, a
    result cannot be resized to more than it is.
    """
    size = math.prod(shape) * dtype.itemsize
    slots: dict[str, list[_Loan]] = _local.__dict__.setdefault("loans", {})
    # What was of another size is freed first, if it can be, so that both are never held at once.
    loans = slots[slot] = [x for x in slots.get(slot, ()) if len(x.memory) == size]
    loan = next((x for x in loans if x.is_free), None)
    if loan is None:
        held = sum(len(x.memory) for every in slots.values() for x in every)
        if not size or held + size > MOST_LEASED:
            return torch.empty(shape, dtype=dtype, device="cpu")
        loan = _Loan(size)
        loans.append(loan)
    elif _fills_memory():
        # Not a number in any floating-point dtype.
        loan.memory.fill_(255)
    # No view of anything to autograd, unlike view().
    return torch.frombuffer(loan.lend(), dtype=dtype).resize_(shape)


class _Loan:
    """Memory that is lent again and again."""

    def __init__(self, size: int) -> None:
        self.memory = _empty((size,), torch.uint8)
        self._borrower: weakref.ref[Any] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody has it."""
        return self._borrower is None or self._borrower() is None

    def lend(self) -> Any:
        """An object over the memory, which a storage holds until its end."""
        lent = (ctypes.c_char * len(self.memory)).from_address(self.memory.data_ptr())
        lent.memory = self.memory  # type: ignore[attr-defined]  # held by the loan, whatever becomes of the slot
        self._borrower = weakref.ref(lent)
        return lent


def _fills_memory() -> bool:
    """Whether ``torch.empty`` leaves no memory as it is."""
    asked: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return asked and torch.are_deterministic_algorithms_enabled()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # A buffer made under inference mode could not be written by a later call outside of it.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device="cpu")
