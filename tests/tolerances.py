"""Every tolerance of the suite, with its reason."""

from __future__ import annotations

import torch
from torch import Tensor

# Law 10: the design's bound for parity with the official implementation in fp32. Measured: below 2e-6.
OFFICIAL = 1e-4

# fp64 kernels against the fp64 reference: only the order of sums differs. 50 units of the last place at
# the sizes used here.
FP64 = 1e-12

# Two fp32 runs of a whole small model that cut the sequence differently: GEMMs of other shapes sum in
# other orders, layer by layer. Measured: 2e-7 to 1e-6 of the largest logit.
SEGMENTATION = 1e-5

# Gradients under bf16 autocast against fp32: a few roundings of 2^-8 per layer. Measured: 1.2e-2.
AUTOCAST = 5e-2

# Law 7: a low-precision kernel may err twice as much as the plain reference in that dtype does, plus a
# band for problems so small that the reference happens to be exact. The band is half a unit of the last
# place of each format.
BUDGET_FACTOR = 2.0
BAND = {torch.float64: 1e-15, torch.float32: 6e-8, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected magnitude."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp(min=1e-30)
    return float((actual - expected).abs().max() / scale)


def assert_within_budget(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """err(ours) <= 2 * err(plain reference in the same dtype) + band, both against fp64."""
    budget = BUDGET_FACTOR * relative_error(plain, exact) + BAND[ours.dtype]
    error = relative_error(ours, exact)
    assert error <= budget, f"error {error:.2e} exceeds the budget {budget:.2e}"
