"""One model and tokenizer for all servers of a file."""

from __future__ import annotations

import pytest

from tests.serve import loopback


@pytest.fixture(scope="module")
def model():
    return loopback.make_model()


@pytest.fixture(scope="module")
def tokenizer():
    return loopback.make_tokenizer()


@pytest.fixture
def start(model, tokenizer, tmp_path):
    """Starts servers; those with ``saved=True`` share a folder."""

    def begin(*, saved=False, **kwargs):
        return loopback.Server(model, tokenizer, tmp_path / "sessions" if saved else None, **kwargs)

    return begin
