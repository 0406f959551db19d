"""In-Place Test-Time Training for any transformer, by ``torch.compile(model, backend="inplace_ttt")``.

The public surface, loaded on first use: importing this imports neither triton nor transformers. May be
changed here: what is public.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_compiler import errors as errors
    from ttt_compiler.adapter import load_adapter as load_adapter
    from ttt_compiler.adapter import save_adapter as save_adapter
    from ttt_compiler.config import TTTConfig as TTTConfig
    from ttt_compiler.conversion import convert as convert
    from ttt_compiler.conversion import disabled as disabled
    from ttt_compiler.conversion import revert as revert
    from ttt_compiler.discover import find_sites as find_sites
    from ttt_compiler.graphs import rewrite as rewrite
    from ttt_compiler.memory import memory_plan as memory_plan
    from ttt_compiler.official import from_official as from_official
    from ttt_compiler.official import to_official as to_official
    from ttt_compiler.report import explain as explain
    from ttt_compiler.runtime.pool import Pool as Pool
    from ttt_compiler.runtime.session import Session as Session
    from ttt_compiler.runtime.stats import stats as stats

__version__ = "0.1.0"

_HOME = {
    "Pool": "runtime.pool",
    "Session": "runtime.session",
    "TTTConfig": "config",
    "convert": "conversion",
    "disabled": "conversion",
    "errors": "",
    "explain": "report",
    "find_sites": "discover",
    "from_official": "official",
    "load_adapter": "adapter",
    "memory_plan": "memory",
    "revert": "conversion",
    "rewrite": "graphs",
    "save_adapter": "adapter",
    "stats": "runtime.stats",
    "to_official": "official",
}

__all__ = [
    "Pool",
    "Session",
    "TTTConfig",
    "convert",
    "disabled",
    "errors",
    "explain",
    "find_sites",
    "from_official",
    "load_adapter",
    "memory_plan",
    "revert",
    "rewrite",
    "save_adapter",
    "stats",
    "to_official",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ttt_compiler' has no attribute {name!r}")
    if name == "errors":
        return importlib.import_module("ttt_compiler.errors")
    value = getattr(importlib.import_module(f"ttt_compiler.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
