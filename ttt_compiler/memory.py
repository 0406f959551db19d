"""``memory_plan``: what a running batch needs, before anything is allocated.

Three parts: keys and values (``runtime/cache_size.py``), fast weights (``runtime/tables.py``, by which they
are allocated too), and the model's weights. May be changed here: what a plan says; how it looks is
``memory_text.py``. What each part takes belongs to the modules that allocate it.

Works for models that this machine could not hold: a configuration becomes a model on the meta device, without
memory. Such a model has shapes and no values, so it is searched by the same passes as a real one (which MLPs,
how wide, which of them ``layers=`` chooses), but what only values tell is not checked: that a chosen MLP
sees no later tokens, and that rows do not see each other. ``convert`` checks both when the weights are there.
A narrow copy with random weights was the alternative; it would check another model than the one asked about.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ttt_compiler import conversion
from ttt_compiler.compat import held_bytes
from ttt_compiler.config import TTTConfig
from ttt_compiler.discover import Discovery, Inputs, discover
from ttt_compiler.eligibility import check_sites
from ttt_compiler.errors import AlreadyConvertedError, ConfigError, TTTError, UnsupportedModelError
from ttt_compiler.memory_sites import FORMULA, SHARED, SiteKind, site_kinds
from ttt_compiler.memory_text import render
from ttt_compiler.runtime.cache_size import CacheKind, cache_kinds, meta_twin, total_bytes
from ttt_compiler.runtime.root import unwrap
from ttt_compiler.runtime.tables import bytes_per_sequence, has_room_to_spread
from ttt_compiler.spec import SiteSpec

DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
CACHES = ("dynamic", "static")

UNCOUNTED = "not counted: activations, logits and workspace of a call, and what the allocator rounds up"
SHAPES_ONLY = (
    "looked at without weights: that no chosen MLP sees later tokens or other rows is checked by ttt.convert"
)
WINDOWS = (
    "a sliding window of a DynamicCache is a view: until the next call it keeps the tokens of the last call "
    "in memory as well. Read a long prompt in parts"
)
NO_CACHE = "the model keeps no keys and values: its fast weights are passed as ttt_state"


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`memory_plan` found; ``print`` it, or take ``to_dict()``.

    Attributes:
        model: class of the model.
        dtype: of the model.
        batch: sequences that run side by side.
        context: tokens of each.
        cache: ``"dynamic"`` or ``"static"``.
        layers: what chose the sites.
        kv: keys, values and states, by kinds of layers.
        sites: fast weights, by shape.
        fast_weight_bytes: of one sequence: all sites, and what the batch keeps per sequence beside them.
        formula: of ``SiteKind.nbytes``.
        weight_bytes: parameters and buffers of the model.
        added_bytes: conv and P.
        notes: what the numbers leave out.
    """

    model: str
    dtype: str
    batch: int
    context: int
    cache: str
    layers: str
    kv: tuple[CacheKind, ...]
    sites: tuple[SiteKind, ...]
    fast_weight_bytes: int
    formula: str
    weight_bytes: int
    added_bytes: int
    notes: tuple[str, ...]

    @property
    def kv_bytes(self) -> int:
        """Keys, values and states of one sequence at ``context`` tokens."""
        return total_bytes(self.kv, self.context)

    @property
    def sequence_bytes(self) -> int:
        """One sequence."""
        return self.kv_bytes + self.fast_weight_bytes

    @property
    def batch_bytes(self) -> int:
        """All sequences."""
        return self.batch * self.sequence_bytes

    @property
    def total_bytes(self) -> int:
        """All sequences and the model."""
        return self.batch_bytes + self.weight_bytes + self.added_bytes

    @property
    def even_context(self) -> int | None:
        """Tokens from which on keys and values take at least what the fast weights take; None for never."""
        limits = [k.limit for k in self.kv if k.per_token]
        high = max((limit for limit in limits if limit is not None), default=1)
        while None in limits and total_bytes(self.kv, high) < self.fast_weight_bytes:
            high *= 2
        if total_bytes(self.kv, high) < self.fast_weight_bytes:
            return None
        low = -1
        while high - low > 1:
            middle = (low + high) // 2
            enough = total_bytes(self.kv, middle) >= self.fast_weight_bytes
            low, high = (low, middle) if enough else (middle, high)
        return high

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, all sizes in bytes."""
        kv = [
            {
                "name": kind.name,
                "layers": kind.layers,
                "bytes_per_token": sum(n.nbytes for n in kind.per_token),
                "most_tokens": kind.limit,
                "constant_bytes": sum(n.nbytes for n in kind.constant),
                "layer_bytes": kind.layer_bytes(self.context),
                "formula": kind.formula(self.context),
            }
            for kind in self.kv
        ]
        given = ("model", "dtype", "batch", "context", "cache", "layers")
        sums = (
            "fast_weight_bytes",
            "kv_bytes",
            "sequence_bytes",
            "batch_bytes",
            "weight_bytes",
            "added_bytes",
        )
        return {
            **{name: getattr(self, name) for name in given},
            "kv": kv,
            "sites": [dataclasses.asdict(kind) for kind in self.sites],
            "formula": self.formula,
            **{name: getattr(self, name) for name in (*sums, "total_bytes")},
            "even_context": self.even_context,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return render(self)


def memory_plan(
    model: Any,
    batch: int,
    context: int,
    config: TTTConfig | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    cache: str = "dynamic",
    revocable: int = 0,
    shared_lanes: bool = False,
    device: torch.device | str | None = None,
    example_inputs: Inputs | None = None,
) -> MemoryPlan:
    """What ``batch`` sequences of ``context`` tokens need beside the model; nothing is allocated.

    Args:
        model: a module, converted or not, on the meta device too; it is not changed. Or a configuration of
            transformers, its dictionary, or a name or folder (see ``pretrained.load_config``).
        batch: sequences that run side by side.
        context: tokens of each; of a static cache, what it reserves.
        config: what is converted, by default ``TTTConfig()``; a converted model has its own.
        dtype: of a configuration's model, by default its own; a module has one.
        cache: ``"dynamic"`` or ``"static"``, transformers' ``DynamicCache`` or ``StaticCache``.
        revocable: how many of the last tokens can be taken back, as in ``Session(revocable=)``.
        shared_lanes: whether sequences share tables, as in a ``Pool``.
        device: where the model will run, by default where it is, and the CPU for what has no weights yet.
        example_inputs: ``(args, kwargs)`` of one call; models of transformers need none.

    Raises:
        ConfigError: an argument is out of range.
        UnsupportedModelError: the cache cannot be measured without weights, or a site cannot be converted.
        NoMLPFoundError, LayerSelectionError, NonCausalModelError, AlreadyConvertedError: as ``convert``.
    """
    for name, number, least in (("batch", batch, 1), ("context", context, 1), ("revocable", revocable, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ConfigError(f"{name}={number!r} must be an integer of at least {least}")
    if cache not in CACHES:
        raise ConfigError(f"cache={cache!r} must be one of {', '.join(map(repr, CACHES))}")
    with torch.random.fork_rng(devices=[]):
        module = _module(model, _checked_dtype(dtype))
        specs, site_dtype, layers = _sites(module, config, example_inputs)
        kinds = _cache_kinds(module, cache)
    spread = has_room_to_spread(_device(module, device), revocable)
    options: dict[str, Any] = {"revocable": revocable, "shared_lanes": shared_lanes, "spread": spread}
    weights, added = _weight_bytes(module, specs, site_dtype)
    return MemoryPlan(
        model=type(module).__name__,
        dtype=_name(_dtype_of(module)),
        batch=batch,
        context=context,
        cache=cache,
        layers=layers,
        kv=kinds,
        sites=site_kinds(specs, site_dtype, options),
        fast_weight_bytes=bytes_per_sequence(specs, site_dtype, **options),
        formula=FORMULA + SHARED * shared_lanes,
        weight_bytes=weights,
        added_bytes=added,
        notes=_notes(module, kinds, cache, context),
    )


def _device(module: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where the model will run.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        there = next(module.parameters()).device if device is None else torch.device(device)
    except RuntimeError as e:
        raise ConfigError(f"device={device!r} is no device of torch, such as cpu or cuda") from e
    return torch.device("cpu") if there.type == "meta" else there


def _module(model: Any, dtype: torch.dtype | None) -> nn.Module:
    """The module to look at; what has no weights yet becomes one on the meta device."""
    if isinstance(model, nn.Module):
        module = unwrap(model)
        own = _dtype_of(module)
        if dtype not in (None, own):
            raise ConfigError(
                f"dtype={_name(dtype)!r}: this model is in {_name(own)}, and is planned for as it is. Type "
                "model.to(dtype) first, or pass its configuration"
            )
        return module
    if isinstance(model, str):
        from ttt_compiler.pretrained import load_config

        model = load_config(model)
    elif isinstance(model, Mapping):
        from transformers import AutoConfig

        if "model_type" not in model:
            raise ConfigError('a dictionary that describes a model names its type: "model_type"')
        model = AutoConfig.for_model(**model)
    if not hasattr(model, "get_text_config"):
        raise ConfigError(
            f"model is a {type(model).__name__}; it must be a module, a configuration of transformers, or "
            "the name of one"
        )
    return meta_twin(model, dtype or _checked_dtype(getattr(model, "dtype", None)) or torch.float32)


def _sites(
    module: nn.Module, config: TTTConfig | None, inputs: Inputs | None
) -> tuple[tuple[SiteSpec, ...], torch.dtype, str]:
    """The sites, the dtype of their rows, and what chose them."""
    root = conversion.root_of(module)
    if root is not None:
        if config is not None and config not in (root.requested, root.config):
            raise AlreadyConvertedError(
                f"{type(module).__name__} is already converted with {root.config}. Leave config= out, or "
                "type ttt.revert(model) first"
            )
        return root.specs, root.like(root.specs[0]).dtype, _layers(root.requested)
    config = TTTConfig() if config is None else config
    conversion.check_kind(module)
    found = _found(module, inputs)
    chosen = check_sites(module, config, found)
    specs = [s for mlp in chosen for s in conversion.site_specs(config, mlp, found, module)]
    return tuple(specs), chosen[0].dtype, _layers(config)


def _found(module: nn.Module, inputs: Inputs | None) -> Discovery:
    try:
        return discover(module, inputs)
    except TTTError:
        raise
    except Exception as e:
        if not _is_meta(module):
            raise
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be looked at without weights ({type(e).__name__}: "
            f"{(str(e).strip() or 'no message').splitlines()[0]}). Pass the model with its weights"
        ) from e


def _is_meta(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters())


def _cache_kinds(module: nn.Module, cache: str) -> tuple[CacheKind, ...]:
    if conversion.cache_factory(module) is None:
        return ()
    return cache_kinds(module.config, _dtype_of(module), model_class=type(module), static=cache == "static")


def _weight_bytes(module: nn.Module, specs: Sequence[SiteSpec], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the model as it came, and of conv and P; tied tensors count once."""
    ours = {s.qualified(name) for s in specs for name in (s.conv_name, s.proj_name)}
    weights = added = 0
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if name in ours:
            added += held_bytes(tensor)
        else:
            weights += held_bytes(tensor)
    return weights, added or sum(s.parameters_added for s in specs) * dtype.itemsize


def _notes(module: Any, kinds: Sequence[CacheKind], cache: str, context: int) -> tuple[str, ...]:
    notes = [UNCOUNTED]
    if _is_meta(module) and conversion.root_of(module) is None:
        notes.append(SHAPES_ONLY)
    if not kinds:
        notes.append(NO_CACHE)
    if cache == "dynamic" and any(k.limit is not None for k in kinds):
        notes.append(WINDOWS)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < context:
            notes.append(
                f"context {context:,} is beyond the {longest:,} positions that the model was made for"
            )
    return tuple(notes)


def _layers(config: TTTConfig) -> str:
    if not callable(config.layers):
        return repr(config.layers)
    return f"<function {getattr(config.layers, '__name__', type(config.layers).__name__)}>"


def _dtype_of(module: nn.Module) -> torch.dtype:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((x.dtype for x in tensors if x.is_floating_point()), torch.get_default_dtype())


def _checked_dtype(dtype: object) -> torch.dtype | None:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if dtype is not None and found is None:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(map(repr, DTYPES))}")
    return found


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
