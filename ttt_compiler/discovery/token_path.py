"""How tokens reach an MLP, seen from runs that differ in one token of the first row.

The hidden activation of a causal decoder's MLP changes from that token on, in that row, and nowhere else.
Where else it changes tells what is wrong; in which layout, how rows and tokens are laid out. May be changed
here: the layouts that are understood, the words for what is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Earlier tokens of a causal model do not change at all; this only forgives a library that splits its
# reductions differently between two runs.
_TOLERANCE = 1e-5

LATER = (
    "it sees later tokens (bidirectional attention), so what it writes would leak into earlier outputs. "
    "In-Place TTT needs a causal decoder"
)
ROWS = (
    "another row of the batch changes its input: either the model takes [tokens, batch, ..] (give it batch "
    "first), or its rows are not independent"
)
CONSTANT = (
    "its input does not depend on the tokens (an image, audio or prompt encoder, or a constant), so there "
    "is nothing to learn while reading"
)


@dataclass(frozen=True)
class TokenPath:
    """What the probe saw.

    Attributes:
        causal: None when the probe could not tell.
        time_major: whether the hidden activation is ``[T, B, F]``.
        problem: why the MLP cannot be a fast weight, or None.
        of_tokens: whether its rows are the tokens of the call at all.
    """

    causal: bool | None
    time_major: bool = False
    problem: str | None = None
    of_tokens: bool = True


UNKNOWN = TokenPath(None)


def probe(
    first: Tensor | None, others: Sequence[tuple[int, Tensor | None]], leading: tuple[int, int] | None
) -> TokenPath:
    """Compare the hidden activations ``[B, T, F]``, ``[T, B, F]`` or ``[B*T, F]`` of several runs.

    Args:
        first: of the run as given; None when it was not seen.
        others: of runs with another token in row 0: its position, and the activation or None.
        leading: B and T of the inputs.
    """
    if first is None or leading is None:
        return UNKNOWN
    layouts = _layouts(first, *leading)
    if not layouts:
        return TokenPath(
            None,
            problem=f"its hidden activation has shape {tuple(first.shape)} for inputs of {leading[0]} "
            f"rows of {leading[1]} tokens: it is not one row of features per token",
            of_tokens=False,
        )
    seen = [(p, other) for p, other in others if other is not None and other.shape == first.shape]
    if not seen or first.is_meta:
        return UNKNOWN
    verdicts = [_verdict(first, seen, leading, index) for index in range(len(layouts))]
    return next((v for v in verdicts if v.causal), verdicts[0])


def _verdict(
    first: Tensor, seen: Sequence[tuple[int, Tensor]], leading: tuple[int, int], index: int
) -> TokenPath:
    """What one layout makes of the changes."""
    before, time_major = _layouts(first, *leading)[index]
    moved = False
    for position, other in seen:
        changed = _changed(before, _layouts(other, *leading)[index][0])
        moved |= bool(changed.any())
        if changed[1:].any():
            return TokenPath(None, time_major, ROWS)
        if changed[0, :position].any():
            return TokenPath(False, time_major, LATER)
    if not moved:
        # Something that is zero everywhere (a zero-initialised gate) says nothing.
        return TokenPath(None, time_major, CONSTANT, of_tokens=False) if bool(first.any()) else UNKNOWN
    return TokenPath(True, time_major)


def _layouts(h: Tensor, rows: int, tokens: int) -> list[tuple[Tensor, bool]]:
    """``h`` as ``[B, T, F]`` in every way its shape allows; rows first before tokens first."""
    found = []
    if h.dim() == 3 and h.shape[:2] == (rows, tokens):
        found.append((h, False))
    if h.dim() == 3 and h.shape[:2] == (tokens, rows):
        found.append((h.transpose(0, 1), True))
    if h.dim() == 2 and h.shape[0] == rows * tokens:
        found.append((h.reshape(rows, tokens, -1), False))
        found.append((h.reshape(tokens, rows, -1).transpose(0, 1), True))
    return found


def _changed(a: Tensor, b: Tensor) -> Tensor:
    """Bool ``[B, T]``: where two ``[B, T, F]`` differ."""
    a, b = a.double(), b.double()
    changed: Tensor = (a - b).norm(dim=-1) > _TOLERANCE * a.norm(dim=-1).clamp_min(1e-30)
    return changed
