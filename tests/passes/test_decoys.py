"""What the detector says about layers that were written to fool it (``decoys.py``)."""

from __future__ import annotations

import pytest
from torch import nn

from tests.passes import decoys
from tests.passes.capture import capture, exported, ids, name_of, names, reason, reasons
from tests.passes.handmade import FF, D, Model, SwiGLU
from ttt_compiler.passes.find_mlps import find_mlps

ATTENTION = "of activations, not of one weight"
NOT_FEATURES = "over an axis that is not the features"

# The layer, its last projection, and what the reason must say. Everything here is refused.
REFUSED = [
    (decoys.SiluGatedAttention, "out.weight", ATTENTION),
    (decoys.SoftmaxRouter, "down.weight", "goes into softmax"),
    (decoys.ResidualRouter, "down.weight", "goes into softmax alone"),
    (decoys.ResidualFeatureMap, "down.weight", "goes into matmul alone"),
    (decoys.SigmoidGate, "down.weight", "sigmoid is applied to its output"),
    (decoys.RecurrentBuffer, "down.weight", "picks 2 of 16 tokens"),
    (decoys.GatedConvolution, "down.weight", "follows conv1d"),
    (decoys.NonlinearLatentQuery, "q_b.weight", "goes into scaled_dot_product_attention"),
    (decoys.NonlinearLatentQuery, "out.weight", "follows scaled_dot_product_attention"),
    (decoys.TwoInputs, "down.weight", "read 2 different inputs"),
    (decoys.Rolled, "down.weight", "follows roll"),
    (decoys.ShiftedByCat, "down.weight", "follows cat"),
    (decoys.ShiftedBySlices, "down.weight", "picks 14 of 16 tokens"),
    (decoys.FixedTokenOrder, "down.weight", "picks tokens at fixed places"),
    (decoys.ScrambledByViews, "down.weight", "joins axes that were permuted"),
    (decoys.TokensSwappedByViews, "down.weight", "joins axes that were permuted"),
    (decoys.FirstTokenSubtracted, "down.weight", "picks 2 of 16 tokens"),
    (decoys.LastTokenRepeated, "down.weight", "picks 2 of 16 tokens"),
    (decoys.Pairwise, "down.weight", NOT_FEATURES),
    (decoys.TokenMax, "down.weight", NOT_FEATURES),
    (decoys.TokenNormalised, "down.weight", NOT_FEATURES),
    (decoys.TokenLayerNorm, "down.weight", NOT_FEATURES),
    (decoys.HiddenCumsum, "down.weight", "follows cumsum"),
    (decoys.OutputCumsum, "down.weight", "goes into cumsum"),
    (decoys.SortedFeatures, "down.weight", "reorders the hidden features by data"),
    (decoys.HyperUp, "down.weight", "a computed weight"),
    (decoys.WeightProduct, "right", "a product of weights"),
]


@pytest.mark.parametrize(("make", "weight", "why"), REFUSED)
def test_refused(make: type[nn.Module], weight: str, why: str) -> None:
    report_of = capture(Model(make), ids())
    assert names(find_mlps(report_of)) == []
    assert why in reason(report_of, f"mlp.{weight}")


@pytest.mark.xfail(reason="known to get through: the dataflow rule does not see what these do", strict=True)
@pytest.mark.parametrize("make", [decoys.ScaledStream, decoys.LastOutputForAll, decoys.Restrided])
def test_known_to_be_accepted(make: type[nn.Module]) -> None:
    assert names(find_mlps(capture(Model(make), ids()))) == []


@pytest.mark.parametrize("make", dict.fromkeys(m for m, _, _ in REFUSED))
def test_refused_when_exported(make: type[nn.Module]) -> None:
    assert not find_mlps(exported(Model(make), ids())).sites


@pytest.mark.parametrize("make", dict.fromkeys(m for m, _, _ in REFUSED))
def test_the_mlp_behind_a_decoy_is_still_found(make: type[nn.Module]) -> None:
    """A decoy in one layer does not hide the MLP of the next one."""

    class Both(Model):
        def block(self, x: decoys.Tensor) -> decoys.Tensor:
            x = super().block(x)
            return x + self.real(self.norm2(x))

    model = Both(make)
    model.real = SwiGLU()
    assert names(find_mlps(capture(model, ids()))) == ["real.down.weight"]


def test_weight_computed_from_data_is_no_weight() -> None:
    report = find_mlps(capture(Model(decoys.HyperDown), ids()))
    assert not report.sites
    assert {name_of(r.weight) for r in report.rejections if r.weight} > {"mlp.make.weight", "mlp.up.weight"}


def test_adapter_beside_the_mlp() -> None:
    gm = capture(Model(decoys.ParallelAdapter), ids())
    assert names(find_mlps(gm)) == ["mlp.mlp.down.weight"]
    assert "an adapter" in reason(gm, "mlp.widen.weight")


def test_hidden_read_by_two_down_projections() -> None:
    """Both send h into the residual stream: two sites with one h."""
    report = find_mlps(capture(Model(decoys.TwoDowns), ids()))
    assert names(report) == ["mlp.down.weight", "mlp.second.weight"]
    first, second = report.sites
    assert first.h is second.h
    assert first.contraction is not second.contraction


def test_hidden_read_by_a_gate_too() -> None:
    gm = capture(Model(decoys.DownAndHead), ids())
    assert names(find_mlps(gm)) == ["mlp.down.weight"]
    assert "width" in reason(gm, "mlp.halt.weight")


def test_constant_order_of_features_is_harmless() -> None:
    """GPTQ's act-order: still one MLP, and not a routed one."""
    (site,) = find_mlps(capture(Model(decoys.FixedFeatureOrder), ids())).sites
    assert site.kind == "dense"


class TestCoincidences:
    @pytest.mark.parametrize(
        ("width", "batch", "length"),
        [(D, 2, 8), (D, 2, D), (D, D, D), (FF, D, FF), (FF, 1, 1), (FF, FF, 1), (FF, 2, D)],
        ids=["F=D", "F=D=T", "F=D=T=B", "F=T,B=D", "T=B=1", "F=B", "D=T"],
    )
    def test_mlp(self, width: int, batch: int, length: int) -> None:
        model = Model(decoys.Coincidence(width))
        assert names(find_mlps(capture(model, ids(length, batch)))) == ["mlp.down.weight"]

    @pytest.mark.parametrize("length", [D, 8])
    def test_mean_over_tokens(self, length: int) -> None:
        gm = capture(Model(decoys.TokenMean(length * 8 if length < D else length)), ids(length))
        assert NOT_FEATURES in reason(gm, "mlp.down.weight")

    def test_token_mlp_of_a_square_sequence(self) -> None:
        gm = capture(Model(decoys.TokenMLP(D)), ids(D))
        assert "transposed again" in reason(gm, "mlp.down.weight")

    def test_gated_attention_as_wide_as_the_sequence(self) -> None:
        gm = capture(Model(SwiGLU), ids(FF))
        assert names(find_mlps(gm)) == ["mlp.down.weight"]
        assert all("attention" in r for r in reasons(gm, "attention.out.weight"))
