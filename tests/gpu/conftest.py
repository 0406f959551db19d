"""On a device the tests run with whatever torch is there."""

from __future__ import annotations

from tests.gpu import older_torch

if older_torch.needed():
    older_torch.install()
