"""Find the MLPs of a model by running it once on a few tokens under a recording backend.

No module or parameter name decides anything: the captured graphs are searched by dataflow, and the weights
are named through the identity of the parameters that enter the graphs. A second run with another last
token shows which MLPs see later tokens. May be changed here: example inputs, the causality probe.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ttt_compiler.compat import capture, meta_tensor, uncompiled_call
from ttt_compiler.errors import UnsupportedModelError
from ttt_compiler.passes.choose_layers import block_indices
from ttt_compiler.passes.dataflow import Dataflow, read_dataflow
from ttt_compiler.passes.embeddings import token_embeddings
from ttt_compiler.passes.find_mlps import MLPSite, find_mlps

_BATCH, _TOKENS = 2, 9
# Earlier tokens of a causal model do not change at all; this only forgives a library that splits its
# reductions differently between two runs.
_CAUSAL_TOLERANCE = 1e-5

Inputs = tuple[Sequence[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class FoundMLP:
    """One MLP of a model.

    Attributes:
        weight: name of the down-projection's weight parameter.
        d_model: D. d_ff: F.
        activation: e.g. ``"silu"``.
        gated: whether two branches are multiplied.
        kind: ``"dense"`` or ``"moe"``.
        bias: whether the projection has a bias.
        transposed: whether the weight is stored ``[F, D]``.
        block: index of the block it belongs to.
        causal: whether its input at a token is independent of later tokens; None when not probed.
        uses: how many places of the model use this weight.
        dataflow: its first use, to be drawn.
    """

    weight: str
    d_model: int
    d_ff: int
    activation: str
    gated: bool
    kind: str
    bias: bool
    transposed: bool
    block: int
    causal: bool | None
    uses: int
    dataflow: Dataflow | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Discovery:
    """What a model holds.

    Attributes:
        mlps: in graph order, one entry per weight.
        rejections: (weight name or None, reason) of every contraction that is no MLP down-projection.
        embed_width: width of the token embeddings, None when the graph has none.
        graphs: how many graphs the model was captured in; 1 without graph breaks.
    """

    mlps: tuple[FoundMLP, ...]
    rejections: tuple[tuple[str | None, str], ...]
    embed_width: int | None
    graphs: int


def discover(model: nn.Module, example_inputs: Inputs | None = None) -> Discovery:
    """Capture ``model`` and describe its MLPs; the model is not changed.

    Args:
        model: any module; a transformers causal language model needs no inputs.
        example_inputs: ``(args, kwargs)`` of one call, batch and tokens first.

    Raises:
        UnsupportedModelError: the model cannot be called without example inputs, or was not captured.
    """
    args, kwargs = example_inputs if example_inputs is not None else default_inputs(model)
    recorder = _Recorder(model)
    run = capture(uncompiled_call(model), recorder)
    with _quiet(model), torch.no_grad():
        run(*args, **kwargs)
        changed = _with_other_last_token(args, kwargs)
        if changed is not None:
            recorder.start_second_run()
            run(*changed[0], **changed[1])
    if not recorder.graphs:
        raise UnsupportedModelError(
            f"{type(model).__name__} was not captured by Dynamo: is its forward disabled or a script module?"
        )
    return recorder.result(_leading_shape(args, kwargs))


def default_inputs(model: nn.Module) -> Inputs:
    """A few random token ids for a transformers model.

    Raises:
        UnsupportedModelError: for other models, asking for ``example_inputs``.
    """
    config = getattr(model, "config", None)
    vocab = getattr(config, "vocab_size", None)
    if vocab is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} is no text model of transformers, so its inputs are unknown. Type "
            "ttt.convert(model, config, example_inputs=((x,), {})) with one batch x [batch, tokens, ...]"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (_BATCH, _TOKENS), generator=generator)
    device = next(model.parameters()).device
    return (), {"input_ids": ids.to(device), "use_cache": False}


class _Recorder:
    """A Dynamo backend that keeps what it is given and interprets it."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), name)
        self.graphs: list[_Graph] = []
        self.second_run = False

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graph = _Graph(gm, inputs, self.names)
        self.graphs.append(graph)

        def run(*args: Any) -> Any:
            return _HiddenStates(graph, graph.second if self.second_run else graph.first).run(*args)

        return run

    def start_second_run(self) -> None:
        self.second_run = True

    def result(self, leading: tuple[int, int] | None) -> Discovery:
        sites = [(g, s) for g in self.graphs for s in g.sites]
        keys = [g.weight_name(s.top_weight) or f"<unnamed {s.weight.name}>" for g, s in sites]
        uses = Counter(keys)
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        order = sorted(first, key=lambda key: first[key])
        blocks = dict(zip(order, block_indices(order), strict=True))
        mlps = tuple(_describe(*sites[first[key]], key, blocks[key], uses[key], leading) for key in order)
        widths = {g.embed_width for g in self.graphs if g.embed_width is not None}
        return Discovery(
            mlps,
            tuple(r for g in self.graphs for r in g.rejections),
            widths.pop() if len(widths) == 1 else None,
            len(self.graphs),
        )


class _Graph:
    """One captured graph, searched."""

    def __init__(self, gm: fx.GraphModule, inputs: list[Any], names: dict[int, str]) -> None:
        self.gm = gm
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._weights = {n: names[id(x)] for n, x in zip(placeholders, inputs, strict=True) if id(x) in names}
        report = find_mlps(gm)
        self.sites = report.sites
        self.rejections = [
            (None if r.weight is None else self.weight_name(r.weight), r.reason) for r in report.rejections
        ]
        embeddings = [meta_tensor(n) for n in token_embeddings(gm)]
        self.embed_width = (
            int(embeddings[0].shape[-1]) if len(embeddings) == 1 and embeddings[0] is not None else None
        )
        self.hidden = {s.h: s for s in self.sites}
        self.first: dict[fx.Node, Tensor] = {}
        self.second: dict[fx.Node, Tensor] = {}

    def weight_name(self, node: fx.Node) -> str | None:
        if node.op == "get_attr":
            return str(node.target)
        return self._weights.get(node)


class _HiddenStates(fx.Interpreter):
    """Runs a graph and keeps every site's hidden activation."""

    def __init__(self, graph: _Graph, store: dict[fx.Node, Tensor]) -> None:
        super().__init__(graph.gm)
        self._wanted, self._store = graph.hidden, store

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._wanted and isinstance(result, Tensor):
            self._store[n] = result.detach().clone()
        return result


def _describe(
    graph: _Graph, site: MLPSite, key: str, block: int, uses: int, leading: tuple[int, int] | None
) -> FoundMLP:
    return FoundMLP(
        weight=key,
        d_model=site.d_model,
        d_ff=site.d_ff,
        activation=site.activation,
        gated=site.gated,
        kind=site.kind,
        bias=site.bias is not None,
        transposed=site.transposed,
        block=block,
        # Routed experts see tokens in expert order: the probe's comparison means nothing there.
        causal=None
        if site.kind != "dense"
        else _is_causal(graph.first.get(site.h), graph.second.get(site.h), leading),
        uses=uses,
        dataflow=read_dataflow(site),
    )


def _is_causal(a: Tensor | None, b: Tensor | None, leading: tuple[int, int] | None) -> bool | None:
    """Whether hidden activations at all but the last token are the same in both runs."""
    if a is None or b is None or a.is_meta or leading is None or a.numel() % (leading[0] * leading[1]):
        return None
    a, b = (x.reshape(*leading, -1)[:, :-1].double() for x in (a, b))
    return bool((a - b).norm() <= _CAUSAL_TOLERANCE * a.norm())


def _leading_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and x.dim() >= 2:
            return int(x.shape[0]), int(x.shape[1])
    return None


def _with_other_last_token(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs | None:
    """The same call with the first sequence-shaped tensor changed at its last token."""
    values: list[Any] = [*args, *kwargs.values()]
    for i, x in enumerate(values):
        if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[1] > 1 and not x.is_meta:
            x = x.clone()
            if x.dtype.is_floating_point:
                x[:, -1] = -x[:, -1] + 1
            else:
                # Ids stay inside the range that the inputs already use.
                x[:, -1] = torch.where(x[:, -1] == x[:, 0], x.flatten().min(), x[:, 0])
            values[i] = x
            return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))
    return None


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and untouched random state while the model is looked at."""
    training = {m for m in model.modules() if m.training}
    model.eval()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for m in model.modules():
                m.training = m in training


def find_sites(net: nn.Module, *args: Any, **kwargs: Any) -> tuple[FoundMLP, ...]:
    """The MLPs of any module, found by calling it once on example inputs.

    Args:
        net: the module; it is not changed.
        args: example inputs, batch and tokens first; a transformers text model needs none.
        kwargs: example inputs by name.
    """
    return discover(net, (args, kwargs) if args or kwargs else None).mlps
