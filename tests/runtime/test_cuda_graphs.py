"""What CUDA graphs ask of a running state, seen without a device: what a call writes stays where it is."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._inductor import compile_fx

import ttt_compiler as ttt
from tests import models


@pytest.mark.parametrize("change", ["none", "fork", "select"])
def test_what_a_compiled_step_writes_is_static(change):
    """Inductor leaves graphs out, with a line in a log, that write to other inputs than static ones."""
    seen = []
    generate = compile_fx.fx_codegen_and_compile

    def spy(gm, inputs, keys, **kwargs):
        found = generate(gm, inputs, keys, **kwargs)
        seen.append((set(found.mutated_input_idxs), set(kwargs["static_input_idxs"])))
        return found

    model = ttt.convert(models.tiny(), ttt.TTTConfig(layers="all", chunk_size=16, lr=0.3))
    model.compile(backend="inplace_ttt", mode="reduce-overhead")
    ids, session = models.ids(2, 8), ttt.Session(model, 2)
    caches = torch._inductor.config.patch(force_disable_caches=True)
    with torch.no_grad(), caches, mock.patch.object(compile_fx, "fx_codegen_and_compile", spy):
        model(ids, past_key_values=session.cache)
        if change == "fork":
            session = session.fork()
        if change == "select":
            session.cache.reorder_cache(torch.tensor([1, 0]))
        model(ids[:, :1], past_key_values=session.cache)
    assert len(seen) >= 2
    for written, static in seen:
        assert len(written) == 14
        assert written <= static
