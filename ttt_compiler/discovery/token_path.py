"""How tokens reach an MLP, seen from two runs that differ in the last token of the first row.

The hidden activation of a causal decoder's MLP changes at that one place and nowhere else. Where else it
changes tells what is wrong; in which layout it changes tells how rows and tokens are laid out. May be
changed here: the layouts that are understood, the words for what is not.
"""

from __future__ import annotations

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


def probe(first: Tensor | None, second: Tensor | None, leading: tuple[int, int] | None) -> TokenPath:
    """Compare the hidden activations ``[B, T, F]``, ``[T, B, F]`` or ``[B*T, F]`` of two runs.

    Args:
        first: of the run as given; None when it was not seen.
        second: of the run with another last token in row 0.
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
    if second is None or first.is_meta:
        return UNKNOWN
    seen = [
        (_changed(a, b), time_major)
        for (a, time_major), (b, _) in zip(layouts, _layouts(second, *leading), strict=True)
    ]
    for changed, time_major in seen:
        only_there = changed.sum() == 1 and bool(changed[0, -1])
        if only_there:
            return TokenPath(True, time_major)
    changed, time_major = seen[0]
    if not changed.any():
        # Something that is zero everywhere (a zero-initialised gate) says nothing.
        return TokenPath(None, time_major, CONSTANT, of_tokens=False) if bool(first.any()) else UNKNOWN
    if changed[1:].any():
        return TokenPath(None, time_major, ROWS)
    return TokenPath(False, time_major, LATER)


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
