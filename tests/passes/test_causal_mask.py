"""Masks are replaced by ``is_causal`` where they are exactly causal, and nowhere else.

Every case also runs: a graph that was changed wrongly gives other numbers than the function it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import ttt_compiler as ttt
from tests import models
from tests.passes.capture import exported, fresh_dynamo
from tests.passes.families import FAMILIES
from ttt_compiler import compat
from ttt_compiler.passes import causal_mask
from ttt_compiler.passes.base import PassState, graph_modules
from ttt_compiler.passes.causal_mask import CausalMask
from ttt_compiler.passes.index_expressions import (
    Linear,
    binary,
    broadcast,
    gathered,
    is_causal,
    normalized,
    sliced,
    steps,
    sums,
)

T = 12


def check(fn: Callable[..., Any], *args: Any, dynamic: bool = False, **kwargs: Any) -> int:
    """How many masks the pass replaces in ``fn``; the changed graph gives the same bits."""
    counts = []

    def passed(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        state = PassState(compat.fork_graph_module(gm))
        run = CausalMask()
        run(state)
        state.gm.graph.lint()
        counts.append(run.matched_count)
        written = sum(part.code.count("is_causal = True") for part in graph_modules(state.gm))
        assert written == run.matched_count, "what runs is not what stands in the graph"
        forward: Callable[..., Any] = state.gm.forward
        return forward

    with fresh_dynamo():
        out = torch.compile(fn, backend=passed, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    expected = fn(*args, **kwargs)
    out, expected = (getattr(x, "logits", x) for x in (out, expected))
    assert torch.equal(out, expected)
    assert len(counts) == 1
    return counts[0]


def qkv(queries: int = T, keys: int = T, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, n, width, generator=g) for n in (queries, keys, keys))


def attention(make: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Callable[..., Tensor]:
    """Attention with the mask that ``make`` computes from the indices of queries and keys."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=make(rows, columns), **options)

    return fn


CAUSAL = {
    "le": lambda q, k: k <= q,
    "ge": lambda q, k: q >= k,
    "lt": lambda q, k: k < q + 1,
    "gt": lambda q, k: q > k - 1,
    "shifted": lambda q, k: k + 5 <= 5 + q,
    "batched": lambda q, k: (k <= q)[None, None].expand(2, -1, -1, -1),
    "and true": lambda q, k: q.new_ones((), dtype=torch.bool) & (k <= q) & (q >= 0) & (k - 3 == k - 3),
}

OTHER = {
    "off by one, less": lambda q, k: k < q,
    "off by one, more": lambda q, k: k <= q + 1,
    "transposed": lambda q, k: q <= k,
    "all": lambda q, k: (q >= 0) & (k >= 0),
    "sliding": lambda q, k: (k <= q) & (k > q - 4),
    "sliding, one less than all": lambda q, k: (k <= q) & (k > q - (T - 1)),
    "or": lambda q, k: (k <= q) | (k < 2),
    "or true": lambda q, k: (k <= q) | (q >= 0),
    "xor true": lambda q, k: (k <= q) ^ (q >= 0),
    "xor": lambda q, k: (k <= q) ^ (k == q + 1),
    "not": lambda q, k: ~(k > q) & (k != 3),
    "chunked": lambda q, k: (k <= q) & (k // 4 == q // 4),
    "strided": lambda q, k: 2 * k <= q,
    "from the second": lambda q, k: torch.arange(1, T + 1)[None] <= q,
    "every other": lambda q, k: torch.arange(0, 2 * T, 2)[None] <= q,
    "diagonal": lambda q, k: k == q,
    "by one key": lambda q, k: (k <= q) & (k[:, 3:] != 3).all(),
    "reversed": lambda q, k: k.flip(1) <= q,
    "cut": lambda q, k: torch.arange(T + 2)[2:][None] <= q,
    "float": lambda q, k: torch.where(k <= q, 0.0, -1.0),
    "alibi": lambda q, k: (k - q).float().masked_fill(k > q, float("-inf")),
    "integers that wrap": lambda q, k: k.to(torch.uint8) - 1 <= q.to(torch.uint8),
    "gathered from the end": lambda q, k: (torch.arange(T)[k - 1] <= q) | (k == 0),
}


@pytest.mark.parametrize("dynamic", [False, True])
class TestMasks:
    @pytest.mark.parametrize("name", CAUSAL)
    def test_causal_ones_go(self, name, dynamic):
        assert check(attention(CAUSAL[name]), *qkv(), dynamic=dynamic) == 1

    @pytest.mark.parametrize("name", OTHER)
    def test_others_stay(self, name, dynamic):
        assert check(attention(OTHER[name]), *qkv(), dynamic=dynamic) == 0

    def test_a_window_of_everything_is_none(self, dynamic):
        """Only where the number of tokens is known."""
        window = attention(lambda q, k: (k <= q) & (k > q - T))
        assert check(window, *qkv(), dynamic=dynamic) == (not dynamic)

    @pytest.mark.parametrize("queries", [1, 5])
    def test_more_keys_than_queries(self, queries, dynamic):
        assert check(attention(CAUSAL["le"]), *qkv(queries), dynamic=dynamic) == 0

    def test_a_mask_that_a_caller_gives(self, dynamic):
        given = torch.ones(T, T, dtype=torch.bool).tril()

        def whole(q, k, v, m):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

        def padded(q, k, v, m):
            return attention(lambda i, j: (j <= i) & m)(q, k, v)

        assert check(whole, *qkv(), given, dynamic=dynamic) == 0
        assert check(padded, *qkv(), torch.ones(T, dtype=torch.bool), dynamic=dynamic) == 0

    def test_a_mask_that_is_written_into(self, dynamic):
        def whole(q, k):
            mask = k <= q
            mask |= k < 3
            return mask

        def part(q, k):
            mask = k <= q
            mask[:, 0:3] = True
            return mask

        def through_a_view(q, k):
            positions = k.expand(1, T)[0]
            mask = k <= q
            positions.detach().view(-1).add_(0)
            mask.t().view(-1, T).fill_(True)
            return mask

        for make in (whole, part, through_a_view):
            assert check(attention(make), *qkv(), dynamic=dynamic) == 0

    def test_positions_that_are_written_into(self, dynamic):
        def make(q, k):
            k = torch.arange(q.shape[0])
            k[2:4].fill_(0)
            return k[None] <= q

        assert check(attention(make), *qkv(), dynamic=dynamic) == 0

    def test_positional_arguments(self, dynamic):
        def fn(q, k, v):
            mask = torch.arange(q.shape[2])[None] <= torch.arange(q.shape[2])[:, None]
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.5)

        assert check(fn, *qkv(), dynamic=dynamic) == 1


def test_dropout_stays_as_it_is():
    fn = attention(CAUSAL["le"], dropout_p=0.5)
    assert check(lambda *x: fn(*x) * 0, *qkv()) == 0


def test_other_devices_stay(monkeypatch):
    monkeypatch.setattr(causal_mask, "_DEVICES", ())
    assert check(attention(CAUSAL["le"]), *qkv()) == 0


def test_what_another_function_of_that_name_returns_is_not_known():
    @torch.compiler.allow_in_graph
    def le(a, b):
        return a >= b

    assert check(attention(lambda q, k: le(q, k) & (k <= q)), *qkv()) == 0
    assert check(attention(lambda q, k: le(k, q)), *qkv()) == 0


def test_graphs_that_no_guard_watches_stay():
    class Net(nn.Module):
        def forward(self, q, k, v):
            return attention(CAUSAL["le"])(q, k, v)

    run = CausalMask()
    run(PassState(exported(Net(), *qkv())))
    assert run.matched_count == 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_without_a_cache(name, dynamic):
    model, tokens = FAMILIES[name].build(), models.ids(2, 23)
    with torch.no_grad():
        assert check(model, input_ids=tokens, use_cache=False, dynamic=dynamic) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": torch.ones(2, 23, dtype=torch.int64)},
        {"position_ids": torch.cat([torch.arange(13), torch.arange(10)])[None]},
    ],
    ids=["padding", "documents"],
)
def test_what_a_caller_gives_is_not_known(given):
    model, tokens = FAMILIES["llama"].build(), models.ids(2, 23)
    with torch.no_grad():
        assert check(model, input_ids=tokens, use_cache=False, **given) == 0


@pytest.mark.parametrize("window", [22, 23])
def test_sliding_layers(window):
    """A window as long as the text is none."""
    options = {**FAMILIES["qwen3"].options, "sliding_window": window, "num_hidden_layers": 2}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**options, **layers)
    model, tokens = transformers.AutoModelForCausalLM.from_config(config).eval(), models.ids(2, 23)
    with torch.no_grad():
        assert check(model, input_ids=tokens, use_cache=False) == (2 if window == 23 else 1)


def test_checkpointed_layers_get_it_from_outside():
    model, tokens = FAMILIES["llama"].build().train(), models.ids(2, 23)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert check(model, input_ids=tokens, use_cache=False) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [2, 33, 513, 700])
@pytest.mark.parametrize("width", [16, 64])
def test_the_kernel_gives_the_same_bits(tokens, width, dtype):
    """Forward and backward; what the pass relies on. Other devices are not in the list of the pass."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    results = []
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        leaves = [x.to(dtype).requires_grad_() for x in qkv(tokens, tokens, width)]
        out = F.scaled_dot_product_attention(*leaves, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_converted_model_without_a_cache_is_the_base_model_bit_for_bit():
    torch._dynamo.reset()
    tokens = models.ids(2, 23)
    base, model = models.tiny(), models.tiny()
    ours = torch.compile(model, backend="inplace_ttt", options={"layers": "all"}, dynamic=False)
    with torch.no_grad():
        expected = torch.compile(base, dynamic=False)(tokens, use_cache=False).logits
        assert torch.equal(ours(tokens, use_cache=False).logits, expected)
        with ttt.disabled(model):
            assert torch.equal(ours(tokens, use_cache=False).logits, expected)


class TestExpressions:
    """Against tensors: a known expression has exactly the tensor's values."""

    Q, K, ONE = Linear((1, 0), 0), Linear((0, 1), 0), Linear((0, 0), 1)

    @staticmethod
    def tensor(value, *shape):
        index = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        terms = [sum(c * i for c, i in zip(x.coefs, index, strict=True)) + x.const for x in value]
        return torch.stack([t >= 0 for t in terms]).all(0)

    @pytest.mark.parametrize("name", ["le", "lt", "ge", "gt", "eq", "ne"])
    def test_comparisons(self, name):
        op = getattr(torch, name)
        q, k = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        found = binary(name, self.Q, self.K)
        assert (found is None) == (name == "ne")
        if found is not None:
            assert torch.equal(self.tensor(found, 4, 4), op(q, k))
        for other in (1, 2):
            found = binary(name, self.ONE, Linear((0, 0), other))
            assert torch.equal(self.tensor(found, 4, 4), op(torch.ones(4, 4), other * torch.ones(4, 4)))

    def test_what_is_causal(self):
        causal = binary("le", self.K, self.Q)
        assert is_causal(causal, (4, 4))
        assert not is_causal(frozenset(), (4, 4))
        assert not is_causal(self.Q, (4, 4))
        assert not is_causal(binary("le", self.Q, self.K), (4, 4))
        assert is_causal(causal | binary("gt", self.K, binary("sub", self.Q, Linear((0, 0), 4))), (4, 4))
        assert not is_causal(causal | binary("gt", self.K, binary("sub", self.Q, Linear((0, 0), 3))), (4, 4))

    def test_an_axis_of_one_has_no_index(self):
        assert normalized(Linear((1, 2), 3), (1, 4)) == Linear((0, 2), 3)
        assert normalized(Linear((1, 2), 1 << 40), (4, 4)) is None

    def test_layouts(self):
        row = Linear((1,), 0)
        assert sliced(row, (None, slice(None))) == self.K
        assert sliced(row, (slice(0, 3), None)) == self.Q
        assert sliced(row, (slice(1, None),)) is None
        assert sliced(row, (slice(None, None, 2),)) is None
        assert sliced(row, (0,)) is None
        assert broadcast(row, (4,), (3, 4)) == self.K
        assert broadcast(row, (3,), (4, 4)) is None
        assert broadcast(self.Q, (4, 4), (4,)) is None

    def test_gathers(self):
        table = Linear((5, 1), 2)
        assert gathered(table, [self.ONE, self.K], (4, 4)) == Linear((0, 1), 7)
        assert gathered(table, [self.K], (4, 4)) is None
        assert gathered(table, [self.ONE, Linear((0, 1), -1)], (4, 4)) is None
        assert gathered(table, [self.ONE, Linear((0, -1), 9)], (4, 4)) is None
        assert gathered(None, [self.ONE, self.K], (4, 4)) is None

    def test_packed_positions(self):
        positions = Linear((0, 1), 0)
        assert steps(positions, Linear((0, 0), -1)) == self.ONE
        assert steps(positions, Linear((0, 0), 0)) is None
        assert steps(Linear((1, 1), 0), Linear((0, 0), -1)) is None
        zero = Linear((0, 0), 0)
        assert sums(binary("ne", self.ONE, self.ONE)) == sums(zero) == zero
        assert sums(self.ONE) is sums(self.K) is sums(binary("ne", self.ONE, zero)) is sums(None) is None
