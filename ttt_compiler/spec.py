"""The constants of one fast-weight site, and the string form in which they travel through a graph.

All constants go in ONE string argument of the marker op: under ``dynamic=True`` Python floats and ints
become graph inputs, strings never do. May be changed here: fields, together with every reader.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

# Names of the added parameters on the module that owns the weight.
CONV, PROJ = "ttt_conv", "ttt_proj"


@dataclass(frozen=True)
class SiteSpec:
    """One fast-weight site.

    Attributes:
        key: the weight's name in its model; unique per site.
        d_model: D, width of the site's output.
        d_ff: F, width of the hidden activation ``h``.
        d_target: width of the target source ``t``.
        chunk: C, tokens per write.
        lr: eta.
        target: ``"hidden_states"`` or ``"input_embed"``.
        proj: whether P exists.
        conv_kernel: taps of the convolution.
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

    def encode(self) -> str:
        """Canonical string form: equal specs give equal strings."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> SiteSpec:
        """Inverse of :meth:`encode`."""
        return cls(**json.loads(text))

    @property
    def parameters_added(self) -> int:
        """Scalars in conv and P."""
        return self.d_target * self.conv_kernel + (self.d_target * self.d_model if self.proj else 0)
