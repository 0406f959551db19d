"""MLPs as libraries and people write them, each with the weights that must be found.

``SPELLINGS`` holds layers for ``handmade.Model``: the names are those of the layer's own down-projections.
Add a spelling here when a model in the wild writes its MLP in a new way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.passes.handmade import FF, Bilinear, D, Einsum, Interleaved, Plain, RawParameters, SwiGLU


class TimmMlp(nn.Module):
    """timm's ``Mlp``: fc1, act, drop1, norm, fc2, drop2."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(D, FF), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.LayerNorm(FF), nn.Linear(FF, D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmGluMlp(nn.Module):
    """timm's ``GluMlp``: one projection of both halves, the gate last."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(D, 2 * FF), nn.Identity(), nn.Linear(FF, D)
        self.drop1, self.drop2 = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.norm(self.drop1(up * torch.sigmoid(gate)))))


class TorchtuneFeedForward(nn.Module):
    """torchtune: ``w2(activation(w1(x)) * w3(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(D, FF), nn.Linear(D, FF), nn.Linear(FF, D)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.w1(x))
        h = h * self.w3(x)
        return self.w2(h)


class Split(nn.Module):
    """One projection of gate and up, taken apart in a given way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.both, self.down, self.way = nn.Linear(D, 2 * FF), nn.Linear(FF, D), way

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        if self.way == "glu":
            return self.down(F.glu(both, -1))
        if self.way == "slice":
            gate, up = both[..., :FF], both[..., FF:]
        elif self.way == "split":
            gate, up = both.split(FF, dim=-1)
        elif self.way == "unbind":
            gate, up = both.unflatten(-1, (2, FF)).unbind(-2)
        else:  # pairs: columns gate, up, gate, up, ... read as a last axis of two
            gate, up = both.view(*both.shape[:-1], FF, 2).transpose(-1, -2).unbind(-2)
        return self.down(F.gelu(gate, approximate="tanh") * up)


class Matrices(nn.Module):
    """Raw parameters used by ``@`` or ``einsum``, the down-projection stored either way."""

    def __init__(self, einsum: bool, transposed: bool) -> None:
        super().__init__()
        self.einsum, self.transposed = einsum, transposed
        self.up = nn.Parameter(torch.randn(D, FF))
        self.down = nn.Parameter(torch.randn(*((FF, D) if transposed else (D, FF))))

    def forward(self, x: Tensor) -> Tensor:
        if self.einsum:
            h = F.silu(torch.einsum("...d,df->...f", x, self.up))
            return torch.einsum("...f,fd->...d" if self.transposed else "...f,df->...d", h, self.down)
        h = F.silu(x @ self.up)
        return h @ self.down if self.transposed else h @ self.down.mT


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer: tokens are flattened for ``addmm``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class SquaredRelu(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)) ** 2)


class LearnedActivation(Plain):
    """A PReLU with one slope per hidden feature, given along the last axis by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((FF,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(torch.where(h > 0, h, self.slope * h) + torch.sigmoid(h))


class ScalarPReLU(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class PostNorm(Plain):
    """Gemma-2: the MLP's output is normalised before it joins the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.post = nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.post(self.down(F.gelu(self.up(x))))


class Masked(Plain):
    """Padding tokens' hidden features are set to zero, by a mask made from the tokens' norms."""

    def forward(self, x: Tensor) -> Tensor:
        empty = x.detach().norm(dim=-1, keepdim=True) == 0
        return self.down(F.gelu(self.up(x)).masked_fill(empty, 0.0))


class FirstTokenCleared(Plain):
    """The first token's hidden features are overwritten by a constant, in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        h[:, 0] = 0.0
        return self.down(h)


class LayerScale(SwiGLU):
    """A learned factor per feature, a constant multiplier, and stochastic depth while training."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        y = 0.22 * (super().forward(x) * self.gamma)
        if self.training:
            y = y * torch.empty(y.shape[0], 1, 1).bernoulli_(0.9) / 0.9
        return y


class PaLM(nn.Module):
    """Attention and MLP in parallel, from one fused input projection."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(D, 3 * D + 2 * FF, False)
        self.attention_out, self.down = nn.Linear(D, D, False), nn.Linear(FF, D, False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v, up, gate = self.inp(x).split([D, D, D, FF, FF], dim=-1)
        q, k, v = (part.view(b, t, 4, D // 4).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, D)
        return self.attention_out(y) + self.down(F.silu(gate) * up)


class Int8Linear(nn.Module):
    """Weights are kept as int8 with a scale per group of inputs and made float in ``forward``."""

    def __init__(self, d_in: int, d_out: int, group: int = 16) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("weight", torch.randint(-127, 127, (d_out, d_in), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(d_out, d_in // group) * 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        scaled = (
            weight.to(x.dtype).view(-1, weight.shape[1] // self.group, self.group) * self.scale[..., None]
        )
        return F.linear(x, scaled.view_as(weight))


class Int4Linear(nn.Module):
    """Two four-bit weights in a byte, taken apart in ``forward``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 255, (d_out, d_in // 2), dtype=torch.uint8))
        self.scale = nn.Parameter(torch.rand(d_out, 1) * 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        packed: Any = self.packed
        parts = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        return F.linear(x, (parts.to(x.dtype) - 8) * self.scale)


class Quantised(nn.Module):
    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(D, FF), linear(D, FF), linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def _parametrised(name: str) -> Plain:
    layer = Plain()
    for linear in (layer.up, layer.down):
        if name == "weight_norm":
            parametrizations.weight_norm(linear)
        elif name == "spectral_norm":
            parametrizations.spectral_norm(linear)
        else:
            parametrize.register_parametrization(linear, "weight", _Doubled())
    return layer


class GPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.dropout = Conv1D(D, FF), Conv1D(FF, D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


_ORIGINAL = "parametrizations.weight.original"

SPELLINGS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "plain": (lambda: Plain(dropout=0.1), ["down.weight"]),
    "timm_mlp": (TimmMlp, ["fc2.weight"]),
    "timm_glu": (TimmGluMlp, ["fc2.weight"]),
    "torchtune": (TorchtuneFeedForward, ["w2.weight"]),
    "gpt2": (GPT2, ["c_proj.weight"]),
    **{
        f"split_{w}": (lambda w=w: Split(w), ["down.weight"])
        for w in ("glu", "slice", "split", "unbind", "pairs")
    },
    "interleaved": (Interleaved, ["down.weight"]),
    "bilinear": (Bilinear, ["down.weight"]),
    "raw": (RawParameters, ["down"]),
    "einsum": (Einsum, ["down"]),
    **{
        f"{'einsum' if e else 'matmul'}_{'fd' if t else 'df'}": (lambda e=e, t=t: Matrices(e, t), ["down"])
        for e in (True, False)
        for t in (True, False)
    },
    "squared_relu": (SquaredRelu, ["down.weight"]),
    "learned_activation": (LearnedActivation, ["down.weight"]),
    "prelu": (ScalarPReLU, ["down.weight"]),
    "masked": (Masked, ["down.weight"]),
    "first_token_cleared": (FirstTokenCleared, ["down.weight"]),
    "post_norm": (PostNorm, ["down.weight"]),
    "layer_scale": (LayerScale, ["down.weight"]),
    "palm": (PaLM, ["down.weight"]),
    "int8": (lambda: Quantised(Int8Linear), ["down.weight"]),
    "int4": (lambda: Quantised(Int4Linear), ["down.packed"]),
    "weight_norm": (lambda: _parametrised("weight_norm"), [f"down.{_ORIGINAL}1"]),
    "spectral_norm": (lambda: _parametrised("spectral_norm"), [f"down.{_ORIGINAL}"]),
    "parametrised": (lambda: _parametrised("doubled"), [f"down.{_ORIGINAL}"]),
}
