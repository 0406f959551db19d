"""Layers written to fool the detector: each has the shapes of an MLP, and something that makes it none.

``Model(layer)`` adds ``layer(norm(x))`` to the residual stream. What each must give, and why, stands in its
docstring and in ``test_decoys.py``. Add one whenever the detector is found to be wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.handmade import FF, D, Plain, SwiGLU


class SiluGatedAttention(nn.Module):
    """Attention whose output is gated by silu(W x) and projected D -> D: its features mix tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2)).masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9)
        return self.out(scores.exp() @ v * F.silu(self.gate(x)))


class SoftmaxRouter(Plain):
    """D -> F -> D, but a softmax turns the result into weights before the residual."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).softmax(-1)


class ResidualRouter(Plain):
    """A router whose logits are a residual: ``softmax(x + MLP(x))`` weighs, it is no stream."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(F.gelu(self.up(x)))).softmax(-1)


class ResidualFeatureMap(Plain):
    """Linear attention whose queries and keys are ``x + MLP(x)``: the sum goes into scores."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q = x + self.down(F.gelu(self.up(x)))
        scores = (q @ q.transpose(1, 2)).tril()
        return scores @ self.v(x)


class SigmoidGate(Plain):
    """D -> F -> D makes a gate for x, not an update of the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.down(F.gelu(self.up(x))))


class RecurrentBuffer(nn.Module):
    """A gated linear recurrence, unrolled: each token's state is written into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, FF), nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        u, decay = self.up(x), torch.sigmoid(self.gate(x))
        states = torch.zeros(u.shape)
        state = u[:, 0] * 0
        for t in range(4):
            state = decay[:, t] * state + u[:, t]
            states[:, t] = state
        return self.down(states * F.silu(self.gate(x)))


class GatedConvolution(nn.Module):
    """A short causal convolution stands between the projections (an SSM's input branch)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, FF), nn.Linear(D, FF), nn.Linear(FF, D)
        self.conv = nn.Conv1d(FF, FF, 4, groups=FF, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv(self.up(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.down(F.silu(u) * self.gate(x))


class NonlinearLatentQuery(nn.Module):
    """MLA's pair of projections with a nonlinearity between; the result is a query."""

    def __init__(self, rank: int = FF) -> None:
        super().__init__()
        self.q_a, self.q_b = nn.Linear(D, rank), nn.Linear(rank, D)
        self.kv, self.out = nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        q = self.q_b(F.silu(self.q_a(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class TwoInputs(SwiGLU):
    """The gate reads x, the up-projection reads norm(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(F.layer_norm(x, (D,))))


class Rolled(SwiGLU):
    """The hidden activation is shifted by one token with ``torch.roll``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.roll(F.silu(self.gate(x)) * self.up(x), 1, 1))


class ShiftedByCat(SwiGLU):
    """The same shift, as a concatenation of zeros and a slice."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1))


class ShiftedBySlices(SwiGLU):
    """Gate and up come from neighbouring tokens; the result is padded to length again."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x))[:, 1:] * self.up(x)[:, :-1]
        return F.pad(self.down(h), (0, 0, 1, 0))


class FixedTokenOrder(SwiGLU):
    """The hidden activation's tokens are put into another, constant order."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h[:, torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])])


class ScrambledByViews(SwiGLU):
    """Features and tokens are mixed by a transpose and a reshape alone, inside of the activation."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(F.relu(h.transpose(1, 2)).reshape(h.shape))


class TokensSwappedByViews(SwiGLU):
    """Even and odd tokens change places by views of the token axis; features stay last."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h.view(b, t // 2, 2, FF).transpose(1, 2).reshape(b, t, FF))


class FirstTokenSubtracted(SwiGLU):
    """Every token's hidden activation minus that of the first token."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h - h[:, :1])


class LastTokenRepeated(SwiGLU):
    """The last token's hidden activation, for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h[:, [-1]].expand_as(h))


class Pairwise(SwiGLU):
    """Sums over pairs of tokens, by broadcasting alone: no contraction, no softmax."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.silu(self.gate(x)), self.up(x)
        return self.down((a[:, :, None] * b[:, None]).sum(2))


class TokenMax(SwiGLU):
    """From every hidden feature its maximum over the tokens is subtracted."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h - h.max(dim=1, keepdim=True).values)


class TokenNormalised(SwiGLU):
    """The hidden activation is normalised along the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.normalize(F.silu(self.gate(x)) * self.up(x), dim=1))


class TokenLayerNorm(SwiGLU):
    """Layer norm over tokens and features together."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(F.layer_norm(h, h.shape[1:]))


class HiddenCumsum(SwiGLU):
    """A running sum over tokens before the down-projection."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down((F.silu(self.gate(x)) * self.up(x)).cumsum(1))


class OutputCumsum(SwiGLU):
    """A running sum over tokens after the down-projection."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x)).cumsum(1)


class SortedFeatures(SwiGLU):
    """The order of the hidden features depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h.gather(-1, self.up(x).argsort(-1)))


class FixedFeatureOrder(SwiGLU):
    """A constant order of the hidden features (GPTQ's act-order): this one *is* an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(FF))

    def forward(self, x: Tensor) -> Tensor:
        return self.down((F.silu(self.gate(x)) * self.up(x))[..., self.order])


class ParallelAdapter(nn.Module):
    """A low-rank adapter with relu beside the MLP: only the MLP is one."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.squeeze, self.widen = Plain(), nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + 0.1 * self.widen(F.relu(self.squeeze(x)))


class HyperDown(nn.Module):
    """The down-projection's weight is computed from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.make = nn.Linear(D, FF), nn.Linear(D, FF * D)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean(1)).view(-1, FF, D)
        return torch.bmm(F.gelu(self.up(x)), weight)


class HyperUp(nn.Module):
    """The up-projection's weight is computed from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.down = nn.Linear(D, FF * D), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(x.mean(1)).view(-1, D, FF)
        return self.down(F.gelu(torch.bmm(x, weight)))


class WeightProduct(nn.Module):
    """The weight is a product of two parameters: neither of them is the down-projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, FF)
        self.left, self.right = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, FF))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.up(x)), self.left @ self.right)


class TwoDowns(Plain):
    """The hidden activation is read by two projections into the stream: both are down-projections."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h) + 0.5 * self.second(h)


class DownAndHead(Plain):
    """The hidden activation is also read by a gate over the tokens: only ``down`` is one."""

    def __init__(self) -> None:
        super().__init__()
        self.halt = nn.Linear(FF, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h) * torch.sigmoid(self.halt(h))


class Coincidence(nn.Module):
    """An MLP over features of ``width``: nothing may depend on widths being different."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, width), nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class TokenMean(Coincidence):
    """Centres the hidden features over the tokens; with F == T no shape says over which axis."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h - h.mean(dim=-2).unsqueeze(1))


class TokenMLP(nn.Module):
    """An MLP over the token axis of a sequence as long as it is wide, normalised after the transpose."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(tokens), nn.Linear(tokens, FF), nn.Linear(FF, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x.transpose(1, 2))))).transpose(1, 2)


class ScaledStream(Plain):
    """``x + n(x) * (1 + MLP(n(x)))``: the output scales the stream, it is not added to it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.down(F.gelu(self.up(x))))


class LastOutputForAll(Plain):
    """Every token gets the last token's output: causal by no means."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))[:, -1:].expand(x.shape)


class Restrided(Plain):
    """``as_strided`` exchanges rows and tokens of the hidden features behind the shapes' back."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        b, t, f = h.shape
        return self.down(h.as_strided((b, t, f), (f, b * f, 1)))
