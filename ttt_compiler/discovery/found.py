"""What was found in a model: plain data, no graph nodes.

May be changed here: fields, with every reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ttt_compiler.passes.dataflow import Dataflow


@dataclass(frozen=True)
class Place:
    """One place of a model that applies a down-projection weight.

    Attributes:
        weight: the weight's name as seen from that place; tied weights have several names.
        module: name of the innermost module that holds the weight and whose forward applies it; ``""`` is
            the model itself.
        call: which call of that module within one call of the model.
    """

    weight: str
    module: str
    call: int = 0


@dataclass(frozen=True)
class FoundMLP:
    """One MLP of a model, named by the weight of its down-projection.

    Attributes:
        weight: name of the down-projection's weight: a parameter, or a buffer of a quantised layer.
        d_model: D. d_ff: F.
        activation: e.g. ``"silu"``.
        gated: whether two branches are multiplied.
        kind: ``"dense"``, ``"shared"`` (an expert that sees every token), ``"moe"`` (routed experts) or
            ``"other"`` (its rows are not the tokens of the call: an image tower, patches of tokens).
        bias: whether the projection has a bias.
        transposed: whether the weight is stored ``[F, D]``.
        block: index of the block it belongs to.
        causal: whether its input at a token is independent of later tokens; None when not probed.
        places: where the model applies this weight, in the order of the forward pass.
        derived: whether the applied matrix is computed from the weight in forward (quantised, parametrised,
            one slice of many).
        dtype: dtype of the added parameters: the weight's own, or the activations' for a derived one.
        time_major: whether tokens come before rows inside of the model.
        problem: why it cannot become a fast weight whatever the configuration, or None.
        dataflow: its first use, to be drawn.
    """

    weight: str
    d_model: int
    d_ff: int
    activation: str
    gated: bool
    kind: str
    bias: bool
    transposed: bool
    block: int
    causal: bool | None
    places: tuple[Place, ...]
    derived: bool
    dtype: torch.dtype
    time_major: bool
    problem: str | None
    dataflow: Dataflow | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Discovery:
    """What a model holds.

    Attributes:
        mlps: in graph order, one entry per weight.
        rejections: (weight name or None, reason) of every contraction that is no MLP down-projection.
        embed_width: width of the token embeddings, None when the graph has none.
        graphs: how many graphs the model was captured in; 1 without graph breaks.
        keeps: an attribute of a module in which a call leaves a tensor with a row per sequence, if any: two
            sequences of such a model would mix.
    """

    mlps: tuple[FoundMLP, ...]
    rejections: tuple[tuple[str | None, str], ...]
    embed_width: int | None
    graphs: int
    keeps: str | None = None
