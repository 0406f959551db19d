"""The order of the passes, and the identity of the whole pipeline for compile caches.

May be changed here: the order. Passes know nothing of each other beyond :class:`PassState`.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

import ttt_compiler
from ttt_compiler.compat import fork_graph_module
from ttt_compiler.passes.base import PassState
from ttt_compiler.passes.bind_targets import BindTargets
from ttt_compiler.passes.causal_mask import CausalMask
from ttt_compiler.passes.match_markers import MatchMarkers
from ttt_compiler.passes.rewrite import RewriteFastWeights
from ttt_compiler.passes.verify import Verify

# What a compiled graph depends on; a changed report or command line keeps the caches.
_COMPILED_ROOMS = ("passes", "codegen", "runtime")
_COMPILED_FILES = ("backend.py", "compat/__init__.py", "spec.py")

PASSES = (MatchMarkers, BindTargets, RewriteFastWeights, CausalMask, Verify)


@dataclass(frozen=True)
class PipelineResult:
    """A rewritten private copy of the graph, and what each pass touched."""

    gm: fx.GraphModule
    state: PassState
    matched: dict[str, int]


def run_pipeline(gm: fx.GraphModule) -> PipelineResult:
    """Rewrite a captured graph. ``gm`` itself is not changed.

    Raises:
        GraphRewriteError: a chosen site cannot be rewritten.
    """
    state = PassState(fork_graph_module(gm))
    matched = {}
    for make in PASSES:
        current = make()
        current(state)
        matched[current.name] = current.matched_count
    return PipelineResult(state.gm, state, matched)


@functools.cache
def pipeline_uuid() -> str:
    """Changes whenever a pass, a lowering or a kernel of this package changes, or torch does.

    A site's constants are in the graph itself (the marker's string), so changed options change the graph.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for make in PASSES:
        digest.update(make().uuid().encode())
    package = Path(ttt_compiler.__file__).parent
    for room in _COMPILED_ROOMS:
        for path in sorted(p for p in (package / room).rglob("*") if p.suffix in (".py", ".cpp")):
            digest.update(path.read_bytes())
    for name in _COMPILED_FILES:
        digest.update((package / name).read_bytes())
    return digest.hexdigest()
