"""``ttt.rewrite`` on graphs of ``torch.export``, ``symbolic_trace`` and plain functions."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import ttt_compiler as ttt
from tests import models, unusual
from tests.unusual import CONFIG, inputs
from ttt_compiler.codegen import reference
from ttt_compiler.errors import (
    AlreadyConvertedError,
    LayerSelectionError,
    NoMLPFoundError,
    NonCausalModelError,
    PositionError,
    UnsupportedModelError,
)


class Model(torch.nn.Module):
    """Two MLPs that FX can trace by itself; a twin of it is converted the ordinary way."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(unusual.D)
        self.mlps = torch.nn.ModuleList([unusual.MLP(), unusual.MLP()])

    def forward(self, x):
        for mlp in self.mlps:
            x = x + mlp(self.norm(x.cumsum(1)))
        return x


def build():
    torch.manual_seed(0)
    return Model().eval()


def captured(kind, model, x):
    if kind == "export":
        return torch.export.export(model, (x,))
    if kind == "export.module":
        return torch.export.export(model, (x,)).module()
    if kind == "export dynamic":
        tokens = torch.export.Dim("tokens", min=2, max=64)
        return torch.export.export(model, (x,), dynamic_shapes={"x": {1: tokens}})
    if kind == "make_fx":
        return make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    return fx.symbolic_trace(model)


KINDS = ["export", "export.module", "export dynamic", "make_fx", "symbolic_trace"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_equals_the_converted_model(kind):
    x = inputs()
    model = build()
    example = None if kind == "export" else ((x,), {})
    graph = ttt.rewrite(captured(kind, model, x), CONFIG, example_inputs=example)
    added = {n: p for n, p in graph.named_parameters() if "ttt_" in n}
    assert len(added) == 4
    assert not any("ttt_" in n for n, _ in model.named_parameters())
    twin = ttt.convert(build(), CONFIG, example_inputs=((x,), {}))
    models.randomize(twin)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=1e-6)
        # In both, sites come in graph order, and conv before P.
        theirs = [p for n, p in twin.named_parameters() if "ttt_" in n]
        for p, q in zip(added.values(), theirs, strict=True):
            p.copy_(q)
        twin.compile(backend="inplace_ttt_eager")
        expected = twin(x)
        torch.testing.assert_close(graph(x), expected, rtol=1e-5, atol=1e-5)
        assert (expected - model(x)).abs().max() > 0.1
    graph(x).square().mean().backward()
    assert all(p.grad is not None for p in graph.parameters())


def test_another_length_than_the_one_captured():
    graph = ttt.rewrite(captured("export dynamic", build(), inputs()), CONFIG)
    models.randomize(graph)
    with torch.no_grad():
        torch.testing.assert_close(graph(inputs(19))[:, :11], graph(inputs(19)[:, :11]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "inplace_ttt"])
def test_a_rewritten_graph_compiles(backend):
    x = inputs()
    graph = models.randomize(ttt.rewrite(captured("export", build(), x), CONFIG))
    with torch.no_grad():
        compiled = torch.compile(graph, backend=backend)
        torch.testing.assert_close(compiled(x), graph(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(AlreadyConvertedError, match=r"ttt\.rewrite"):
        ttt.convert(graph, CONFIG, example_inputs=((x,), {}))


@pytest.mark.slow
def test_a_rewritten_program_is_packaged_ahead_of_time(tmp_path):
    """AOTInductor: one package for any length, loaded by a process that has the ops and nothing else."""
    tokens = torch.export.Dim("tokens", min=2, max=64)
    graph = models.randomize(ttt.rewrite(captured("export dynamic", build(), inputs()), CONFIG))
    x = {n: inputs(n) for n in (2, 11, 23)}
    with torch.no_grad():
        program = torch.export.export(graph, (x[11],), dynamic_shapes=({1: tokens},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        expected = {n: graph(given) for n, given in x.items()}
    torch.save(x, tmp_path / "in.pt")
    source = """
        import sys, torch, ttt_compiler.codegen.ops
        folder = sys.argv[1]
        model = torch._inductor.aoti_load_package(f"{folder}/model.pt2")
        x = torch.load(f"{folder}/in.pt")
        torch.save({n: model(given) for n, given in x.items()}, f"{folder}/out.pt")
    """
    run = [sys.executable, "-c", textwrap.dedent(source), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert path == str(tmp_path / "model.pt2")
    found = torch.load(tmp_path / "out.pt")
    for n, y in expected.items():
        torch.testing.assert_close(found[n], y, rtol=1e-4, atol=1e-4)


def test_a_function_of_its_weights():
    """No module at all: the weights are inputs of the graph, in a dictionary."""
    generator = torch.Generator().manual_seed(0)
    params = {
        "up": torch.randn(unusual.FF, unusual.D, generator=generator) * 0.2,
        "down": torch.randn(unusual.D, unusual.FF, generator=generator) * 0.2,
    }

    def fn(params, x):
        h = F.silu(F.linear(F.rms_norm(x, (unusual.D,)), params["up"]))
        return x + F.linear(h, params["down"])

    x = inputs()
    traced = make_fx(fn)(params, x)
    graph = models.randomize(ttt.rewrite(traced, CONFIG, example_inputs=((params, x), {})))
    (conv,) = (p for n, p in graph.named_parameters() if "ttt_conv" in n)
    (proj,) = (p for n, p in graph.named_parameters() if "ttt_proj" in n)
    t = F.rms_norm(x, (unusual.D,))
    h = F.silu(F.linear(t, params["up"]))
    truth = x + reference.batched(h, t, params["down"], conv, proj, 1.0, 4)
    torch.testing.assert_close(graph(params, x), truth, rtol=1e-4, atol=1e-4)


def test_a_language_model_with_positions_and_a_mask():
    tokens = models.ids(2, 13)
    pos = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6], [0, *range(12)]])
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 0] = 0
    model = models.tiny()
    wrapped = WithMask(model)
    program = torch.export.export(
        wrapped, (tokens,), kwargs={"position_ids": pos, "attention_mask": mask}, strict=False
    )
    graph = ttt.rewrite(program, CONFIG)
    twin = models.converted(scale=0.3)
    added = [p for n, p in twin.named_parameters() if "ttt_" in n]
    twin.compile(backend="inplace_ttt_eager")
    with torch.no_grad():
        for p, q in zip([p for n, p in graph.named_parameters() if "ttt_" in n], added, strict=True):
            p.copy_(q)
        expected = twin(tokens, position_ids=pos, attention_mask=mask, use_cache=False).logits
        got = graph(tokens, position_ids=pos, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


class WithMask(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, position_ids, attention_mask):
        return self.model(
            ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).logits


def test_a_mask_of_another_meaning_raises():
    tokens, pos = models.ids(2, 13), torch.arange(13)[None].expand(2, 13)
    mask = {"position_ids": pos, "attention_mask": torch.zeros(2, 13)}
    program = torch.export.export(WithMask(models.tiny()), (tokens,), kwargs=mask, strict=False)
    with pytest.raises(PositionError, match="which tokens are padding"):
        ttt.rewrite(program, CONFIG)


def test_mistakes_are_named():
    x = inputs()
    with pytest.raises(UnsupportedModelError, match="example_inputs"):
        ttt.rewrite(fx.symbolic_trace(build()), CONFIG)
    with pytest.raises(LayerSelectionError, match="layers=7"):
        ttt.rewrite(captured("export", build(), x), ttt.TTTConfig(layers=[7]))
    with pytest.raises(NoMLPFoundError):
        ttt.rewrite(torch.export.export(torch.nn.Linear(16, 16), (x,)), CONFIG)

    class Bidirectional(Model):
        def forward(self, x):
            return x + self.mlps[0](self.norm(x + x.mean(1, keepdim=True)))

    with pytest.raises(NonCausalModelError, match="later tokens"):
        ttt.rewrite(torch.export.export(Bidirectional(), (x,)), CONFIG)
