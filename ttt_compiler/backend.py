"""``torch.compile(model, backend="inplace_ttt", options=..., mode=...)``.

Two doors. :func:`inplace_ttt` is the Dynamo backend: a captured graph goes through the pass pipeline and
on to AOTAutograd and Inductor. :func:`bind` stands in front of it, outside of any capture: it checks the
options when ``torch.compile`` is called, converts the model at its first call, and settles the cache of
every call. May be changed here: what options mean. Importing this registers both.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ttt_compiler import compat
from ttt_compiler.codegen import ops  # noqa: F401  (registers the ops before any graph is loaded)
from ttt_compiler.compat.cache_names import NEW, OLD, cache_in
from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import (
    ENTRY,
    convert,
    is_known_weight,
    is_region,
    must_be_fast,
    region_context,
    root_of,
)
from ttt_compiler.errors import (
    AlreadyConvertedError,
    CacheError,
    ConfigError,
    GraphRewriteError,
    NotCompiledError,
    NotConvertedError,
    UnsupportedModelError,
)
from ttt_compiler.passes.base import is_op
from ttt_compiler.passes.pipeline import PipelineResult, pipeline_uuid, run_pipeline
from ttt_compiler.runtime.calls import call_mode
from ttt_compiler.runtime.root import REWRITTEN, Root


def inplace_ttt(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend: rewrite fast-weight sites, then compile with Inductor.

    Args:
        gm: the captured graph.
        example_inputs: its inputs; parameters are the real ones.
        options: fields of :class:`TTTConfig`; used when the model is converted, checked here.
        mode: as for ``torch.compile`` ("default", "reduce-overhead", "max-autotune", ...).

    Raises:
        ConfigError: unknown option or mode.
        NotConvertedError: the graph holds MLPs of a model that was never converted.
        GraphRewriteError: a chosen site cannot be rewritten.
    """
    parse_options(options, mode)
    result = _rewritten(gm, example_inputs)
    import ttt_compiler.codegen.lowering  # noqa: F401  (a second of imports that only compiling needs)

    return compat.inductor_compile(result.gm, example_inputs, mode=mode, uuid=pipeline_uuid())


def inplace_ttt_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The same rewriting, without Inductor: the rewritten graph runs op by op.

    For debugging and for tests of many models: what differs between the two backends is Inductor's.

    Raises:
        ConfigError, NotConvertedError, GraphRewriteError: as :func:`inplace_ttt`.
    """
    parse_options(options, mode)
    forward: Callable[..., Any] = _rewritten(gm, example_inputs).gm.forward
    return forward


def _rewritten(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> PipelineResult:
    if (call := _current.get()) is not None:
        call[1].check_modules(call[0])
    result = run_pipeline(gm)
    _require_fast(example_inputs, result)
    return result


def parse_options(options: Mapping[str, Any] | None, mode: str | None) -> TTTConfig | None:
    """The config that ``options`` describe, None when none were given.

    Raises:
        ConfigError: unknown option or mode.
    """
    if mode is not None and mode not in compat.inductor_modes():
        raise ConfigError(f"unknown mode {mode!r}. Valid: {', '.join(compat.inductor_modes())}")
    return TTTConfig.from_options(options) if options else None


def bind(
    module: nn.Module,
    forward: Callable[..., Any],
    compile_one: compat.CompileOne,
    backend_kwargs: Mapping[str, Any],
) -> Callable[..., Any]:
    """What runs when a module compiled with our backend is called.

    Converts the module at its first call when nobody did before. A call that runs on a state records no
    autograd graph: writes into running fast weights are not differentiable.
    """
    config = check_kwargs(backend_kwargs)
    root = root_of(module)
    if root is not None:
        _check_same(module, root, config)
    is_forward = getattr(forward, "__name__", "") == "forward"
    compiled: dict[object, Callable[..., Any]] = {}
    converted = root is not None

    def run(kind: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # One code object per kind of call: Dynamo budgets recompiles per code object (8), gives up in
        # silence when they are spent, and a model that serves prefill, decode, padded and plain batches
        # spends them on structure alone. Within a kind only sizes vary.
        if kind not in compiled:
            here = root_of(module)
            # Conversion has put the boundary on the module; a bound forward from before it lacks that.
            behind = here.forward if is_forward and here is not None and here.forward else forward
            compiled[kind] = compile_one(compat.own_code(behind))
        try:
            return compiled[kind](*args, **kwargs)
        except NotCompiledError as e:
            e.add_note(
                "The call did go through torch.compile, but Dynamo ran it uncompiled: a graph break "
                "inside of a "
                "layer, torch.compiler.set_stance, or torch._dynamo.config.recompile_limit (raise "
                "it, or pass "
                "dynamic=True). TORCH_LOGS=recompiles,graph_breaks shows which"
            )
            raise
        except Exception as e:
            # A mistake of the user's deserves its own class, not the compiler's wrapper around it.
            ours = compat.user_error(e)
            if ours is None:
                raise
            raise ours from None

    @functools.wraps(forward)
    def entry(*args: Any, **kwargs: Any) -> Any:
        nonlocal converted
        # Not ``is_compiling()``: that is true in every thread while any of them compiles.
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return forward(*args, **kwargs)
        if REWRITTEN in module.__dict__:
            return run("rewritten", args, kwargs)
        root = root_of(module)
        if root is None and is_region(module):
            _check_region(module, kwargs)
            with call_mode(False):
                return run("region", args, kwargs)
        if root is None and converted:
            raise NotConvertedError(
                f"{type(module).__name__} was reverted, and this is its compiled wrapper. Call the "
                "model itself, or "
                "ttt.convert(model, ...) it again"
            )
        if root is None:
            root = root_of(convert(module, config, example_inputs=_example_inputs(module, args, kwargs)))
            assert root is not None, "convert records a root"
        converted = True
        _check_same(module, root, config)
        args = tuple(_whole(x) for x in args)
        kwargs = {name: _whole(x) for name, x in kwargs.items()}
        with root.lock:
            kwargs, stateful = root.prepare(args, kwargs)
            token = _current.set((module, root))
            try:
                with root.running(args, kwargs), call_mode(stateful):
                    return run(root.kind(args, kwargs), args, kwargs)
            finally:
                _current.reset(token)
                # An error between two captured parts must not leave this call's state to the next one.
                root.leave()

    setattr(entry, ENTRY, True)
    return entry


def _whole(x: Any) -> Any:
    """A slice of ids or positions as a tensor of its own.

    Dynamo guards on a slice's offset and strides: a document that is read piece by piece, ``ids[:, i:j]``,
    would be compiled again for every piece.
    """
    if type(x) is not Tensor or x.is_floating_point() or (x.storage_offset() == 0 and x.is_contiguous()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def check_kwargs(backend_kwargs: Mapping[str, Any]) -> TTTConfig | None:
    """:func:`parse_options` of what ``torch.compile`` passes to the backend."""
    return parse_options(backend_kwargs.get("options"), backend_kwargs.get("mode"))


def _check_region(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """A part of a model sees caches and positions only through a call of the whole."""
    context = region_context(module)
    if context is None or context.active or not context.enabled:
        return
    if context.had_positions and compat.in_backward():
        raise UnsupportedModelError(
            f"{type(module).__name__} is run again by the backward pass (reentrant activation "
            "checkpointing), without the positions or the mask of the call it belongs to. Compile the whole "
            'model instead of its parts: model.compile(backend="inplace_ttt")'
        )
    caches = [k for k in (OLD, NEW) if cache_in({k: kwargs.get(k)}) is not None]
    named = caches + [k for k in ("position_ids", "attention_mask") if kwargs.get(k) is not None]
    if named or kwargs.get("use_cache") is True:
        raise CacheError(
            f"{type(module).__name__} is a part of a converted model, called by itself with "
            f"{', '.join(named) or 'use_cache=True'}: the state of a sequence belongs to the whole "
            "model. Call the "
            "model that was converted, or convert this part instead"
        )


def _check_same(module: nn.Module, root: Root, config: TTTConfig | None) -> None:
    if config is not None and config not in (root.config, root.requested):
        raise AlreadyConvertedError(
            f"{type(module).__name__} is converted with {root.config}, but torch.compile was given "
            f"options for {config}. "
            "Leave options out, or ttt.revert(model) first"
        )


def _example_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
    """Models of transformers are looked at on a few tokens of their own; others on this call's inputs."""
    if hasattr(module, "config") and getattr(module, "main_input_name", None) == "input_ids":
        return None
    return args, kwargs


def _require_fast(inputs: Sequence[Any], result: PipelineResult) -> None:
    """A chosen weight may be applied by its own sites only; an MLP of no converted model is a mistake."""
    call = _current.get()
    live = {id(w) for w in call[1].weights()} if call is not None and call[1].context.enabled else set()
    given = dict(zip(result.gm.graph.find_nodes(op="placeholder"), inputs, strict=False))
    sites = {site.mlp.top_weight for site in result.state.sites}
    for node, weight in given.items():
        if not isinstance(weight, Tensor) or node in sites or not node.users:
            continue
        if id(weight) in live or must_be_fast(weight):
            raise GraphRewriteError(
                f"a fast-weight matrix of shape {tuple(weight.shape)} is applied here outside of the module "
                "that it was converted in, or in a form that is not recognised, so this call would miss what "
                "it has learned. Call the converted model (or the module that holds the weight), or type "
                "ttt.revert(model)"
            )
    # Those of a graph of ttt.rewrite stand in it already.
    fast = sites or any(is_op(n, "ttt::chunk_scan") for n in result.gm.graph.nodes)
    if fast or call is not None:
        return
    for site in result.state.report.sites:
        weight = given.get(site.top_weight)
        if site.kind != "moe" and isinstance(weight, Tensor) and not is_known_weight(weight):
            raise NotConvertedError(
                "the compiled function holds the MLP of a model that was never converted. Type "
                "ttt.convert(model, ttt.TTTConfig(...)) before compiling a function that calls it, "
                'or compile the model itself: torch.compile(model, backend="inplace_ttt")'
            )


# The converted model whose call is on its way, if any: a captured graph does not know it.
_current: contextvars.ContextVar[tuple[nn.Module, Root] | None] = contextvars.ContextVar(
    "ttt_current_call", default=None
)

compat.install_compile_hook((inplace_ttt, inplace_ttt_eager), bind, check_kwargs)
