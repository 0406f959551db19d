"""Batches of a pool whose sequences have different lengths: what is padding, and what can be taken back."""

from __future__ import annotations

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from tests.runtime.test_pool import read, texts
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.errors import CropError, PoolError, PositionError


@pytest.fixture(scope="module")
def model():
    model = models.converted()
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    return model


@pytest.mark.parametrize("through", ["session", "cache"])
def test_a_reset_forgets_different_lengths_too(model, through):
    tokens, expected = texts(model, 2)
    pool = ttt.Pool(model, sequences=2)
    read(model, pool, ["a"], tokens[:1, :9])
    read(model, pool, ["b"], tokens[1:, :3])
    with pool.use("a", "b") as batch:
        assert batch.padding == [0, 6]
        getattr(batch, through, batch).reset()
        logits = model(tokens[:, :8], past_key_values=batch.cache).logits
        assert relative_error(logits, expected[:, :8]) < SEGMENTATION
        assert batch.padding == [0, 0]
        assert batch.attention_mask(2).all()
    for row, name in enumerate("ab"):
        logits = read(model, pool, [name], tokens[row : row + 1, 8:])
        assert relative_error(logits, expected[row : row + 1, 8:]) < SEGMENTATION


def test_padding_among_new_tokens_is_remembered_and_not_kept(model):
    tokens, expected = texts(model, 3)
    pool = ttt.Pool(model, sequences=3)
    read(model, pool, ["b"], tokens[1:2, :4])
    at = {"a": 0, "b": 4, "c": 0}
    with pool.use("a", "b", "c") as batch:
        # To the left of the tokens, to the right of them, and between two calls.
        for counts, left in (((7, 3, 5), False), ((1, 4, 2), True), ((2, 2, 2), False), ((1, 0, 3), True)):
            size = max(counts)
            ids, mask = torch.zeros(3, size, dtype=torch.int64), torch.zeros(3, size, dtype=torch.int64)
            for row, (name, count) in enumerate(zip("abc", counts, strict=True)):
                span = slice(size - count, size) if left else slice(0, count)
                ids[row, span], mask[row, span] = tokens[row, at[name] : at[name] + count], 1
            logits = model(**batch.inputs(ids, mask)).logits
            for row, (name, count) in enumerate(zip("abc", counts, strict=True)):
                wanted = expected[row, at[name] : at[name] + count]
                assert not count or relative_error(logits[row, mask[row] == 1], wanted) < SEGMENTATION
                at[name] += count
        with pytest.raises(CropError, match="padding in a row"):
            batch.cache.crop(-1)
    assert [pool._sequences[n].cache.get_seq_length() for n in "abc"] == [11, 13, 12] == list(at.values())
    for row, name in enumerate("abc"):
        logits = read(model, pool, [name], tokens[row : row + 1, at[name] :])
        assert relative_error(logits, expected[row : row + 1, at[name] :]) < SEGMENTATION
    with pool.use("a", "b") as two:
        for shape in ((2, 2), (2, 4), (1, 3)):
            with pytest.raises(PositionError, match="for tokens"):
                two.inputs(tokens[:2, :3], torch.ones(shape))


def test_padding_is_noted_whoever_made_the_mask(model):
    tokens, expected = texts(model, 2)
    pool = ttt.Pool(model, sequences=2, context=20)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with pool.use("a", "b") as batch:
        model(tokens[:, :9], past_key_values=batch.cache, attention_mask=mask)
        assert batch.real.tolist() == mask.bool().tolist()
        # A call that is refused has padded nothing.
        refused = torch.zeros(2, 12, dtype=torch.int64)
        refused[:, -1] = 1
        with pytest.raises(PoolError, match="20 per sequence"):
            model(**batch.inputs(tokens[:, :12], refused))
        assert batch.real.shape == (2, 9)
    for row, (name, start) in enumerate((("a", 9), ("b", 5))):
        logits = read(model, pool, [name], tokens[row : row + 1, start : start + 8])
        assert relative_error(logits[0], expected[row, start : start + 8]) < SEGMENTATION


def test_tokens_of_different_lengths_are_taken_back(model):
    """As far as all are tokens; what stands in front of the shorter one is none."""
    tokens, expected = texts(model, 2)
    pool = ttt.Pool(model, sequences=2, revocable=12)
    read(model, pool, ["a"], tokens[:1, :15])
    read(model, pool, ["b"], tokens[1:, :6])
    with pool.use("a", "b") as batch:
        batch.cache.crop(-2)
        model(**batch.inputs(torch.stack([tokens[0, 13:16], tokens[1, 4:7]])))
        batch.cache.crop(-4)
        with pytest.raises(CropError, match="padding in a row"):
            batch.cache.crop(-4)
        assert batch.tokens_seen == [12, 3]
    for row, (name, start) in enumerate((("a", 12), ("b", 3))):
        logits = read(model, pool, [name], tokens[row : row + 1, start:])
        assert relative_error(logits[0], expected[row, start:]) < SEGMENTATION
