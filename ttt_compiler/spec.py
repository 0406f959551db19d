"""The constants of one fast-weight site, and the string form in which they travel through a graph.

All constants go in ONE string argument of the marker op: under ``dynamic=True`` Python floats and ints
become graph inputs, strings never do. May be changed here: fields, together with every reader.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Names of the parameters added for a site whose module owns the weight under the name "weight".
CONV, PROJ = "ttt_conv", "ttt_proj"
# Separates the weight's name from the number of its use; no module name of any framework holds it.
_USE = "@"


@dataclass(frozen=True)
class WriteRule:
    """How a complete chunk's ``eta v^T h`` becomes a change of W. The defaults are the official rule.

    Attributes:
        keys: ``""`` writes with h itself, ``"unit"`` with its rows at unit norm, ``"mean"`` with h / C.
        max_norm: largest Frobenius norm of one write; a larger one is scaled down to it.
        max_ratio: the same, in units of ``||W0||_F``.
        decay: gamma in ``W_{i+1} = W0 + gamma (W_i - W0) + write``.
        on_nonfinite: what a chunk with NaN or Inf does: ``"raise"``, or ``"skip"`` its write.
    """

    keys: str = ""
    max_norm: float | None = None
    max_ratio: float | None = None
    decay: float = 1.0
    on_nonfinite: str = "raise"

    @property
    def limited(self) -> bool:
        """Whether a write's norm must be known."""
        return self.max_norm is not None or self.max_ratio is not None


@dataclass(frozen=True)
class SiteSpec:
    """One fast-weight site: one place where one weight is applied.

    Attributes:
        key: the weight's name in its model, with ``@k`` behind it at the k-th further place that uses the
            same weight; unique per site.
        d_model: D, width of the site's output.
        d_ff: F, width of the hidden activation ``h``.
        d_target: width of the target source ``t``.
        chunk: C, tokens per write.
        lr: eta.
        target: ``"hidden_states"`` or ``"input_embed"``.
        proj: whether P exists.
        conv_kernel: taps of the convolution.
        module: name of the module whose forward contains the projection and which holds the added
            parameters; ``""`` is the model itself.
        time_major: whether tokens come before rows inside of the model (``[T, B, ..]``).
        derived: whether W0 is computed from the weight in forward (quantised, parametrised, sliced).
        inner: for a weight that wraps other tensors, the path to a plain one in it; custom ops take no
            wrappers.
        call: which call of ``module``, within one call of the model, applies the weight here.
        rule: how writes are controlled.
    """

    key: str
    d_model: int
    d_ff: int
    d_target: int
    chunk: int
    lr: float
    target: str
    proj: bool
    conv_kernel: int
    module: str
    time_major: bool = False
    derived: bool = False
    inner: str = ""
    call: int = 0
    rule: WriteRule = WriteRule()

    def encode(self) -> str:
        """Canonical string form: equal specs give equal strings."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> SiteSpec:
        """Inverse of :meth:`encode`; files written before sites named their module are read too."""
        fields: dict[str, Any] = json.loads(text)
        fields.setdefault("module", str(fields.get("key", "")).rpartition(".")[0])
        fields["rule"] = WriteRule(**fields.get("rule", {}))
        return cls(**fields)

    @property
    def weight(self) -> str:
        """The weight's name in its model; several sites may share one."""
        return self.key.partition(_USE)[0]

    @property
    def weight_in_module(self) -> str:
        """The weight's name as seen from ``module``."""
        return self.weight.removeprefix(f"{self.module}.") if self.module else self.weight

    @property
    def write_scale(self) -> float:
        """What v is multiplied by before it is written: eta, over C when keys are a mean."""
        return self.lr / self.chunk if self.rule.keys == "mean" else self.lr

    @property
    def conv_name(self) -> str:
        """Name of the added convolution on ``module``."""
        return CONV + self._suffix

    @property
    def proj_name(self) -> str:
        """Name of the added projection on ``module``."""
        return PROJ + self._suffix

    @property
    def _suffix(self) -> str:
        name = self.weight_in_module
        return "" if name == "weight" else "_" + name.replace(".", "_")

    def qualified(self, name: str) -> str:
        """Name in the model of something that ``module`` holds."""
        return f"{self.module}.{name}" if self.module else name

    @property
    def parameters_added(self) -> int:
        """Scalars in conv and P; none for a further call of the same module."""
        if self.call:
            return 0
        return self.d_target * self.conv_kernel + (self.d_target * self.d_model if self.proj else 0)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state and of every accumulation for operands of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def site_key(weight: str, use: int) -> str:
    """The key of the ``use``-th place that applies ``weight``."""
    return f"{weight}{_USE}{use}" if use else weight


def same_sites(encoded: object, specs: Sequence[SiteSpec]) -> bool:
    """Whether a list of encoded specs, read from a file, describes exactly ``specs``."""
    try:
        return isinstance(encoded, list) and tuple(SiteSpec.decode(s) for s in encoded) == tuple(specs)
    except (TypeError, ValueError, AttributeError):
        return False
