"""Smaller forms of a fast weight: what they may lose, and that they say how much."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_compiler.errors import ConfigError, SnapshotError
from ttt_compiler.runtime.compress import METHODS, Method, decode, encode, expected_tensors, parse_method

# fp32 has 24 bits; the factors are a product of sums of up to a few hundred terms.
EXACT = 1e-5


def measured(delta, decoded):
    norm = delta.double().norm()
    return float((decoded.double() - delta.double()).norm() / norm) if norm else 0.0


@st.composite
def deltas(draw):
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(rows, columns, generator=g) * 10.0 ** draw(st.integers(-20, 20))
    # Rows of very different size, and rows of nothing.
    x *= 10.0 ** torch.randint(-6, 6, (rows, 1), generator=g)
    return x * (torch.rand(rows, 1, generator=g) > draw(st.sampled_from([0.0, 0.3, 1.0])))


@given(deltas())
@settings(max_examples=150, deadline=None)
def test_bf16_loses_at_most_one_in_256(delta):
    tensors, error = encode(delta, "bf16")
    decoded = decode(tensors, "bf16", delta.shape)
    assert error == pytest.approx(measured(delta, decoded))
    assert error <= 2**-8
    assert ((decoded - delta).abs() <= delta.abs() * 2**-8).all()


@given(deltas())
@settings(max_examples=150, deadline=None)
def test_int8_loses_at_most_half_a_step(delta):
    tensors, error = encode(delta, "int8")
    decoded = decode(tensors, "int8", delta.shape)
    assert error == pytest.approx(measured(delta, decoded))
    step = delta.abs().amax(1, keepdim=True) / 127
    # The scale is rounded to fp32, so 127 steps may be off by 127 roundings.
    assert ((decoded - delta).abs() <= step * (0.5 + 1e-4)).all()
    assert error <= (0.5 + 1e-4) / 127 * delta.shape[1] ** 0.5


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**32), st.integers(-15, 15))
@settings(max_examples=100, deadline=None)
def test_lowrank_is_exact_up_to_its_rank(true, rank, seed, power):
    g = torch.Generator().manual_seed(seed)
    delta = torch.randn(30, true, generator=g) @ torch.randn(true, 50, generator=g) * 10.0**power
    tensors, error = encode(delta, f"lowrank:{rank}")
    assert error == pytest.approx(measured(delta, decode(tensors, f"lowrank:{rank}", delta.shape)), abs=EXACT)
    best = torch.linalg.svdvals(delta.double())
    tail = float(best[rank:].norm() / best.norm())
    assert error <= tail * 1.01 + EXACT
    if true <= rank:
        assert error <= EXACT


@pytest.mark.parametrize("method", ["bf16", "int8", "lowrank:3", "lowrank:999"])
def test_shapes_are_known_and_results_repeat(method):
    delta = torch.randn(6, 9)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, error = encode(delta, method)
    again, _ = encode(delta, method)
    assert torch.equal(torch.get_rng_state(), before), "no random number of the user is taken"
    assert all(torch.equal(first[k], again[k]) for k in first)
    expected = expected_tensors(parse_method(method), (6, 9))
    assert {k: (tuple(x.shape), x.dtype) for k, x in first.items()} == expected
    assert 0 < error < 1
    assert decode(first, method, (6, 9), torch.float64).dtype is torch.float64


def test_a_full_rank_is_nearly_exact_and_nothing_is_nothing():
    delta = torch.randn(6, 9)
    assert encode(delta, "lowrank:6")[1] < EXACT
    for method in ("bf16", "int8", "lowrank:2"):
        tensors, error = encode(torch.zeros(6, 9), method)
        assert error == 0.0
        assert not decode(tensors, method, (6, 9)).any()


def test_a_decoded_matrix_shares_nothing_with_the_file():
    delta = torch.randn(4, 4)
    tensors, _ = encode(delta, "bf16")
    decode(tensors, "bf16", (4, 4), torch.bfloat16).zero_()
    assert tensors["bf16"].any()


RANKS = ("", ":", ":0", ":-1", ":08", ": 8", ":8 ", ":٣", ":99999", ":1e3")
OTHERS = ("", "fp8", "int4", "INT8", "bf16\n", "x" * 9999, None, 8, ["bf16"], {"a": 1})


@pytest.mark.parametrize("text", [*(f"lowrank{r}" for r in RANKS), *OTHERS], ids=lambda t: repr(t)[:20])
def test_wrong_methods_list_the_right_ones(text):
    for error in (ConfigError, SnapshotError):
        with pytest.raises(error) as e:
            parse_method(text, error)
        assert all(m in str(e.value) for m in METHODS)
        assert len(str(e.value)) < 250
    with pytest.raises(ConfigError):
        encode(torch.ones(2, 2), text)


def test_methods_write_themselves():
    assert [str(parse_method(t)) for t in ("bf16", "int8", "lowrank:16")] == ["bf16", "int8", "lowrank:16"]
    assert parse_method("lowrank:16") == Method("lowrank", 16)


@pytest.mark.parametrize("method", ["bf16", "int8", "lowrank:2"])
def test_what_cannot_be_stored_and_what_does_not_fit(method):
    for bad in (float("nan"), float("inf")):
        delta = torch.ones(3, 4)
        delta[1, 2] = bad
        with pytest.raises(SnapshotError, match="NaN or Inf"):
            encode(delta, method)
    tensors, _ = encode(torch.randn(3, 4), method)
    for wrong in ({}, {**tensors, "more": torch.ones(1)}, {k: v.double() for k, v in tensors.items()}):
        with pytest.raises(SnapshotError, match="nothing was changed"):
            decode(wrong, method, (3, 4))
    with pytest.raises(SnapshotError, match="expected"):
        decode(tensors, method, (4, 3))


def test_too_large_for_its_form():
    with pytest.raises(SnapshotError, match="too large for bf16"):
        encode(torch.full((2, 2), torch.finfo(torch.float32).max), "bf16")
    for method in ("int8", "lowrank:1"):
        with pytest.raises(SnapshotError, match="too large"):
            encode(torch.full((2, 2), 1e300, dtype=torch.float64), method)
