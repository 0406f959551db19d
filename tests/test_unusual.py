"""Conversion does not care where a weight lives or how it is applied: the same laws for all of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

import ttt_compiler as ttt
from tests import models, unusual
from tests.unusual import CONFIG
from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.compat import visible_mlps
from ttt_compiler.runtime.root import require_root


def normed():
    mlp = unusual.MLP()
    weight_norm(mlp.down)
    return unusual.Stack(mlp, unusual.MLP())


def quantised():
    mlp = unusual.MLP()
    mlp.down = unusual.Dequantising(mlp.down)
    return unusual.Stack(mlp, unusual.MLP())


def checkpointed_shared():
    mlp = unusual.MLP()
    return unusual.Stack(unusual.Checkpointed(mlp), unusual.Checkpointed(mlp))


def bitnet():
    mlp = unusual.MLP()
    mlp.down = unusual.NormalisingLinear(unusual.FF, unusual.D)
    return unusual.Stack(mlp)


# name: (how to build it, the names of its sites)
ZOO = {
    "shared": (unusual.shared, [f"mlps.0.down.weight{u}" for u in ("", "@1", "@2")]),
    "raw": (lambda: unusual.Stack(unusual.Raw(False), unusual.Raw(True)), ["mlps.0.w2", "mlps.1.w2"]),
    "einsum": (lambda: unusual.Stack(unusual.Einsum()), ["mlps.0.w2"]),
    "reaching": (lambda: unusual.Stack(unusual.Reaching()), ["mlps.0.down.weight"]),
    "functional": (unusual.Functional, ["p.down0", "p.down1"]),
    "stacked": (unusual.Stacked, ["down", "down@1"]),
    "weight_norm": (normed, ["mlps.0.down.parametrizations.weight.original1", "mlps.1.down.weight"]),
    "int8": (quantised, ["mlps.0.down.weight_int8", "mlps.1.down.weight"]),
    "bitnet": (bitnet, ["mlps.0.down.weight"]),
    "flat": (lambda: unusual.Stack(unusual.Flattening()), ["mlps.0.down.weight"]),
    "time_major": (lambda: unusual.Stack(unusual.TimeMajor()), ["mlps.0.down.weight"]),
    "flat_time_major": (lambda: unusual.Stack(unusual.FlatTimeMajor()), ["mlps.0.down.weight"]),
    "checkpointed": (
        lambda: unusual.Stack(unusual.Checkpointed(unusual.MLP())),
        ["mlps.0.inner.down.weight"],
    ),
    "checkpointed_shared": (
        checkpointed_shared,
        ["mlps.0.inner.down.weight", "mlps.0.inner.down.weight@1"],
    ),
    "checkpointed_raw": (unusual.CheckpointedRaw, ["p.down"]),
    "nanogpt": (unusual.NanoGPT, ["blocks.0.mlp.2.weight", "blocks.1.mlp.2.weight"]),
    "encoder": (unusual.Encoder, ["layer.linear2.weight"]),
}


def inputs(model, tokens=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, unusual.NanoGPT):
        return torch.randint(0, 31, (2, tokens), generator=generator)
    return torch.randn(2, tokens, unusual.D, generator=generator)


def build(name):
    torch.manual_seed(0)
    return ZOO[name][0]().eval()


def compiled(model, backend="inplace_ttt_eager"):
    model.compile(backend=backend)
    return model


@pytest.mark.parametrize("name", ZOO)
def test_every_site_is_found_equals_the_base_and_computes_the_reference(name):
    torch._dynamo.reset()
    model = build(name)
    x = inputs(model)
    with torch.no_grad(), visible_mlps():
        base = torch.compile(model, backend="eager")(x)
        ttt.convert(model, CONFIG, example_inputs=((x[:, :9],), {}))
        assert [s.key for s in require_root(model)[1].specs] == ZOO[name][1]
        compiled(model)
        assert torch.equal(model(x), base)
        models.randomize(model)
        y, truth = model(x), reference(name, model, x)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)
    assert (y - base).abs().max() > 0.05


def reference(name, model, x):
    """The oracle recognises a weight by its memory; one computed in forward is given to a plain copy."""
    if name not in ("weight_norm", "int8"):
        return oracle_call(model, x)
    plain = unusual.Stack(unusual.MLP(), unusual.MLP())
    names = plain.state_dict()
    state = {k: v for k, v in model.state_dict().items() if k in names}
    down = model.mlps[0].down
    weight = down.weight if name == "weight_norm" else down.weight_int8.float() * down.scale
    plain.load_state_dict(state | {"mlps.0.down.weight": weight})
    torch._dynamo.reset()
    ttt.convert(plain, CONFIG, example_inputs=((x,), {}))
    mine, theirs = require_root(model)[1], require_root(plain)[1]
    for a, b in zip(mine.specs, theirs.specs, strict=True):
        for source, copy in zip(mine.parameters(a), theirs.parameters(b), strict=True):
            copy.data.copy_(source)
    return oracle_call(plain, x)


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("encoder", "nanogpt", "checkpointed_shared")])
def test_segments_on_a_running_state_equal_the_whole(name, monkeypatch):
    monkeypatch.setattr(unusual, "MIX", False)
    torch._dynamo.reset()
    model = build(name)
    x = inputs(model)
    ttt.convert(model, CONFIG, example_inputs=((x[:, :9],), {}))
    compiled(models.randomize(model))
    with torch.no_grad():
        whole = model(x)
        session = ttt.Session(model, 2)
        parts = [model(part, ttt_state=session.state) for part in x.split([3, 6, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert session.state.chunks_written == {s.key: [2, 2] for s in require_root(model)[1].specs}


@pytest.mark.parametrize(
    "name", ["shared", "raw", "stacked", "int8", "checkpointed", "checkpointed_shared", "checkpointed_raw"]
)
def test_gradients_reach_everything_that_trains(name, monkeypatch):
    torch._dynamo.reset()
    model = build(name).train()
    x = inputs(model)
    ttt.convert(model, CONFIG, example_inputs=((x[:, :9],), {}))
    models.randomize(model)
    names = [n for n, _ in model.named_parameters()]
    with monkeypatch.context() as patch:
        # The oracle replaces what runs, and would miss what checkpointing runs again.
        patch.setattr(unusual, "checkpoint", lambda fn, x, **_: fn(x))
        reference(name, model, x).square().mean().backward()
    truth = [p.grad for p in model.parameters()] if name != "int8" else None
    model.zero_grad()
    compiled(model)(x).square().mean().backward()
    for i, (n, p) in enumerate(model.named_parameters()):
        assert p.grad is not None, n
        if truth is not None:
            torch.testing.assert_close(p.grad, truth[i], rtol=1e-3, atol=1e-4, msg=names[i])


def test_revert_gives_everything_back():
    for name in ZOO:
        model = build(name)
        state, classes = list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
        ttt.convert(model, CONFIG, example_inputs=((inputs(model),), {}))
        assert len(list(model.state_dict())) > len(state)
        ttt.revert(model)
        assert list(model.state_dict()) == state
        assert {n: type(m) for n, m in model.named_modules()} == classes


def test_adapters_of_unusual_models_travel(tmp_path):
    for name in ("shared", "functional", "int8"):
        example = ((inputs(build(name)),), {})
        model = models.randomize(ttt.convert(build(name), CONFIG, example_inputs=example))
        ttt.save_adapter(model, tmp_path / name)
        other = ttt.load_adapter(build(name), tmp_path / name, example_inputs=example)
        added = {k: v for k, v in model.state_dict().items() if "ttt_" in k}
        assert added
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in added.items())


@pytest.mark.parametrize("name", ["shared", "stacked", "int8", "weight_norm"])
def test_sessions_of_unusual_models_travel(name, monkeypatch, tmp_path):
    monkeypatch.setattr(unusual, "MIX", False)
    torch._dynamo.reset()
    model = build(name)
    x = inputs(model)
    ttt.convert(model, CONFIG, example_inputs=((x[:, :9],), {}))
    compiled(models.randomize(model))
    with torch.no_grad():
        session = ttt.Session(model, 2)
        model(x[:, :6], ttt_state=session.state)
        session.save(tmp_path / "session.ttt")
        others = [ttt.Session.load(model, tmp_path / "session.ttt"), session.fork()]
        y, *same = (model(x[:, 6:], ttt_state=s.state) for s in (session, *others))
    assert all(torch.equal(y, z) for z in same)
    assert session.state.chunks_written == {s.key: [2, 2] for s in require_root(model)[1].specs}


@pytest.mark.slow
def test_inductor_computes_the_same_for_all_of_them_in_one_model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    mlp, normed_mlp = unusual.MLP(), unusual.MLP()
    weight_norm(normed_mlp.down)
    quantised_mlp = unusual.MLP()
    quantised_mlp.down = unusual.Dequantising(quantised_mlp.down)
    model = unusual.Stack(
        *(mlp, unusual.Raw(True), unusual.Einsum(), mlp, unusual.Reaching(), unusual.Flattening()),
        *(normed_mlp, unusual.TimeMajor(), quantised_mlp, unusual.Checkpointed(unusual.MLP())),
    ).eval()
    x = inputs(model)
    with torch.no_grad():
        base = torch.compile(model, dynamic=False)(x)
        ttt.convert(model, CONFIG, example_inputs=((x,), {}))
        assert len(require_root(model)[1].specs) == 10
        model.compile(backend="inplace_ttt", dynamic=False)
        assert torch.equal(model(x), base)
        models.randomize(model, 0.1)
        fast = model(x)
        torch._dynamo.reset()
        model.compile(backend="inplace_ttt_eager", dynamic=False)
        torch.testing.assert_close(fast, model(x), rtol=1e-3, atol=1e-3)
    assert (fast - base).abs().max() > 0.05
