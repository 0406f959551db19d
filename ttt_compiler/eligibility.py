"""Which of the MLPs that were found may become fast weights, and in which words the others are refused.

May be changed here: the rules and their wording. Nothing is converted here, and what an MLP is was decided
in ``passes/``.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence

from torch import nn

from ttt_compiler.config import TTTConfig
from ttt_compiler.discovery.choose_layers import choose_layers
from ttt_compiler.discovery.found import Discovery, FoundMLP
from ttt_compiler.errors import NoMLPFoundError, NonCausalModelError, UnsupportedModelError

ROUTED = (
    "routed experts see tokens in expert order, not in sequence order; they are left alone "
    "(see docs/experts.md)"
)


def check_sites(model: nn.Module, config: TTTConfig, found: Discovery) -> list[FoundMLP]:
    """The MLPs that ``config`` chooses, each checked.

    Raises:
        NoMLPFoundError, LayerSelectionError, NonCausalModelError, UnsupportedModelError.
    """
    candidates = candidates_of(config, found)
    if not candidates:
        raise NoMLPFoundError(_nothing_found(model, found))
    chosen = choose_layers(config, candidates)
    for mlp in chosen:
        reason = why_not(model, config, mlp, found)
        if reason is not None:
            error = NonCausalModelError if mlp.causal is False else UnsupportedModelError
            raise error(f"{mlp.weight}: {reason}")
    return list(chosen)


def candidates_of(config: TTTConfig, found: Discovery) -> list[FoundMLP]:
    """The MLPs among which ``config.layers`` chooses."""
    kinds = ("dense", "shared") if config.experts == "shared" else ("dense",)
    return [m for m in found.mlps if m.kind in kinds]


def named_layers(config: TTTConfig, chosen: Sequence[FoundMLP]) -> TTTConfig:
    """``config`` in a form that can be stored: a function in ``layers`` becomes the names it chose."""
    if not callable(config.layers):
        return config
    return dataclasses.replace(config, layers=tuple(glob.escape(mlp.weight) for mlp in chosen))


def why_not(model: nn.Module, config: TTTConfig, mlp: FoundMLP, found: Discovery) -> str | None:
    """Why this MLP cannot become a fast weight under ``config``, or None."""
    if mlp.kind == "moe":
        return ROUTED
    if mlp.kind == "shared" and config.experts == "none":
        return 'a shared expert, left out by experts="none"'
    if mlp.problem is not None:
        return mlp.problem
    if config.target == "input_embed":
        if found.embed_width is None:
            return 'target="input_embed" needs one token-embedding look-up, and the model has none or several'
        if mlp.time_major:
            return 'it sees tokens before rows ([T, B, ..]), which target="input_embed" does not'
        if not config.proj and found.embed_width != mlp.d_model:
            return (
                f"embeddings are {found.embed_width} wide, the output {mlp.d_model}: proj=False cannot "
                "bridge that"
            )
    return None


def _nothing_found(model: nn.Module, found: Discovery) -> str:
    lines = [
        f"no MLP down-projection found in {type(model).__name__} ({found.graphs} captured graphs). Refused:"
    ]
    config = TTTConfig()
    lines += [f"  {m.weight}: {why_not(model, config, m, found)}" for m in found.mlps]
    lines += [f"  {name or '<unnamed>'}: {reason}" for name, reason in found.rejections]
    if found.graphs > 1:
        lines.append(
            "Graph breaks cut the model, and may cut an MLP in two: torch.compile(model, fullgraph=True) "
            "shows where"
        )
    lines.append(
        "An MLP is a projection D -> F, a nonlinearity, and a projection F -> D into the residual stream"
    )
    return "\n".join(lines)
