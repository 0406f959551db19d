"""A Dynamo backend that keeps what it is given, runs it, and names what it finds.

Weights are named through the identity of the tensors that enter a graph, modules through the identity
that Dynamo leaves on every node; no name decides anything. May be changed here: what is recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ttt_compiler.compat import is_wrapper_tensor, meta_tensor, module_stack
from ttt_compiler.discovery.choose_layers import block_indices
from ttt_compiler.discovery.found import Discovery, FoundMLP, Place
from ttt_compiler.discovery.token_path import UNKNOWN, TokenPath, probe
from ttt_compiler.passes.dataflow import read_dataflow
from ttt_compiler.passes.embeddings import token_embeddings
from ttt_compiler.passes.find_mlps import MLPSite, find_mlps
from ttt_compiler.passes.op_classes import OpClass, class_of, higher_order_name, op_name

# Where a value stands: the higher-order nodes around it, and its own node.
_Address = tuple[fx.Node, ...]
# Operators that are called as (body, *operands) and do what the body does.
_RUN_BY_HAND = ("tag_activation_checkpoint", "wrap")
UNNAMED = "an MLP whose weight is no parameter or buffer of the model (a view made outside of the graph)"
IN_LOOP = (
    "which takes no further operands, so it cannot be given what a fast weight needs. Run the layers one "
    "after another instead"
)


class Recorder:
    """Use as ``backend=``, run the model a few times (see ``token_path.py``), then take :meth:`result`."""

    def __init__(self, model: nn.Module, names: Mapping[int, str] | None = None) -> None:
        """Args: the model, and names of tensors that it does not hold, by identity."""
        self.names: dict[int, str] = dict(names or {})
        tensors = (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
        self.aliases: dict[str, list[str]] = {}
        for name, tensor in itertools.chain(*tensors):
            first = self.names.setdefault(id(tensor), name)
            self.aliases.setdefault(first, []).append(name)
        self.modules = {id(module): name for name, module in model.named_modules()}
        # Per module, which call of it an entry of a node's module stack stands for, in one run of a graph.
        self.calls: dict[str, dict[tuple[int, str], int]] = {}
        self.graphs = 0
        # The runs of graphs in the run as given, and per run with one token changed: which one, and its.
        self.first: list[_Run] = []
        self.others: list[tuple[int, list[_Run]]] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """The backend: keep the graph; what it returns keeps every run."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        graph = _Graph(gm, self._names_of(placeholders, inputs))
        self.graphs += 1

        def run(*args: Any) -> Any:
            this = _Run(graph, self._names_of(placeholders, args))
            (self.others[-1][1] if self.others else self.first).append(this)
            return _HiddenStates(this).run(*args)

        return run

    def _names_of(self, placeholders: list[fx.Node], values: Any) -> dict[fx.Node, str]:
        pairs = zip(placeholders, values, strict=True)
        return {n: self.names[id(x)] for n, x in pairs if id(x) in self.names}

    def forget(self) -> None:
        """Drop the runs so far: what failed half-way would count every place of a weight again."""
        self.first.clear()

    def start_run(self, position: int) -> None:
        """What runs from here on has another token at ``position`` of its first row."""
        self.others.append((position, []))

    def without_running(self, gm: fx.GraphModule) -> None:
        """Record one run of which nothing is known but the graph."""
        self.first.append(_Run(_Graph(gm, {}), {}))

    def result(self, leading: tuple[int, int] | None) -> Discovery:
        """Everything that was found; ``leading`` is B and T of the inputs."""
        first = _places(self.first)
        others = [(position, _places(runs)) for position, runs in self.others]
        found = {
            key: [
                self._describe(*place, key, _probed(place, _same_place(others, key, i), leading))
                for i, place in enumerate(places)
            ]
            for key, places in first.items()
            if key is not None
        }
        blocks = block_indices(list(found))
        mlps = (_merged(places, block) for places, block in zip(found.values(), blocks, strict=True))
        # A weight that one place of the model uses as an MLP may be refused at another.
        rejections = dict.fromkeys(
            (run.name_of(weight), reason) for run in self.first for weight, reason in run.graph.rejections
        )
        if None in first:
            rejections[None, UNNAMED] = None
        widths = {r.graph.embed_width for r in self.first if r.graph.embed_width is not None}
        return Discovery(
            tuple(mlps), tuple(rejections), widths.pop() if len(widths) == 1 else None, self.graphs
        )

    def _describe(self, run: _Run, site: MLPSite, key: str, path: TokenPath) -> FoundMLP:
        out, weight = meta_tensor(site.contraction), meta_tensor(site.weight)
        derived = weight is None or is_wrapper_tensor(weight) or not (site.plain and _is_view(site))
        dtype = weight.dtype if weight is not None and not derived else None
        if dtype is None:
            dtype = torch.get_default_dtype() if out is None else out.dtype
        return FoundMLP(
            weight=key,
            d_model=site.d_model,
            d_ff=site.d_ff,
            activation=site.activation,
            gated=site.gated,
            kind=site.kind if path.of_tokens else "other",
            bias=site.bias is not None,
            transposed=site.transposed,
            block=0,
            causal=path.causal,
            places=(self._place(run, site, key),),
            derived=derived,
            dtype=dtype,
            time_major=path.time_major,
            problem=path.problem,
            dataflow=read_dataflow(site),
        )

    def _place(self, run: _Run, site: MLPSite, key: str) -> Place:
        """The innermost module that holds the weight and whose forward applies it; else the model."""
        captured_as = run.graph.names.get(site.top_weight, key)
        for identity, which in module_stack(site.contraction):
            module = self.modules.get(identity)
            for alias in self.aliases.get(captured_as, ()) if module else ():
                if not alias.startswith(f"{module}."):
                    continue
                if captured_as == key:
                    calls = self.calls.setdefault(str(module), {})
                    return Place(alias, str(module), calls.setdefault((id(run), which), len(calls)))
                # The graph was captured in another layer than the one that it runs for here.
                inner = alias.removeprefix(str(module))
                return Place(key, key.removesuffix(inner) if key.endswith(inner) else "")
        return Place(key, "")


@dataclass(eq=False)
class _Graph:
    """One captured graph, searched; ``names`` are of the weights it was captured with."""

    gm: fx.GraphModule
    names: Mapping[fx.Node, str]
    sites: tuple[MLPSite, ...] = ()
    nested: tuple[MLPSite, ...] = ()
    rejections: tuple[tuple[fx.Node | None, str], ...] = ()
    embed_width: int | None = None

    def __post_init__(self) -> None:
        report = find_mlps(self.gm)
        self.sites, self.nested = report.sites, report.nested
        self.rejections = tuple((r.weight, r.reason) for r in report.rejections)
        embeddings = [meta_tensor(n) for n in token_embeddings(self.gm)]
        if len(embeddings) == 1 and embeddings[0] is not None:
            self.embed_width = int(embeddings[0].shape[-1])


@dataclass(eq=False)
class _Run:
    """One execution of a graph: which weights went in, and the hidden activations seen.

    A graph may run for many layers (a graph break in every block), so weights are named per run.
    """

    graph: _Graph
    weights: Mapping[fx.Node, str]
    hidden: dict[_Address, Tensor] = field(default_factory=dict)

    def hidden_of(self, site: MLPSite) -> Tensor | None:
        """The hidden activation of a site; one body runs once per call of it."""
        return self.hidden.get((*site.calls, site.h))

    def name_of(self, weight: fx.Node | None) -> str | None:
        if weight is None:
            return None
        return str(weight.target) if weight.op == "get_attr" else self.weights.get(weight)


class _HiddenStates(fx.Interpreter):
    """Runs a graph and the bodies in it, and keeps every site's hidden activation."""

    def __init__(self, run: _Run, gm: fx.GraphModule | None = None, calls: tuple[fx.Node, ...] = ()) -> None:
        super().__init__(run.graph.gm if gm is None else gm)
        self._run, self._calls = run, calls
        self._wanted = {(*site.calls, site.h) for site in run.graph.sites}
        self._entered = {site.calls[: len(calls) + 1] for site in run.graph.sites}

    def run_node(self, n: fx.Node) -> Any:
        calls = (*self._calls, n)
        if calls in self._entered and higher_order_name(n) in _RUN_BY_HAND:
            body, *operands = self.fetch_args_kwargs_from_env(n)[0]
            return _HiddenStates(self._run, body, calls).run(*operands)
        result = super().run_node(n)
        if calls in self._wanted and isinstance(result, Tensor):
            self._run.hidden[calls] = result.detach().clone()
        return result


def _places(runs: list[_Run]) -> dict[str | None, list[tuple[_Run, MLPSite]]]:
    """Per weight, where it is applied, in the order of the run."""
    found: dict[str | None, list[tuple[_Run, MLPSite]]] = {}
    for run in runs:
        for site in (*run.graph.sites, *run.graph.nested):
            found.setdefault(run.name_of(site.top_weight), []).append((run, site))
    return found


def _same_place(
    others: list[tuple[int, dict[str | None, list[tuple[_Run, MLPSite]]]]], key: str | None, index: int
) -> list[tuple[int, Tensor | None]]:
    """Per run with one token changed: which one, and the hidden activation of one place."""
    found = []
    for position, places in others:
        there = places.get(key, [])[index : index + 1]
        found.append((position, there[0][0].hidden_of(there[0][1]) if there else None))
    return found


def _probed(
    place: tuple[_Run, MLPSite],
    others: list[tuple[int, Tensor | None]],
    leading: tuple[int, int] | None,
) -> TokenPath:
    """Compare a place with itself in the other runs, whose graphs may be others."""
    run, site = place
    if site.body is not None:
        return TokenPath(None, problem=f"it lies in the body of a {site.body}, {IN_LOOP}")
    if site.kind == "moe":
        # Experts get tokens in an order of their own: the comparison would mean nothing.
        return UNKNOWN
    return probe(run.hidden_of(site), others, leading)


def _is_view(site: MLPSite) -> bool:
    """Whether the contraction gets the weight itself, up to transposition and casts."""
    node, root = site.weight_operand, site.weight
    while node is not root:
        if class_of(op_name(node)) not in (OpClass.VIEW, OpClass.CAST) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    value = meta_tensor(root)
    return value is not None and sorted(value.shape) == sorted((site.d_model, site.d_ff))


def _merged(places: list[FoundMLP], block: int) -> FoundMLP:
    """One entry for all places that apply the same weight."""
    causal = [p.causal for p in places]
    problems = [p.problem for p in places if p.problem is not None]
    if len({p.time_major for p in places if p.causal}) > 1:
        problems.append("the places that share its weight lay out rows and tokens differently")
    return replace(
        places[0],
        block=block,
        places=tuple(place for p in places for place in p.places),
        causal=False if False in causal else None if None in causal else True,
        problem=problems[0] if problems else None,
    )
