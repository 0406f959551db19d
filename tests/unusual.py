"""Hand-written models that keep or apply their down-projection weights in unusual ways, and their inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ttt_compiler as ttt
from tests import models

D, FF = 16, 40
CONFIG = ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0)
BACKEND = "inplace_ttt_eager"


def inputs(tokens: int = 11, rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, x: Tensor | None = None, scale: float = 0.3) -> nn.Module:
    """``model`` converted by example, with a random adapter unless ``scale`` is 0, and compiled."""
    ttt.convert(model.eval(), CONFIG, example_inputs=((inputs() if x is None else x,), {}))
    if scale:
        models.randomize(model, scale)
    model.compile(backend=BACKEND)
    return model


# Off: every token by itself, so that a call on a part of the sequence needs no memory but fast weights.
MIX = True


def causal_mix(x: Tensor) -> Tensor:
    """Something causal between the MLPs: the mean of all earlier tokens."""
    if not MIX:
        return x
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
    return x + x.cumsum(1) / count[None, :, None]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    """Pre-norm residual blocks of any MLPs with something causal between them."""

    def __init__(self, *mlps: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in mlps)
        self.mlps = nn.ModuleList(mlps)

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = causal_mix(x)
            x = x + mlp(norm(x))
        return x


def shared() -> nn.Module:
    """ALBERT, Zamba: one module applied in three places."""
    mlp = MLP()
    return Stack(mlp, mlp, mlp)


class Raw(nn.Module):
    """Weights as parameters of the MLP itself, in both layouts."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.w1 = nn.Parameter(torch.randn(FF, D) * 0.2)
        self.w2 = nn.Parameter(torch.randn((FF, D) if transposed else (D, FF)) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.w1.t())
        return h @ (self.w2 if self.transposed else self.w2.t())


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(D, FF) * 0.2)
        self.w2 = nn.Parameter(torch.randn(FF, D) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btf,fd->btd", F.silu(torch.einsum("btd,df->btf", x, self.w1)), self.w2)


class Reaching(nn.Module):
    """Applies a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.up(x)), self.down.weight)


class Functional(nn.Module):
    """All weights in one dictionary of the model; no module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.ParameterDict()
        for i in range(2):
            self.p[f"up{i}"] = nn.Parameter(torch.randn(FF, D) * 0.2)
            self.p[f"down{i}"] = nn.Parameter(torch.randn(D, FF) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = causal_mix(x)
            h = F.silu(F.linear(F.rms_norm(x, (D,)), self.p[f"up{i}"]))
            x = x + F.linear(h, self.p[f"down{i}"])
        return x


class Stacked(nn.Module):
    """The weights of all layers in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, FF, D) * 0.2)
        self.down = nn.Parameter(torch.randn(2, D, FF) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = causal_mix(x)
            x = x + F.linear(F.gelu(F.linear(F.rms_norm(x, (D,)), self.up[i])), self.down[i])
        return x


class Dequantising(nn.Module):
    """int8 weights with a scale per row, dequantised in forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight_int8", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_int8.to(x.dtype) * self.scale, self.bias)


class NormalisingLinear(nn.Linear):
    """BitNet: what the layer is called with is not what it projects."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, (self.in_features,)), self.weight, self.bias)


class Flattening(MLP):
    """OPT: rows and tokens in one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class TimeMajor(MLP):
    """XLNet, fairseq: tokens before rows inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class FlatTimeMajor(MLP):
    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        return super().forward(x.transpose(0, 1).reshape(t * b, d)).view(t, b, d).transpose(0, 1)


class Checkpointed(nn.Module):
    """Activation checkpointing puts the MLP into the body of a higher-order operator."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class CheckpointedRaw(nn.Module):
    """A checkpointed function, no module, over raw weights."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.ParameterDict(
            {"up": nn.Parameter(torch.randn(FF, D) * 0.2), "down": nn.Parameter(torch.randn(D, FF) * 0.2)}
        )

    def forward(self, x: Tensor) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            return F.linear(F.silu(F.linear(F.rms_norm(x, (D,)), self.p["up"])), self.p["down"])

        return x + checkpoint(mlp, causal_mix(x), use_reentrant=False)


class NanoGPT(nn.Module):
    """The layout of the well-known small trainers: ids in, logits out, no cache."""

    def __init__(self, layers: int = 2, vocab: int = 31) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, D), nn.Embedding(64, D)
        self.blocks = nn.ModuleList(_GPTBlock() for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(D), nn.Linear(D, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class _GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.c_attn, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 2, D // 2).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, D))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """``nn.TransformerEncoderLayer`` under a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, FF, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, src_mask=mask, is_causal=True)
