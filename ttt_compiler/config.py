"""What a user may choose, frozen and checked.

May be changed here: fields, with a default, a check and a docstring line each. A change that alters the
meaning of stored files raises ``VERSION`` and teaches :meth:`TTTConfig.from_dict` the old form.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt_compiler.errors import ConfigError
from ttt_compiler.spec import WriteRule

VERSION = 1
TARGETS = ("hidden_states", "input_embed")
_EVERY = re.compile(r"every:(\d+)(?:\+(\d+))?")

EXPERTS = ("shared", "none")
KEYS = (None, "unit", "mean")
NONFINITE = ("raise", "skip")

# A function gets one :class:`ttt_compiler.discovery.found.FoundMLP` and says whether to choose it.
Layers = str | tuple[int, ...] | tuple[str, ...] | Callable[[Any], bool]


@dataclass(frozen=True)
class TTTConfig:
    """How a model's MLP down-projections become fast weights.

    Attributes:
        layers: which blocks: ``"all"``, ``"every:k"``, ``"every:k+offset"``, a sequence of block indices
            (0-based), a sequence of glob patterns over the weights' names, or a function of one found MLP
            that says whether to choose it (stored as the names it chose).
        chunk_size: C, tokens per write. The paper's ablation is best at 512 and 1024.
        lr: eta in ``W += eta * v^T h``.
        target: what ``v`` is computed from: ``"hidden_states"`` (the MLP's own input) or
            ``"input_embed"`` (the token embeddings).
        proj: whether ``v = conv(t) @ P`` has the projection P, or is ``conv(t)`` alone.
        conv_kernel: taps of the depthwise convolution; odd, centred on the token.
        experts: what becomes of mixtures of experts: ``"shared"`` lets ``layers`` choose experts that see
            every token, ``"none"`` leaves them alone. Routed experts are always left alone.
        normalize_keys: None writes with h itself (the official rule), ``"unit"`` with h scaled to unit norm
            per token, ``"mean"`` with h / C, so that a write is a mean over its tokens.
        max_write_norm: largest Frobenius norm of one chunk's write; a larger write is scaled down to it.
        max_write_ratio: the same, in units of ``||W0||_F``. The smaller of both limits holds.
        decay: gamma in ``W_{i+1} = W0 + gamma (W_i - W0) + write``, above 0 and at most 1 (never forgets).
        on_nonfinite: what happens to a chunk that would write NaN or Inf: ``"raise"`` an error, or
            ``"skip"`` its write and count it (see ``ttt.stats``).
    """

    layers: Layers = "every:6"
    chunk_size: int = 1024
    lr: float = 0.3
    target: str = "hidden_states"
    proj: bool = True
    conv_kernel: int = 5
    experts: str = "shared"
    normalize_keys: str | None = None
    max_write_norm: float | None = None
    max_write_ratio: float | None = None
    decay: float = 1.0
    on_nonfinite: str = "raise"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        _check_int("chunk_size", self.chunk_size, minimum=1)
        _check_int("conv_kernel", self.conv_kernel, minimum=1)
        if self.conv_kernel % 2 == 0:
            raise ConfigError(
                f"conv_kernel={self.conv_kernel} must be odd: the taps are centred on the token"
            )
        if not _is_number(self.lr) or not abs(self.lr) < float("inf"):
            raise ConfigError(f"lr={self.lr!r} must be a finite number")
        object.__setattr__(self, "lr", float(self.lr))
        if self.target not in TARGETS:
            raise ConfigError(f"target={self.target!r} must be one of {', '.join(map(repr, TARGETS))}")
        if self.experts not in EXPERTS:
            raise ConfigError(
                f"experts={self.experts!r} must be one of {', '.join(map(repr, EXPERTS))}. Routed experts "
                "cannot hold fast weights yet (see docs/experts.md)"
            )
        if not isinstance(self.proj, bool):
            raise ConfigError(f"proj={self.proj!r} must be True or False")
        self._check_controls()

    def _check_controls(self) -> None:
        if self.normalize_keys not in KEYS:
            raise ConfigError(
                f"normalize_keys={self.normalize_keys!r} must be one of {', '.join(map(repr, KEYS))}"
            )
        if self.on_nonfinite not in NONFINITE:
            raise ConfigError(
                f"on_nonfinite={self.on_nonfinite!r} must be one of {', '.join(map(repr, NONFINITE))}"
            )
        for name in ("max_write_norm", "max_write_ratio"):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_number(value) or not 0.0 < value < float("inf"):
                raise ConfigError(f"{name}={value!r} must be a positive number, or None for no limit")
            object.__setattr__(self, name, float(value))
        if not _is_number(self.decay) or not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"decay={self.decay!r} must be above 0 and at most 1; 1 never forgets")
        object.__setattr__(self, "decay", float(self.decay))

    @property
    def rule(self) -> WriteRule:
        """The update controls, as the sites carry them."""
        return WriteRule(
            keys=self.normalize_keys or "",
            max_norm=self.max_write_norm,
            max_ratio=self.max_write_ratio,
            decay=self.decay,
            on_nonfinite=self.on_nonfinite,
        )

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of all options, in the order of the class."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TTTConfig:
        """Build a config from ``torch.compile(options=...)``.

        Raises:
            ConfigError: an option is unknown (the message lists the valid ones) or has a bad value.
        """
        check_keys(options, cls.field_names(), what="option")
        return cls(**dict(options))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form with the version stamp.

        Raises:
            ConfigError: ``layers`` is a function; a converted model's own config holds names instead.
        """
        if callable(self.layers):
            raise ConfigError("layers is a function, which cannot be stored; a converted model's config can")
        fields = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            fields["layers"] = list(self.layers)
        return {"version": VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TTTConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: another version, or unknown keys.
        """
        version = data.get("version")
        if version != VERSION:
            raise ConfigError(
                f"configuration version {version!r} cannot be read: this ttt_compiler reads version {VERSION}"
            )
        return cls.from_options({k: v for k, v in data.items() if k != "version"})

    def every(self) -> tuple[int, int] | None:
        """``(k, offset)`` when ``layers`` is ``"every:k"`` or ``"every:k+offset"``, else None."""
        match = _EVERY.fullmatch(self.layers) if isinstance(self.layers, str) else None
        return (int(match[1]), int(match[2] or 0)) if match else None


def check_keys(given: Mapping[str, Any], valid: Sequence[str], *, what: str) -> None:
    """Raise :class:`ConfigError` for the first key of ``given`` that is not in ``valid``."""
    for key in given:
        if key not in valid:
            close = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"unknown {what} {key!r}.{hint} Valid: {', '.join(valid)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_int(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {minimum}")


def _checked_layers(layers: object) -> Layers:
    if callable(layers):
        return layers
    if isinstance(layers, str):
        match = _EVERY.fullmatch(layers)
        if layers == "all" or (match and int(match[1]) > 0):
            return layers
        raise ConfigError(
            f'layers={layers!r} must be "all", "every:k", "every:k+offset", a list of block indices, '
            f"or a list of glob patterns over weight names"
        )
    if isinstance(layers, Sequence) and len(layers) > 0:
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers):
            return tuple(sorted(set(layers)))
        if all(isinstance(p, str) and p for p in layers):
            return tuple(layers)
    raise ConfigError(
        f"layers={layers!r} must be a non-empty list of block indices (>= 0) or of glob patterns"
    )
