"""Tiny models for tests of ``generate``, and what it must give: :class:`Truth`.

Chunks are of 4 tokens, so that every run crosses their borders.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import ttt_compiler as ttt
from tests import models

NEW = 13
# Shorter than a chunk, whole chunks, neither.
LENGTHS = (3, 8, 11)


class Truth(LlamaForCausalLM):
    """What ``generate`` must see: logits of the reference, each sequence alone and whole."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, models.VOCAB)
        if mask.all():  # rows do not see each other; apart they only cost more
            return CausalLMOutput(logits=models.oracle(self.fast[0], input_ids))
        for row, real in enumerate(mask.bool()):
            logits[row, real] = models.oracle(self.fast[0], input_ids[row : row + 1, real])[0]
        return CausalLMOutput(logits=logits)


def compiled(model):
    # What is compiled does not matter here, and lengths that are dynamic at once compile less.
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


def fast(layers=1):
    config = ttt.TTTConfig(layers="all", chunk_size=4, lr=1.0)
    return compiled(models.randomize(ttt.convert(models.tiny(layers=layers), config), 0.6))


def run(model, tokens, **mode):
    settings = {"max_new_tokens": NEW, "do_sample": False, **mode}
    torch.manual_seed(5)
    return model.generate(tokens, **settings)
