"""Integer and boolean tensors as expressions of their index, for tensors that are made of sizes only.

``arange(T)[None, :, None]`` is ``index[1]`` whatever T is; ``k <= q`` is ``index[2] - index[3] >= 0``.
Whatever is not exactly known is None. No graphs here, see ``causal_mask.py``. May be changed here: what an
operation does to an expression.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Size = int | torch.SymInt
Shape = Sequence[Size]
# Far from where int64 overflows.
_LIMIT = 1 << 31


@dataclass(frozen=True)
class Linear:
    """An integer tensor: ``const + sum(coefs[d] * index[d])``."""

    coefs: tuple[int, ...]
    const: int

    def plus(self, other: Linear, factor: int = 1) -> Linear:
        """``self + factor * other``."""
        coefs = tuple(a + factor * b for a, b in zip(self.coefs, other.coefs, strict=True))
        return Linear(coefs, self.const + factor * other.const)

    def is_constant(self) -> bool:
        """Whether it is the same at every index."""
        return not any(self.coefs)


# A boolean tensor: true where all of these are >= 0.
Conditions = frozenset[Linear]
Value = Linear | Conditions | None


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are one expression; to ask whether they are equal could add a guard."""
    return str(a) == str(b)


def constant(shape: Sequence[object], number: int) -> Linear:
    """``number`` everywhere."""
    return Linear((0,) * len(shape), number)


def each(value: Value, change: Callable[[Linear], Linear]) -> Value:
    """``value`` with its expressions changed."""
    if isinstance(value, Linear):
        return change(value)
    return None if value is None else frozenset(map(change, value))


def normalized(value: Value, shape: Shape) -> Value:
    """``value`` without the indices of axes of size one, which are 0; None for numbers that may overflow."""
    wide = [not same(size, 1) for size in shape]
    value = each(value, lambda x: Linear(tuple(map(operator.mul, x.coefs, wide)), x.const))
    numbers = [n for x in _expressions(value) for n in (*x.coefs, x.const)]
    return value if all(abs(n) <= _LIMIT for n in numbers) else None


def is_causal(value: Value, shape: Shape) -> bool:
    """Whether a mask is true exactly where the last index is not above the one before it."""
    if not isinstance(value, frozenset):
        return False
    needed = [x for x in value if not _is_never_negative(x, shape)]
    return needed == [Linear((0,) * (len(shape) - 2) + (1, -1), 0)]


def broadcast(value: Value, source: Shape, shape: Shape) -> Value:
    """``value`` of shape ``source`` as one of ``shape``."""
    new = len(shape) - len(source)
    if new < 0 or not all(same(d, 1) or same(d, s) for d, s in zip(source, shape[new:], strict=True)):
        return None
    return each(value, lambda x: Linear((0,) * new + x.coefs, x.const))


def unsqueezed(value: Value, axis: int) -> Value:
    """``value`` with one more axis, counted from the front."""
    return each(value, lambda x: Linear((*x.coefs[:axis], 0, *x.coefs[axis:]), x.const))


def sliced(value: Value, index: Sequence[object]) -> Value:
    """``value[index]`` for new axes and for slices that begin at 0."""
    kept = [isinstance(i, slice) and i.start in (None, 0) and i.step in (None, 1) for i in index]
    if not all(keep or i is None for keep, i in zip(kept, index, strict=True)):
        return None

    def change(x: Linear) -> Linear:
        coefs = iter(x.coefs)
        return Linear((*[next(coefs) if keep else 0 for keep in kept], *coefs), x.const)

    return each(value, change)


def gathered(value: Value, index: Sequence[Value], shape: Shape) -> Value:
    """``value[index]`` for one tensor of ``shape`` per axis; a negative one would count from the end."""
    places = [p for p in index if isinstance(p, Linear) and min((*p.coefs, p.const)) >= 0]
    if len(places) < len(index) or any(len(x.coefs) != len(places) for x in _expressions(value)):
        return None

    def change(x: Linear) -> Linear:
        total = constant(shape, x.const)
        for coef, place in zip(x.coefs, places, strict=True):
            total = total.plus(place, coef)
        return total

    return each(value, change)


def steps(value: Value, before: Value) -> Value:
    """Differences on the last axis, the first one from ``before`` (one wide): where all are one number."""
    if not isinstance(value, Linear) or not isinstance(before, Linear):
        return None
    step = constant(value.coefs, value.coefs[-1])
    first = Linear((*value.coefs[:-1], 0), value.const).plus(before, -1)
    return step if first == step else None


def sums(value: Value) -> Value:
    """Running sums of what is 0 or false everywhere."""
    for x in _expressions(value):
        if x.is_constant() and (x.const == 0 if isinstance(value, Linear) else x.const < 0):
            return constant(x.coefs, 0)
    return None


def binary(name: str, a: Value, b: Value) -> Value:
    """An operation of two tensors of one shape, by its canonical name."""
    if isinstance(a, frozenset) and isinstance(b, frozenset):
        return a | b if name in ("bitwise_and", "logical_and") else None
    if not isinstance(a, Linear) or not isinstance(b, Linear):
        return None
    up, down = b.plus(a, -1), a.plus(b, -1)
    match name:
        case "add":
            return a.plus(b)
        case "sub":
            return down
        case "le" | "lt":
            return frozenset((Linear(up.coefs, up.const - (name == "lt")),))
        case "ge" | "gt":
            return frozenset((Linear(down.coefs, down.const - (name == "gt")),))
        case "eq":
            return frozenset((up, down))
        case "ne" if up.is_constant():
            return frozenset((constant(up.coefs, -1 if up.const == 0 else 0),))
    return None


def _expressions(value: Value) -> tuple[Linear, ...]:
    return (value,) if isinstance(value, Linear) else tuple(value or ())


def _is_never_negative(x: Linear, shape: Shape) -> bool:
    """Whether ``x`` >= 0 at every index; of an axis of unknown size, that indices are >= 0 is all we know."""
    least = x.const
    for coef, size in zip(x.coefs, shape, strict=True):
        if coef < 0:
            if not isinstance(size, int):
                return False
            least += coef * (size - 1)
    return least >= 0
