"""Adapters and official checkpoints: round trips, and files that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ttt_compiler as ttt
from tests import models
from tests.goldens.test_official import CASES
from ttt_compiler.adapter import CONFIG_FILE, TENSOR_FILE
from ttt_compiler.errors import AdapterError, OfficialCheckpointError


@pytest.fixture
def saved(tmp_path):
    model = models.converted()
    return model, ttt.save_adapter(model, tmp_path / "adapter")


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize("convert_first", [False, True])
def test_round_trip(saved, convert_first):
    model, path = saved
    other = models.converted(scale=0) if convert_first else models.tiny()
    assert ttt.load_adapter(other, path) is other
    assert unchanged(other, snapshot(model))
    tensors = load_file(path / TENSOR_FILE)
    assert len(tensors) == 4
    assert all("ttt_" in name for name in tensors), "the base model's weights stay out"
    assert json.loads((path / CONFIG_FILE).read_text())["version"] == 1


def damage(path, kind):
    tensors, header = path / TENSOR_FILE, path / CONFIG_FILE
    data = load_file(tensors)
    from safetensors import safe_open

    with safe_open(tensors, "pt") as f:
        meta = f.metadata()
    name = next(k for k in data if k.endswith("ttt_proj"))
    if kind == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif kind == "shape":
        save_file(data | {name: torch.zeros(3, 3)}, tensors, meta)
    elif kind == "dtype":
        save_file(data | {name: data[name].half()}, tensors, meta)
    elif kind == "missing":
        data.pop(name)
        save_file(data, tensors, meta)
    elif kind == "nan":
        save_file(data | {name: data[name] * float("nan")}, tensors, meta)
    elif kind == "no header":
        save_file(data, tensors)
    elif kind == "sites":
        save_file(data, tensors, {"ttt": json.dumps(json.loads(meta["ttt"]) | {"sites": [{"x": 1}]})})
    elif kind == "version":
        header.write_text(json.dumps(json.loads(header.read_text()) | {"version": 9}))
    elif kind == "unknown key":
        header.write_text(json.dumps(json.loads(header.read_text()) | {"eta": 9}))
    elif kind == "no json":
        header.write_text("[1]")
    elif kind == "gone":
        shutil.rmtree(path)


KINDS = [
    "truncated",
    "shape",
    "dtype",
    "missing",
    "nan",
    "no header",
    "sites",
    "version",
    "unknown key",
    "no json",
    "gone",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("convert_first", [False, True], ids=["plain", "converted"])
def test_damaged_files_leave_the_model_unchanged(saved, kind, convert_first):
    _, path = saved
    damage(path, kind)
    model = models.converted(scale=0.1) if convert_first else models.tiny()
    before = snapshot(model)
    with pytest.raises(AdapterError):
        ttt.load_adapter(model, path)
    assert unchanged(model, before)
    assert ("_ttt_root" in vars(model)) == convert_first


def test_an_adapter_of_another_model(saved):
    _, path = saved
    for other in (models.tiny("gpt2"), models.tiny(layers=1)):
        before = snapshot(other)
        with pytest.raises(AdapterError, match="another model"):
            ttt.load_adapter(other, path)
        assert unchanged(other, before)


def test_an_adapter_of_another_configuration(saved):
    with pytest.raises(AdapterError, match="revert"):
        ttt.load_adapter(models.converted(chunk_size=8), saved[1])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_official_round_trip(case, tmp_path):
    model = ttt.from_official(case)
    out = ttt.to_official(model, tmp_path)
    written, original = load_file(out / "model.safetensors"), load_file(case / "model.safetensors")
    if model.config.tie_word_embeddings:
        original.pop("lm_head.weight")  # the same tensor as the embeddings: written once
    assert written.keys() == original.keys()
    assert all(torch.equal(v, original[k]) for k, v in written.items())
    config, expected = (json.loads((d / "config.json").read_text()) for d in (out, case))
    assert {k: v for k, v in config.items() if k.startswith("ttt_")} == {
        k: v for k, v in expected.items() if k.startswith("ttt_")
    }
    again = ttt.from_official(out)
    assert unchanged(again, snapshot(model))


class TestOfficialRefusals:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        return shutil.copytree(CASES[0], tmp_path / "checkpoint")

    @staticmethod
    def edit(checkpoint, **values):
        file = checkpoint / "config.json"
        config = json.loads(file.read_text()) | values
        file.write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))

    def test_layers_beyond_the_model_are_named(self, checkpoint):
        layers = json.loads((checkpoint / "config.json").read_text())["ttt_layers"]
        self.edit(checkpoint, ttt_layers=[*layers, 36])
        with pytest.warns(UserWarning, match="36"):
            ttt.from_official(checkpoint)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"ttt_mode": False}, "ttt_mode is false"),
            ({"ttt_chunk": "DROP"}, "ttt_chunk missing"),
            ({"model_type": "gpt2"}, "gpt2"),
            ({"hidden_size": 24, "head_dim": 6}, "do not fit"),
            ({"ttt_layers": [0]}, "not those of ttt_layers"),
            ({"ttt_proj": True}, "not those of ttt_layers"),
        ],
        ids=str,
    )
    def test_config(self, checkpoint, values, message):
        self.edit(checkpoint, **values)
        with pytest.raises(OfficialCheckpointError, match=message):
            ttt.from_official(checkpoint)

    def test_truncated(self, checkpoint):
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(OfficialCheckpointError, match="cannot be read"):
            ttt.from_official(checkpoint)

    def test_exporting_what_the_official_code_cannot_hold(self, tmp_path):
        with pytest.raises(OfficialCheckpointError, match="save_adapter"):
            ttt.to_official(models.converted("gpt2"), tmp_path)
        with pytest.raises(OfficialCheckpointError, match="conv_kernel=5"):
            ttt.to_official(models.converted(conv_kernel=3), tmp_path)
