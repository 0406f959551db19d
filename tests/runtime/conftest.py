"""Models that tests of ``generate`` share within a file; files may define their own."""

from __future__ import annotations

import functools

import pytest

from tests import models
from tests.runtime.generation import Truth, fast, run


@pytest.fixture(scope="module")
def model():
    return fast()


@pytest.fixture(scope="module")
def base():
    return models.tiny(layers=1)


@pytest.fixture(scope="module")
def truth(model):
    truth = Truth(model.config).eval()
    truth.fast = (model,)  # in a tuple, so that it is no submodule
    return truth


@pytest.fixture(scope="module")
def greedy(truth):
    """Greedy continuations of the prompts of :data:`LENGTHS`, by the oracle."""
    return functools.cache(lambda length: run(truth, models.ids(1, length), use_cache=False))
