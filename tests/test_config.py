"""Options are checked, and every mistake names the fix."""

from __future__ import annotations

import pytest
import torch

from ttt_compiler.config import TTTConfig
from ttt_compiler.discovery.choose_layers import block_indices, choose_layers
from ttt_compiler.discovery.found import FoundMLP, Place
from ttt_compiler.errors import ConfigError, LayerSelectionError, TTTError
from ttt_compiler.spec import SiteSpec

KEYS = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(8)]


def test_unknown_option_lists_the_valid_ones_and_guesses():
    with pytest.raises(
        ValueError, match=r"unknown option 'chunk'.*chunk_size.*Valid: layers, chunk_size, lr"
    ):
        TTTConfig.from_options({"chunk": 4})


@pytest.mark.parametrize(
    "bad",
    [
        {"chunk_size": 0},
        {"chunk_size": 2.0},
        {"chunk_size": True},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": "0.3"},
        {"target": "x0"},
        {"proj": 1},
        {"conv_kernel": 4},
        {"layers": "every:0"},
        {"layers": "evry:6"},
        {"layers": []},
        {"layers": [-1]},
        {"layers": [True]},
        {"layers": [1, "a"]},
    ],
    ids=str,
)
def test_bad_values_raise(bad):
    with pytest.raises(ConfigError) as e:
        TTTConfig(**bad)
    assert isinstance(e.value, ValueError)
    assert isinstance(e.value, TTTError)
    assert next(iter(bad)) in str(e.value)


def test_round_trip_and_version():
    config = TTTConfig(layers=(3, 1), lr=1)
    assert config.layers == (1, 3)
    assert TTTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="version 2"):
        TTTConfig.from_dict(config.to_dict() | {"version": 2})
    with pytest.raises(ConfigError, match="version None"):
        TTTConfig.from_dict({})


def chosen(layers):
    mlps = [found_mlp(key) for key in KEYS]
    return tuple(m.weight for m in choose_layers(TTTConfig(layers=layers), mlps))


def found_mlp(weight):
    return FoundMLP(
        weight=weight,
        d_model=8,
        d_ff=12,
        activation="silu",
        gated=True,
        kind="dense",
        bias=False,
        transposed=False,
        block=0,
        causal=True,
        places=(Place(weight, weight.rpartition(".")[0]),),
        derived=False,
        dtype=torch.float32,
        time_major=False,
        problem=None,
    )


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every:6", [0, 6]),
        ("every:3+1", [1, 4, 7]),
        ([5, 2, 2], [2, 5]),
        (["*.1.mlp*", "model.layers.7.*"], [1, 7]),
        (lambda mlp: mlp.weight.endswith("3.mlp.down_proj.weight"), [3]),
    ],
)
def test_selectors(layers, blocks):
    assert chosen(layers) == tuple(KEYS[b] for b in blocks)


def test_a_block_that_does_not_exist_raises():
    with pytest.raises(LayerSelectionError, match=r"layers=8 matches no MLP.*0-7"):
        chosen([0, 8])
    with pytest.raises(LayerSelectionError, match="up_proj"):
        chosen(["*up_proj*"])
    with pytest.raises(LayerSelectionError, match=r"selects none of the 8.*0-7"):
        chosen("every:6+20")


def test_blocks_without_numbers_count_in_order():
    assert block_indices(["a.weight", "b.weight"]) == [0, 1]
    assert block_indices(["h.3.fc.weight", "h.5.fc.weight"]) == [3, 5]


def test_spec_string_is_canonical():
    spec = SiteSpec("m.weight", 8, 12, 8, 4, 0.3, "hidden_states", True, 5, module="m")
    assert SiteSpec.decode(spec.encode()) == spec
    assert spec.parameters_added == 8 * 5 + 64
