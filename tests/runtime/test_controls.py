"""Update controls and packed documents end to end: three ways to compute, numbers that agree, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ttt_compiler as ttt
from tests import models, unusual
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.adapter import CONFIG_FILE, TENSOR_FILE
from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.codegen import reference
from ttt_compiler.codegen.cpu.controls import limited
from ttt_compiler.codegen.cpu.step import fast_weight_step
from ttt_compiler.codegen.layout import SKIPPED
from ttt_compiler.errors import ConfigError, GraphRewriteError, NonFiniteWriteError, PositionError
from ttt_compiler.runtime.files import HEADER, MARK
from ttt_compiler.runtime.root import require_root
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, WriteRule

EAGER = "inplace_ttt_eager"
OPTIONS = ("normalize_keys", "max_write_norm", "max_write_ratio", "decay", "on_nonfinite")
EVERYTHING = {
    "normalize_keys": "unit",
    "max_write_norm": 0.4,
    "max_write_ratio": 0.25,
    "decay": 0.8,
    "on_nonfinite": "skip",
}
CONTROLS = {
    "unit": {"normalize_keys": "unit"},
    "mean": {"normalize_keys": "mean"},
    "norm": {"max_write_norm": 0.2},
    "ratio": {"max_write_ratio": 0.1},
    "decay": {"decay": 0.7},
    "everything": EVERYTHING,
}
# Gradients of two fp32 runs: sums of as many terms as the batch has tokens, through both layers.
GRADIENTS = 1e-4


def built(backend=EAGER, **controls):
    torch._dynamo.reset()
    model = models.converted(**controls)
    model.compile(backend=backend, dynamic=True)
    return model


def plain(model, *, example=None, **controls):
    """A hand-written model, converted with controls and compiled."""
    torch._dynamo.reset()
    config = ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0, **controls)
    ttt.convert(
        model.eval(), config, example_inputs=((unusual.inputs() if example is None else example,), {})
    )
    models.randomize(model)
    model.compile(backend=EAGER, dynamic=True)
    return model


def in_pieces(model, tokens, sizes):
    session = ttt.Session(model, batch_size=tokens.shape[0])
    parts = [model(part, past_key_values=session.cache).logits for part in tokens.split(sizes, 1)]
    return torch.cat(parts, 1), session


CASES = [(name, EAGER) for name in CONTROLS] + [("everything", "inplace_ttt")]


@pytest.mark.parametrize(("name", "backend"), CASES, ids=[f"{n}-{b}" for n, b in CASES])
def test_a_running_state_a_whole_call_and_the_reference_agree(name, backend):
    model = built(backend, **CONTROLS[name])
    tokens = models.ids(2, 27)
    with torch.no_grad():
        expected, free = models.oracle(model, tokens), models.oracle(models.converted(), tokens)
        whole = model(tokens, use_cache=False).logits
        pieces, _ = in_pieces(model, tokens, [6, 13, 1, 1, 6])
    assert relative_error(expected, free) > 1e-2, "the control changes what is computed"
    assert relative_error(whole, expected) < SEGMENTATION
    assert relative_error(pieces, expected) < SEGMENTATION


def test_rows_that_cancel_do_not_slip_past_the_limit():
    """Their write is small beside ``||v|| ||h||``, and large beside the limit."""
    g = torch.Generator().manual_seed(0)
    v, h = torch.randn(1, 256, generator=g), torch.randn(1, 768, generator=g)
    for rest in (0.1, 1e-2, 1e-3, 1e-4, 1e-5):
        u, k = torch.cat([v, -(1 - rest) * v]).repeat(8, 1), h.repeat(16, 1)
        exact = (u.double().t() @ k.double()).norm()
        scaled, norm = limited(u, k, exact.float() / 2, unit_keys=False)
        assert float(norm) == pytest.approx(float(exact), rel=1e-3)
        written = (scaled.double().t() @ k.double()).norm()
        assert float(written) == pytest.approx(float(exact) / 2, rel=0.02)


def test_waiting_chunks_follow_a_changed_adapter():
    """A chunk that acts from the tail is that which will be written."""
    model = plain(unusual.Stack(unusual.MLP()))
    x = unusual.inputs(tokens=17, rows=1)
    with torch.no_grad():
        sessions = [ttt.Session(model, revocable=9) for _ in range(2)]
        model(x[:, :7], ttt_state=sessions[0].state)
        branch = sessions[0].fork()
        models.randomize(model, seed=11)
        model(x[:, :7], ttt_state=sessions[1].state)
        assert sessions[0].state.chunks_written == sessions[1].state.chunks_written
        y = [model(x[:, 7:9], ttt_state=s.state) for s in (sessions[1], sessions[0], branch)]
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[0], y[2])


def test_unit_keys_of_a_tiny_norm_in_fp16_are_refused_not_written_wrong():
    """``v / ||h||`` is kept in the model's dtype: what does not fit is an error, or counted as skipped."""
    one = SiteSpec("w", 8, 16, 8, 4, 1.0, "hidden_states", False, 5, "", rule=WriteRule(keys="unit"))
    g = torch.Generator().manual_seed(0)
    h, t, w0, conv = (torch.randn(s, generator=g) for s in ((1, 4, 16), (1, 4, 8), (8, 16), (8, 1, 5)))
    given = [x.half() for x in (h * 1e-5, t * 100, w0, conv)]
    for mode in ("raise", "skip"):
        one = dataclasses.replace(one, rule=WriteRule(keys="unit", on_nonfinite=mode))
        state = FastWeightState.zeros([one], 1, torch.float16, torch.device("cpu"))
        call = (*given[:3], None, given[3], None, None, one, state.sites["w"], state.batch)
        with pytest.raises(NonFiniteWriteError) if mode == "raise" else contextlib.nullcontext():
            fast_weight_step(*call)
    assert state.column("w", SKIPPED) == [1]
    assert state.chunks_written == {"w": [0]}


@pytest.mark.parametrize("revocable", [0, 6])
def test_a_chunk_of_nan_is_skipped_alike_everywhere(monkeypatch, revocable):
    """Without mixing a NaN stays in its token, so what follows its chunk says whether it was written."""
    monkeypatch.setattr(unusual, "MIX", False)
    model = plain(unusual.Stack(unusual.MLP()), on_nonfinite="skip", decay=0.9)
    x = unusual.inputs(tokens=19)
    x[1, 5, 3] = float("nan")
    with torch.no_grad():
        expected = oracle_call(model, x)
        assert expected.isnan().any(-1).nonzero().tolist() == [[1, 5]]
        session = ttt.Session(model, 2, revocable=revocable)
        pieces = [model(part, ttt_state=session.state) for part in x.split([3, 4, 1, 1, 10], 1)]
        for y in (model(x), torch.cat(pieces, 1)):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    if revocable == 0:
        (first, second) = ttt.stats(session)
        assert (first.chunks, first.written, first.skipped) == (4, 4, 0)
        assert (second.chunks, second.written, second.skipped) == (4, 3, 1)


def test_a_chunk_of_nan_raises_without_a_state_too():
    model = plain(unusual.Stack(unusual.MLP()))
    x = unusual.inputs(tokens=9)
    x[0, 2] = float("inf")
    with pytest.raises(NonFiniteWriteError):
        model(x)


@pytest.mark.parametrize("name", ["everything", "ratio", "unit"])
def test_gradients_are_those_of_the_reference(name):
    model = built(**CONTROLS[name])
    tokens = models.ids(2, 19)
    expected = models.oracle_gradients(model, tokens)
    model(tokens, use_cache=False).logits.square().mean().backward()
    assert expected.keys() == {n for n, _ in model.named_parameters()}
    for parameter, value in model.named_parameters():
        assert relative_error(value.grad, expected[parameter]) < GRADIENTS, parameter


@pytest.mark.parametrize("name", ["everything", "norm", "decay"])
def test_stats_obey_their_laws(name):
    model = built(**CONTROLS[name])
    tokens = models.ids(2, 27)
    session = in_pieces(model, tokens, [9, 18])[1]
    report, rule = ttt.stats(session), model.get_submodule("")._ttt_root.config.rule
    specs = {s.key: s for s in session.state.specs}
    assert [(s.layer, s.sequence) for s in report] == [(key, b) for key in specs for b in (0, 1)]
    for s in report:
        w0 = session.weight(specs[s.layer]).detach()
        moved = float((session.state.matrix(s.layer, s.sequence, w0) - w0).norm())
        assert s.delta_norm == pytest.approx(moved, rel=1e-5)
        assert s.drift == pytest.approx(moved / float(w0.norm()), rel=1e-5)
        assert s.drift == pytest.approx(session.drift()[s.layer][s.sequence], rel=1e-5)
        assert (s.tokens, s.chunks, s.written + s.skipped) == (27, 6, 6)
        assert 0 < s.write_norm_last <= s.write_norm_peak
        assert 0 < s.write_norm_mean <= s.write_norm_peak * (1 + 1e-6)
        assert s.write_norm_exact == rule.limited
        if rule.limited:
            assert s.clipped > 0
            assert s.write_norm_peak <= float(reference.write_limit(w0, rule)) * (1 + 1e-5)
        else:
            assert s.clipped == 0
    lines = str(report).splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [[s.layer, str(s.sequence)] for s in report]
    assert json.loads(json.dumps(report.to_dict()))[0]["layer"] == report[0].layer
    session.reset()
    assert {(s.tokens, s.chunks, s.delta_norm, s.write_norm_peak) for s in ttt.stats(session)} == {
        (0, 0, 0.0, 0.0)
    }


@pytest.mark.parametrize("controls", [{}, {"max_write_norm": 13.0}], ids=["free", "limited"])
def test_stats_equal_what_the_reference_writes(controls):
    """One layer, so that its h and t can be computed from the input."""
    model = plain(unusual.Stack(unusual.MLP()), **controls)
    x = unusual.inputs(tokens=23, rows=1)
    session = ttt.Session(model)
    model(x, ttt_state=session.state)
    root = require_root(model)[1]
    (spec,) = root.specs
    w0, (conv, proj) = root.weight(spec), root.parameters(spec)
    mlp = model.mlps[0]
    with torch.no_grad():
        t = model.norms[0](unusual.causal_mix(x))[0]
        h = F.gelu(mlp.up(t))
        written, bounds, clipped = [], [], 0
        for i in range(0, 20, 4):
            args = (t[i : i + 4], h[i : i + 4], w0, conv, proj, spec.lr)
            free = reference.increment(*args).norm()
            norm = reference.increment(*args, spec.rule).norm()
            clipped += bool(norm < free * (1 - 1e-4))
            written.append(float(norm))
            bounds.append(float(spec.lr * reference.target(args[0], conv, proj).norm() * args[1].norm()))
        moved = float((reference.chunked(h, t, w0, conv, proj, 1.0, 4, None, spec.rule)[1] - w0).norm())
    (s,) = ttt.stats(session)
    norms = written if controls else bounds
    assert s.clipped == clipped
    assert 0 < clipped < 5 or not controls, "some writes are within the limit and some are not"
    assert s.delta_norm == pytest.approx(moved, rel=1e-4)
    assert s.write_norm_last == pytest.approx(norms[-1], rel=1e-4)
    assert s.write_norm_peak == pytest.approx(max(norms), rel=1e-4)
    assert s.write_norm_mean == pytest.approx(sum(norms) / 5, rel=1e-4)


REFUSED = [
    *(("normalize_keys", v) for v in ("l2", "", True, 1)),
    *((n, v) for n in ("max_write_norm", "max_write_ratio") for v in (0, -1.0, "1", True)),
    *((n, float(v)) for n in ("max_write_norm", "max_write_ratio", "decay") for v in ("nan", "inf")),
    *(("decay", v) for v in (0.0, -0.5, 1.5, None, True, "0.9")),
    *(("on_nonfinite", v) for v in ("ignore", None, True, "")),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{n}={v!r}" for n, v in REFUSED])
def test_refused_values_name_their_option(name, value):
    with pytest.raises(ConfigError, match=f"^{name}="):
        ttt.TTTConfig(**{name: value})


@pytest.mark.parametrize("name", CONTROLS)
def test_options_round_trip(name):
    config = ttt.TTTConfig(**CONTROLS[name])
    assert ttt.TTTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_adapter_from_before_the_controls_loads_and_one_with_them_keeps_them(tmp_path):
    model = models.converted()
    path = ttt.save_adapter(model, tmp_path / "old")
    config = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if k not in OPTIONS}))
    _without_rules(path / TENSOR_FILE)
    old = ttt.load_adapter(models.tiny(), path)
    assert require_root(old)[1].config == require_root(model)[1].config
    assert all(torch.equal(v, old.state_dict()[k]) for k, v in model.state_dict().items())
    new = ttt.load_adapter(models.tiny(), ttt.save_adapter(models.converted(**EVERYTHING), tmp_path / "new"))
    assert {n: getattr(require_root(new)[1].config, n) for n in OPTIONS} == EVERYTHING


def _without_rules(path):
    """The header as it was before sites had a rule, and files a checksum."""
    with safe_open(path, "pt") as f:
        header = json.loads(f.metadata()[HEADER])
    sites = [{k: v for k, v in json.loads(s).items() if k != "rule"} for s in header["sites"]]
    header["sites"] = [json.dumps(site) for site in sites]
    del header[MARK]
    save_file(load_file(path), path, {HEADER: json.dumps(header)})


class Scaled(unusual.MLP):
    """A projection with a factor inside: what is kept of it is the base's own product."""

    def forward(self, x):
        h = F.gelu(self.up(x)).flatten(0, 1)
        return torch.addmm(self.down.bias, h, self.down.weight.t(), alpha=0.5).view_as(x)


def test_a_share_of_a_weight_in_scaled_form_is_refused():
    with pytest.raises(GraphRewriteError, match=r"mlps\.0\.down.*max_write_ratio.*Use max_write_norm"):
        plain(unusual.Stack(Scaled()), max_write_ratio=0.1)(unusual.inputs())


def test_a_share_of_a_weight_that_forward_computes(monkeypatch):
    """Such a W0 is in the graph, so it has a norm."""
    monkeypatch.setattr(unusual, "MIX", False)
    torch.manual_seed(0)
    twin = unusual.Stack(unusual.MLP())
    quantised = unusual.Stack(unusual.MLP())
    quantised.load_state_dict(twin.state_dict())
    down = quantised.mlps[0].down = unusual.Dequantising(twin.mlps[0].down)
    twin.mlps[0].down.weight.data = down.weight_int8.float() * down.scale
    x, y = unusual.inputs(tokens=15), []
    for model in (quantised, twin):
        model = plain(model, max_write_ratio=0.1)
        with torch.no_grad():
            y.append(model(x))
            session = ttt.Session(model, 2)
            y += [torch.cat([model(part, ttt_state=session.state) for part in x.split([3, 12], 1)], 1)]
        assert all(s.clipped == 3 for s in ttt.stats(session))
    assert all(relative_error(other, y[-1]) < SEGMENTATION for other in y)


def test_a_share_of_a_torchao_weight_is_refused_and_other_controls_work(monkeypatch):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int8WeightOnlyConfig()

    def stack():
        torch.manual_seed(0)
        stack = unusual.Stack(unusual.MLP())
        quantization.quantize_(stack, config)
        return stack

    x = unusual.inputs(tokens=15)
    with torch.no_grad(), pytest.raises(GraphRewriteError, match="max_write_ratio"):
        plain(stack(), max_write_ratio=0.1)(x)
    monkeypatch.setattr(unusual, "MIX", False)
    model = plain(stack(), max_write_norm=0.5, decay=0.8, normalize_keys="unit")
    session = ttt.Session(model, 2)
    with torch.no_grad():
        pieces = [model(part, ttt_state=session.state) for part in x.split([3, 6, 1, 5], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(x), rtol=1e-4, atol=1e-5)
    for s in ttt.stats(session):
        assert s.drift is None
        assert s.delta_norm is None
        assert 0 < s.write_norm_peak <= 0.5 * (1 + 1e-5)


BOUNDS = torch.tensor([0, 7, 19])


def loss_and_gradients(model, outputs):
    """``sum(square)`` over all documents, and every parameter's gradient."""
    model.zero_grad()
    sum(y.square().sum() for y in outputs).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def same_documents(model, together, apart):
    """Outputs ``[B, 19, ..]`` and gradients of packed documents are those of documents apart."""
    packed, alone = together(), apart()
    assert relative_error(packed, torch.cat(alone, 1)) < SEGMENTATION
    ours, theirs = loss_and_gradients(model, [packed]), loss_and_gradients(model, alone)
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, name
        assert relative_error(ours[name], expected) < GRADIENTS, name


@pytest.mark.parametrize("controls", [{}, EVERYTHING], ids=["official", "everything"])
def test_packed_documents_of_a_plain_module(monkeypatch, controls):
    monkeypatch.setattr(unusual, "MIX", False)
    model = plain(unusual.Stack(unusual.MLP(), unusual.MLP()), **controls)
    x = unusual.inputs(tokens=19)
    with torch.no_grad():
        one = model(x)
        assert relative_error(one[:, 7:], model(x, ttt_cu_seqlens=BOUNDS)[:, 7:]) > 1e-2
    same_documents(
        model, lambda: model(x, ttt_cu_seqlens=BOUNDS), lambda: [model(d) for d in x.split([7, 12], 1)]
    )


BAD_BOUNDS = {
    "of a batch in one row": [0, 8, 11, 16],
    "not from the start": [3, 8],
    "not to the end": [0, 3],
    "that fall": [0, 5, 3, 8],
    "per row": [[0, 8], [0, 8]],
    "that are no integers": [0.0, 8.0],
    "that are none": [],
}


@pytest.mark.parametrize("name", BAD_BOUNDS)
def test_boundaries_of_other_tokens_are_refused(name):
    model, x = plain(unusual.Stack(unusual.MLP())), unusual.inputs(tokens=8)
    with pytest.raises(PositionError, match=r"do not fit a call of 2 rows of 8 tokens. Pass integers"):
        model(x, ttt_cu_seqlens=torch.tensor(BAD_BOUNDS[name]))
    with ttt.disabled(model):
        model(x, ttt_cu_seqlens=torch.tensor(BAD_BOUNDS[name]))


def test_documents_without_tokens():
    """Boundaries of a fixed number, as collators pad them."""
    model, x = plain(unusual.Stack(unusual.MLP())), unusual.inputs(tokens=8)
    with torch.no_grad():
        y = [model(x, ttt_cu_seqlens=torch.tensor(b)) for b in ([0, 3, 8], [0, 0, 3, 3, 8, 8])]
    assert torch.equal(*y)


@pytest.mark.parametrize("how", ["positions", "cu_seqlens"])
def test_packed_documents_of_a_transformer(how):
    """Attention is kept within documents by a mask; rotary positions that go on change nothing."""
    model = built()
    tokens = models.ids(1, 19)
    document = torch.bucketize(torch.arange(19), BOUNDS, right=True)
    mask = (document[:, None] == document).tril()[None, None]
    if how == "positions":
        given = {"position_ids": torch.cat([torch.arange(7), torch.arange(12)])[None]}
    else:
        given = {"position_ids": torch.arange(19)[None], "ttt_cu_seqlens": BOUNDS}

    def together():
        return model(tokens, attention_mask=mask, use_cache=False, **given).logits

    same_documents(
        model, together, lambda: [model(d, use_cache=False).logits for d in tokens.split([7, 12], 1)]
    )
