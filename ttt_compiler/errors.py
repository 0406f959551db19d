"""One class per user mistake; every message says what happened, where, and what to type.

May be changed here: new classes and wording. Raising them is the business of the module that sees the
mistake. Option mistakes are also ``ValueError`` so that code written against plain torch keeps catching
them.
"""

from __future__ import annotations


class TTTError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(TTTError, ValueError):
    """An option or configuration value is unknown, of the wrong type or out of range."""


class NoMLPFoundError(TTTError):
    """Nothing in the traced model is a convertible MLP; the message lists what was refused and why."""


class LayerSelectionError(ConfigError):
    """``layers=`` names a block that does not exist or selects nothing."""


class NonCausalModelError(TTTError):
    """A chosen MLP sees later tokens, so a write at one token would leak into earlier outputs."""


class UnsupportedModelError(TTTError):
    """The model's structure cannot carry fast weights yet; the message says which part and why."""


class UnsupportedDeviceError(TTTError):
    """No fast-weight kernel exists for the tensors' device, or nothing is known of a device to plan for."""


class GraphRewriteError(TTTError):
    """A fast-weight site in a captured graph could not be rewritten; nothing was compiled."""


class NotConvertedError(TTTError):
    """The compiled function contains MLPs of a model that was never converted."""


class AlreadyConvertedError(TTTError):
    """The model already carries fast weights under another configuration."""


class ConversionLostError(TTTError):
    """A part of a converted model was replaced, and its fast weights with it."""


class NotCompiledError(TTTError, RuntimeError):
    """A converted model was run without ``backend="inplace_ttt"``."""


class CacheError(TTTError):
    """A key/value cache does not carry the fast-weight state its tokens should have left."""


class CropError(CacheError):
    """A rollback would have to undo a chunk that is already written."""


class PoolError(TTTError):
    """A pool cannot lend a sequence: unknown, in use, damaged, or beyond what was planned for it."""


class PoolFullError(PoolError):
    """A pool has no slot, and nowhere to put what holds one."""


class PositionError(TTTError, ValueError):
    """Position ids or masks that do not describe contiguous documents."""


class NonFiniteWriteError(TTTError, FloatingPointError):
    """A chunk would write NaN or Inf into the fast weights; nothing was written for it."""


class AdapterError(TTTError):
    """An adapter file does not fit the model or cannot be read; the model is unchanged."""


class OfficialCheckpointError(TTTError):
    """A checkpoint is not one of the official implementation, or a model cannot be written as one."""


class SnapshotError(TTTError):
    """A saved session is damaged, of another model, or holds something that cannot be saved."""
