"""A sequence's memory in one object: keys and values, and fast weights.

May be changed here: what a user can do with a running sequence. Layout belongs to ``state.py``, the file
format to ``snapshot.py``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ttt_compiler.compat.looped_layers import complete
from ttt_compiler.errors import CacheError, ConfigError
from ttt_compiler.runtime import snapshot
from ttt_compiler.runtime.cache import attach_state, evict, only_last, plain_layers, require_empty
from ttt_compiler.runtime.layers import fork_cache, layer_bytes
from ttt_compiler.runtime.root import require_root
from ttt_compiler.runtime.snapshot import MOST_REVOCABLE
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec


class Session:
    """Running sequences of a converted model.

    For a transformers model, pass ``session.cache`` as ``past_key_values`` or ``cache`` (to the model or to
    ``generate``). For a model without a cache, pass ``session.state`` as ``ttt_state``.

    Args:
        model: a converted model.
        batch_size: sequences that run side by side, independent of each other.
        revocable: how many of the last tokens ``cache.crop`` can take back across a chunk's end.

    Attributes:
        cache: the key/value cache that carries the fast weights; None for models without one.
        state: the fast weights.

    A session may be used from several threads: its methods wait for the call that is under way.

    Raises:
        NotConvertedError: the model carries no fast weights.
        ConfigError: a number is out of range.
    """

    def __init__(self, model: nn.Module, batch_size: int = 1, *, revocable: int = 0) -> None:
        self.model, self._root = require_root(model)
        for name, number, least in (("batch_size", batch_size, 1), ("revocable", revocable, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ConfigError(f"{name}={number!r} must be an integer of at least {least}")
        if revocable > MOST_REVOCABLE:
            raise ConfigError(f"revocable={revocable} is more than {MOST_REVOCABLE}, which files can hold")
        state = self._root.new_state(batch_size, revocable)
        self.cache: Any = None
        self._state = state
        if self._root.make_cache is not None:
            self.cache = attach_state(self._root.make_cache(), state)

    @property
    def state(self) -> FastWeightState:
        """The fast weights of every row."""
        return self._state if self.cache is None else self.cache.ttt

    @property
    def batch_size(self) -> int:
        """Sequences that run side by side."""
        return self.state.batch_size

    @property
    def tokens_seen(self) -> list[int]:
        """Tokens since the document began, per row."""
        return self.state.tokens_seen

    def weight(self, spec: SiteSpec) -> Tensor:
        """W0 ``[D, F]`` of a site.

        Raises:
            UnsupportedModelError: it exists inside of the forward pass only.
        """
        return self._root.weight(spec)

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """A block in which no call of the model runs in another thread."""
        with self._root.lock:
            yield

    def keep_revocable(self, tokens: int) -> None:
        """From now on ``cache.crop`` can take back the last ``tokens`` tokens, wherever chunks end.

        Costs ``tokens`` more rows of the tail per site. Assisted decoding asks for it by itself.
        """
        with self._root.lock:
            self.state.keep_revocable(tokens)

    def drift(self) -> dict[str, list[float]]:
        """``||W - W0||_F / ||W0||_F`` per site and row."""
        with self._root.lock:
            return self.state.drift({s.key: self._root.weight(s) for s in self._root.specs})

    def describe(self) -> dict[str, Any]:
        """Size and position of the session, JSON-ready."""
        with self._root.lock:
            return {
                "batch_size": self.batch_size,
                "tokens_seen": self.tokens_seen,
                "chunks_written": self.state.chunks_written,
                "cached_tokens": 0 if self.cache is None else int(self.cache.get_seq_length()),
                "fast_weight_bytes": self.state.nbytes,
                "cache_bytes": layer_bytes(self.cache),
            }

    def fork(self) -> Session:
        """An independent session that stands where this one stands.

        It shares memory with this one until either runs: a prefix that is only read costs nothing.
        """
        other = object.__new__(Session)
        other.model, other._root = self.model, self._root
        with self._root.lock:
            other._state, other.cache = self.state.clone(), None
            if self.cache is not None:
                other.cache = attach_state(fork_cache(self.cache), other._state)
        return other

    def reset(self) -> None:
        """Forget everything: no keys and values, slow weights."""
        with self._root.lock:
            if self.cache is None:
                self._state.reset()
            else:
                self.cache.reset()

    def evict(self, keep: int, sink: int = 0) -> None:
        """Drop keys and values but for the first ``sink`` and the last ``keep`` tokens.

        Fast weights stay: this is how a document longer than the attention window is read. Positions go
        on counting, so pass ``position_ids`` with every later call.

        Raises:
            CacheError: the cache keeps its keys and values in another way than ``DynamicLayer``.
        """
        if keep < 0 or sink < 0:
            raise CacheError(f"evict(keep={keep}, sink={sink}): both must be at least 0")
        with self._root.lock:
            evict(plain_layers(self.cache), keep, sink)
            # What is kept may be taken back; what lies before it is gone.
            if self.cache is not None:
                self.cache.arrivals = only_last(self.cache.arrivals, keep)

    def save(self, path: str | os.PathLike[str], *, compress: str | None = None) -> None:
        """Write the session to ``path`` (safetensors with a JSON header), replacing a file atomically.

        Args:
            path: the file.
            compress: a smaller, lossy form of what was written: ``"bf16"``, ``"int8"``, ``"lowrank:r"``. The
                file's header says what each fast weight loses. Keys and values are kept as they are.

        Raises:
            ConfigError: unknown ``compress``.
            SnapshotError: the cache holds layers that cannot be saved, or the disk refuses; an existing file
                is untouched.
        """
        # A fork stands still while it is written, and calls of this session go on.
        still = self.fork()
        snapshot.save(path, self.model, self._root, still.state, still.cache, compress)

    @classmethod
    def load(cls, model: nn.Module, path: str | os.PathLike[str], *, cache: Any = None) -> Session:
        """Read a session that :meth:`save` wrote, bit for bit.

        Args:
            model: the model that it was saved with.
            path: the file.
            cache: an empty cache to fill, for a session of another kind than a new one has (a StaticCache).

        Raises:
            SnapshotError: damaged, hostile, of another version, or of another model.
            CacheError: ``cache`` is none, or is not empty.
            NotConvertedError: the model carries no fast weights.
        """
        module, root = require_root(model)
        if cache is not None:
            require_empty(cache)
            if root.make_cache is not None:
                config: Any = module.config
                complete(cache, config.get_text_config(decoder=True))
        elif root.make_cache is not None:
            cache = root.make_cache()
        loaded = snapshot.load(path, module, root, cache)
        session = object.__new__(cls)
        session.model, session._root, session._state = module, root, loaded.state
        session.cache = None
        if cache is not None:
            loaded.fill(cache)
            session.cache = attach_state(cache, loaded.state)
        return session
