"""Hand-written blocks: MLPs in unusual spellings, and decoys that look like one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, FF = 64, 160


class Plain(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)
        self.inner, self.outer = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.down(self.inner(F.gelu(self.up(x)))))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, FF, False), nn.Linear(D, FF, False)
        self.down = nn.Linear(FF, D, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Bilinear(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


class Interleaved(nn.Module):
    """gpt-oss: gate and up are the even and odd columns of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gate, up = both[..., ::2], both[..., 1::2]
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return self.down((up + 1) * gate * torch.sigmoid(gate * 1.702))


class InPlace(SwiGLU):
    """Later readers of ``h`` see what was written into it."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x))
        h.mul_(self.up(x))
        y = self.down(h)
        y += 1.0
        return y


class SubNorm(nn.Module):
    """A hand-written norm between activation and down-projection (BitNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x)).square()
        return self.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


class RawParameters(nn.Module):
    """No Linear: one weight is used as stored, [in, out], the other transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(D, FF))
        self.down = nn.Parameter(torch.randn(D, FF))
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up) @ self.down.T + self.bias


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(D, FF)), nn.Parameter(torch.randn(FF, D))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("btd,df->btf", x, self.up))
        return torch.einsum("btf,fd->btd", h, self.down)


class Square(nn.Module):
    """d_ff == d_model: the layout of the weight cannot be told from its shape."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.up, self.transposed = nn.Linear(D, D), transposed
        self.down = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return h @ self.down if self.transposed else h @ self.down.transpose(0, 1)


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        s = torch.sigmoid(gate)
        return grad * up * s * (1 + gate * (1 - s)), grad * gate * s


class CustomActivation(SwiGLU):
    """Liger: the activation is an ``autograd.Function``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_SwiGLUFunction.apply(self.gate(x), self.up(x)))


class _MLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, up, down)
        return F.linear(F.relu(F.linear(x, up)), down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class WholeInAutograd(SwiGLU):
    """A fused MLP whose backward is written by hand: its forward must not be rewritten."""

    def forward(self, x: Tensor) -> Tensor:
        return _MLPFunction.apply(x, self.up.weight, self.down.weight)


class ThreeLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(D, FF), nn.Linear(FF, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.second(F.gelu(self.first(x)))))


class WithLoRA(nn.Module):
    """Low-rank updates beside every projection: only the base down-projection is one."""

    def __init__(self, rank: int = 8) -> None:
        super().__init__()
        self.mlp = SwiGLU()
        sizes = {"gate": (D, FF), "up": (D, FF), "down": (FF, D)}
        self.a = nn.ModuleDict({k: nn.Linear(i, rank, False) for k, (i, _) in sizes.items()})
        self.b = nn.ModuleDict({k: nn.Linear(rank, o, False) for k, (_, o) in sizes.items()})
        self.drop = nn.Dropout(0.1)

    def project(self, key: str, x: Tensor) -> Tensor:
        base: Tensor = getattr(self.mlp, key)(x)
        return base + 2.0 * self.b[key](self.a[key](self.drop(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.project("down", F.silu(self.project("gate", x)) * self.project("up", x))


class Routed(nn.Module):
    """A two-layer router scales the output of an MLP; the router is a decoy."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = SwiGLU()
        self.router_in, self.router_out = nn.Linear(D, 128), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.router_out(torch.tanh(self.router_in(x))).softmax(-1)
        return self.mlp(x) * weight[..., :1]


class TokenMixer(nn.Module):
    """MLP-Mixer: an MLP over the token axis."""

    def __init__(self, tokens: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tokens, 40), nn.Linear(40, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Adapter(nn.Module):
    """A Houlsby bottleneck behind an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.squeeze, self.widen = SwiGLU(), nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return y + self.widen(F.relu(self.squeeze(y)))


class GatedAttention(nn.Module):
    """The output projection of an attention with a sigmoid gate; ``wide`` makes it contract."""

    def __init__(self, wide: bool = True) -> None:
        super().__init__()
        self.width = FF if wide else D
        self.qkv, self.gate = nn.Linear(D, 3 * self.width), nn.Linear(D, self.width)
        self.out = nn.Linear(self.width, D)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = self.qkv(x).view(b, t, 3, 4, self.width // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        y = y.transpose(1, 2).reshape(b, t, self.width)
        return self.out(y * torch.sigmoid(self.gate(x)))


class Model(nn.Module):
    """Embedding, one block of gated attention and the given MLP with pre-norm residuals, head."""

    def __init__(self, make: type[nn.Module] | nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, D)
        self.attention = GatedAttention()
        self.mlp = make if isinstance(make, nn.Module) else make()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.head = nn.Linear(D, 101, False)
        self.checkpointed = checkpointed

    def block(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.checkpointed:
            x = checkpoint(self.block, x, use_reentrant=False)
        else:
            x = self.block(x)
        return self.head(x)
