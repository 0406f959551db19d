"""Where the documents of a call start, and which of its tokens are padding, by what the call passes.

Positions say it: 0 begins a document, a negative one is padding. May be changed here: the inputs of that
rule, never the rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_compiler.compat import size_hint
from ttt_compiler.errors import PositionError


def positions_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """Positions ``[1, T]`` of packed documents whose boundaries are ``cu_seqlens [n + 1]``: 0, ..., T.

    :func:`require_boundaries` has checked them.
    """
    place = torch.arange(length, device=cu_seqlens.device)
    starts = cu_seqlens[torch.bucketize(place, cu_seqlens, right=True) - 1]
    return (place - starts)[None]


def require_boundaries(cu_seqlens: object, rows: Tensor) -> None:
    """Raise unless ``cu_seqlens`` are boundaries of documents, the same in every row of ``rows [B, T, ..]``.

    Raises:
        PositionError: they are of another shape or type, go down, or do not span the call.
    """
    batch, length = rows.shape[:2]
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and not cu_seqlens.is_floating_point():
        given = cu_seqlens.tolist()
        if len(given) > 1 and given[0] == 0 and given[-1] == length and given == sorted(given):
            return
    said = f"{tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
    raise PositionError(
        f"boundaries of documents ({said}) do not fit a call of {batch} rows of {length} tokens. Pass "
        f"integers [0, ..., {length}] in ascending order: they hold for every row"
    )


def require_padding_mask(mask: Tensor, rows: Tensor) -> None:
    """Raise unless a mask of two dimensions marks padding; fake tensors will do.

    Raises:
        PositionError: it is additive, or of another shape than the tokens of ``rows [B, T, ..]``.
    """
    given, wanted = ([size_hint(d) for d in x.shape[:2]] for x in (mask, rows))
    fits = given[0] in (1, wanted[0]) and given[1] >= wanted[1]
    if mask.is_floating_point() or not fits:
        raise PositionError(
            f"attention_mask {given} of {mask.dtype}: a mask of two dimensions says which "
            f"tokens are padding, 1 or 0 for each of [batch, tokens] = {wanted}. Pass another kind "
            "of mask with four dimensions, [batch, 1, tokens, tokens]"
        )


def without_padding(
    pos: Tensor | None, mask: object, tokens: Tensor | None, *, running: bool
) -> Tensor | None:
    """Positions ``[B or 1, T]`` of a call, negative where its mask says padding.

    Args:
        pos: positions that the call names, of one or two dimensions, or None.
        mask: its attention mask; of another shape than ``[B, n]`` it says nothing of padding.
        tokens: ``[B, T, ..]``, to which the last columns of the mask belong; None: all of them do.
        running: whether a state knows where its document began.
    """
    if pos is not None and pos.dim() == 1:
        pos = pos[None]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return pos
    if tokens is not None:
        mask = mask[:, -tokens.shape[1] :]
    if pos is None:
        # Without a state the first real token begins the document.
        pos = torch.ones_like(mask, dtype=torch.int64) if running else mask.long().cumsum(-1) - 1
    return torch.where(mask == 0, -1, pos)
