"""Law 10: parity with the official implementation, through ``torch.compile``.

``official/`` holds checkpoints in the official format and what the official code computed from them; its
README says how. ``python -m tests.goldens.table`` prints the measured errors.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ttt_compiler as ttt
from tests.tolerances import OFFICIAL, relative_error
from ttt_compiler.codegen.layout import WRITES

CASES = sorted(p for p in (Path(__file__).parent / "official").iterdir() if p.is_dir())


def measure(case: Path) -> dict[str, float]:
    """Relative error per quantity; ``greedy`` counts wrong tokens."""
    run = json.loads((case / "case.json").read_text())
    expected = load_file(case / "expected.safetensors")
    ids, prefill = expected["input_ids"], run["prefill"]
    model = ttt.from_official(case)
    model.compile(backend="inplace_ttt", fullgraph=True)
    errors = {}

    out = model.train()(ids, labels=ids, use_cache=False)
    out.loss.backward()
    errors["train_logits"] = relative_error(out.logits, expected["train_logits"])
    errors["train_loss"] = relative_error(out.loss[None], expected["train_loss"])
    for name, value in expected.items():
        if name.startswith("grad."):
            parameter = name.removeprefix("grad.")
            for leaf in ("ttt_conv", "ttt_proj"):
                parameter = parameter.replace(f".{leaf}.weight", f".down_proj.{leaf}")
            grad = model.get_parameter(parameter).grad
            assert grad is not None, parameter
            kind = "grad " + next(
                k
                for k in ("ttt_conv", "ttt_proj", "down_proj", "gate_proj", "embed_tokens")
                if parameter.endswith(k) or f"{k}.weight" in parameter
            )
            errors[kind] = max(errors.get(kind, 0.0), relative_error(grad, value))

    model.eval()
    session = ttt.Session(model, batch_size=ids.shape[0])
    logits = [model(ids[:, :prefill], past_key_values=session.cache).logits]
    logits += [
        model(ids[:, i : i + 1], past_key_values=session.cache).logits for i in range(prefill, ids.shape[1])
    ]
    errors["cached_logits"] = relative_error(torch.cat(logits, 1), expected["cached_logits"])
    weights = [name for name in expected if name.startswith("final_weight.")]
    for name in weights:
        key = f"model.layers.{name.removeprefix('final_weight.')}.mlp.down_proj.weight"
        assert session.state.column(key, WRITES)[0] == ids.shape[1] // run["config"]["ttt_chunk"]
        # Its last write may still be in progress.
        w = session.state.matrix(key, 0, model.get_parameter(key))
        errors["final_weight"] = max(errors.get("final_weight", 0.0), relative_error(w, expected[name]))
    prompt = ids[:1, :prefill]
    greedy = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=run["generate"],
        do_sample=False,
        eos_token_id=None,
    )
    errors["greedy"] = float((greedy != expected["greedy"]).sum())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("ttt_conv"):
                p.zero_()
        static = model(ids, use_cache=False).logits
    errors["static_logits"] = relative_error(static, expected["static_logits"])
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_official(case):
    errors = measure(case)
    assert errors["greedy"] == 0
    bad = {k: v for k, v in errors.items() if not v <= OFFICIAL}
    assert not bad
    expected = {
        "train_logits",
        "train_loss",
        "cached_logits",
        "final_weight",
        "static_logits",
        "greedy",
    }
    expected |= {f"grad {k}" for k in ("ttt_conv", "down_proj", "gate_proj", "embed_tokens")}
    if json.loads((case / "config.json").read_text())["ttt_proj"]:
        expected.add("grad ttt_proj")
    assert expected <= errors.keys()
