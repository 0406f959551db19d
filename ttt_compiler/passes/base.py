"""What a pass is, and what the passes of one pipeline hand to each other.

May be changed here: the hand-over fields, with every pass that reads them. A pass never reaches outside of
its :class:`PassState`.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import fx

from ttt_compiler.passes.find_mlps import MLPReport, MLPSite
from ttt_compiler.spec import SiteSpec

MARKER = "ttt::site"


@dataclass(eq=False)
class BoundSite:
    """A marker, the projection it stands for, and (after binding) what the projection gets from it.

    Attributes:
        marker: the ``ttt::site`` node.
        mlp: the detected MLP that applies the marker's weight.
        spec: the constants that travelled in the marker.
        target: the node that holds t; None before binding. Like all below in the projection's own graph.
        conv: the convolution's taps.
        proj: P or None.
        tokens: a tensor ``[B, T, ..]`` or None.
        pos: positions or None.
        state: the running sequences' tensors, or four times None.
    """

    marker: fx.Node
    mlp: MLPSite
    spec: SiteSpec
    target: fx.Node | None = None
    conv: fx.Node | None = None
    proj: fx.Node | None = None
    tokens: fx.Node | None = None
    pos: fx.Node | None = None
    state: tuple[fx.Node | None, ...] = ()


@dataclass(eq=False)
class PassState:
    """One graph on its way through the pipeline."""

    gm: fx.GraphModule
    report: MLPReport = field(default_factory=lambda: MLPReport((), ()))
    sites: list[BoundSite] = field(default_factory=list)
    fast_nodes: list[fx.Node] = field(default_factory=list)


class GraphPass(ABC):
    """One transformation or check. ``matched_count`` is what the last run touched."""

    name: str
    matched_count: int = 0

    def __call__(self, state: PassState) -> None:
        """Run on ``state`` and record the count."""
        self.matched_count = self.run(state)

    @abstractmethod
    def run(self, state: PassState) -> int:
        """Do the work; returns how many places were touched."""

    def uuid(self) -> str:
        """Identity of the pass for compile caches: changes with its source."""
        source = inspect.getsource(inspect.getmodule(type(self)) or type(self))
        return f"{self.name}:{hashlib.sha256(source.encode()).hexdigest()[:16]}"


def graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """``gm`` and every higher-order-op body in it."""
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule)]


def markers(gm: fx.GraphModule) -> list[fx.Node]:
    """Marker nodes of one graph, in order."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and is_op(n, MARKER)]


def is_op(node: fx.Node, qualified_name: str) -> bool:
    """Whether a node calls the custom op ``namespace::name`` (packet or overload)."""
    target = node.target
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return bool(schema.name == qualified_name)
    return getattr(target, "_qualified_op_name", None) == qualified_name
