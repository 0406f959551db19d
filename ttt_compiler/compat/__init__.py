"""Every private API of torch that the package leans on, in one place.

Each entry names the version it was checked on; ``tests/test_compat.py`` fails loudly when one moves. May
be changed here: the bodies, for a new torch. Nothing else in the package may reach into private modules.
Checked on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

from ttt_compiler.compat.cache_names import see_through_renames
from ttt_compiler.errors import TTTError, UnsupportedModelError

CHECKED_TORCH = "2.13"

CompileOne = Callable[[Callable[..., Any]], Callable[..., Any]]
_trampolines = itertools.count()
_NO_LIMIT = 1 << 30
# Bound methods that stand for calling the module.
_DOORS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
_CALLS = ("__call__", "_wrapped_call_impl")


def compiling_backend(context: Any) -> tuple[Any, Mapping[str, Any]]:
    """The user's backend callable and its keyword arguments behind a ``torch.compile`` context.

    Checked on 2.13: ``_TorchDynamoContext.callback`` leads to ``torch._TorchCompileWrapper`` by
    ``_torchdynamo_orig_backend``, which holds ``compiler_fn`` and ``kwargs``.
    """
    from torch._dynamo.eval_frame import innermost_backend

    if not callable(context.callback):
        return None, {}
    backend = innermost_backend(context.callback)
    return getattr(backend, "compiler_fn", backend), getattr(backend, "kwargs", {})


def below_autograd() -> contextlib.AbstractContextManager[object]:
    """Ops called inside are not recorded and skip their autograd kernels, whatever their inputs require.

    Checked on 2.13: ``torch._C._AutoDispatchBelowAutograd``, which ``torch.library.register_autograd`` uses.
    """
    return torch._C._AutoDispatchBelowAutograd()


def install_compile_hook(
    backends: Sequence[Callable[..., Any]],
    bind: Callable[[nn.Module, Callable[..., Any], CompileOne, Mapping[str, Any]], Callable[..., Any]],
    check: Callable[[Mapping[str, Any]], object],
) -> None:
    """Let ``bind`` stand at the door of every module compiled with one of ``backends``.

    Why: a backend is called inside of a capture, where a model can no longer be prepared, and
    ``torch.compile(model).generate()`` runs the original module uncompiled. For a module, or its bound
    forward, ``bind(module, forward, compile_one, backend_kwargs)`` returns what is called instead.
    Both the compiled wrapper and the module itself then run it. ``check(backend_kwargs)`` sees every
    use of the backend. Idempotent.

    ``generate`` compiles ``model.__call__`` of its own accord for static caches, decoding only, with another
    backend, in which fast weights cannot run. Ours wins: a call of a module that is compiled already with one
    of ``backends`` is returned as it is.

    Checked on 2.13: ``torch._dynamo.eval_frame.OptimizeContext`` inherits ``__call__(fn)`` from
    ``_TorchDynamoContext``; ``OptimizedModule.forward`` is an instance attribute; ``nn.Module.compile``
    compiles ``self._call_impl``.
    """
    from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule

    if getattr(OptimizeContext.__call__, "_ttt_hook", False):
        return
    original = OptimizeContext.__call__
    entries: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()

    def runs_ours(fn: Any) -> bool:
        module = getattr(fn, "__self__", None)
        if not isinstance(module, nn.Module) or fn.__name__ not in _CALLS:
            return False
        own = module.__dict__
        return any(own.get(name) in entries for name in ("_compiled_call_impl", "forward") if own.get(name))

    @functools.wraps(original)
    def hooked(self: Any, fn: Any) -> Any:
        compiler_fn, backend_kwargs = compiling_backend(self)
        if compiler_fn not in backends:
            return fn if runs_ours(fn) else original(self, fn)
        check(backend_kwargs)
        see_through_renames()
        if isinstance(fn, OptimizedModule):
            fn = fn._orig_mod
        module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
        if not isinstance(module, nn.Module) or (fn is not module and fn.__name__ not in _DOORS):
            return original(self, fn)
        forward = module._call_impl if isinstance(fn, nn.Module) else fn
        entry = bind(module, forward, functools.partial(original, self), backend_kwargs)
        entries.add(entry)
        if not isinstance(fn, nn.Module):
            return entry
        optimized = original(self, fn)
        optimized.forward = entry
        # So that methods of the original module (generate) reach the compiled forward too.
        module._compiled_call_impl = entry
        return optimized

    hooked._ttt_hook = True  # type: ignore[attr-defined]
    OptimizeContext.__call__ = hooked  # type: ignore[method-assign]


def user_error(error: BaseException) -> BaseException | None:
    """The package's own error inside of what Dynamo wraps around a failing backend, if that is the cause.

    Checked on 2.13: ``BackendCompilerFailed.inner_exception``.
    """
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, TTTError) else None


def own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` behind a function with a code object of its own.

    Dynamo counts recompiles per code object: all models share ``nn.Module._call_impl``, so without this the
    ninth model compiled in one process hits ``recompile_limit``.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"ttt_call_{next(_trampolines)}")
    return call


def capture(fn: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` compiled with a callable ``backend``, static shapes, without touching other compiled code.

    Behind a graph break Dynamo compiles functions that models of one class share, anew for every ``backend``:
    those must not run into ``recompile_limit``, from which on they would not be captured at all.
    """
    see_through_renames()
    compiled = torch.compile(own_code(fn), backend=backend, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT):
            return compiled(*args, **kwargs)

    return call


def fork_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A private copy of a Dynamo graph, higher-order-op bodies included, that may be rewritten.

    Dynamo reads the graph it handed out again after the backend returns, so that one must stay as it is.
    Checked on 2.13: nodes carry ``_dynamo_source``; AOTAutograd reads ``gm._param_name_to_source``.
    """
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    old_output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta = dict(old_output.meta)
    # The signature: exported graphs take their inputs as nested structures.
    graph.set_codegen(gm.graph._codegen)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    forked = fx.GraphModule(gm, graph)
    forked.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_backend_id", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(forked, name, getattr(gm, name))
    for name, child in list(forked.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(forked, name, fork_graph_module(child))
    return forked


def is_exported(graph: object) -> TypeGuard[torch.export.ExportedProgram]:
    """Whether ``graph`` is a program of ``torch.export``."""
    return isinstance(graph, torch.export.ExportedProgram)


def inline_modules(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with the bodies of the modules it calls, as ``symbolic_trace`` leaves them, in its own graph.

    Checked on 2.13: a ``Tracer`` without leaf modules; exported graphs call a ``GuardsFn`` that checks inputs
    against the shapes they were captured with, which the rewritten graph does as well by itself.
    """
    guards = [n for n in gm.graph.nodes if n.op == "call_module" and not n.users]
    if any(type(gm.get_submodule(str(n.target))).__name__ == "GuardsFn" for n in guards):
        gm = fork_graph_module(gm)
        for node in gm.graph.find_nodes(op="call_module"):
            if type(gm.get_submodule(str(node.target))).__name__ == "GuardsFn":
                gm.graph.erase_node(node)
        gm.recompile()
    called = [n.target for n in gm.graph.nodes if n.op == "call_module"]
    if all(isinstance(gm.get_submodule(str(t)), fx.GraphModule) for t in called):
        return gm

    class Inlining(fx.Tracer):
        # Else operations on buffers alone would run now, once, instead of in every call.
        proxy_buffer_attributes = True

        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return False

    try:
        return fx.GraphModule(gm, Inlining().trace(gm))
    except Exception as e:
        raise UnsupportedModelError(
            f"a module that the graph calls cannot be traced ({type(e).__name__}: {e}). Capture the model "
            "with torch.export instead"
        ) from e


def graph_inputs(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values of ``gm``'s placeholders in a call ``gm(*args, **kwargs)``.

    Checked on 2.13: exported graphs have a pytree code generator.
    """
    if isinstance(gm.graph._codegen, fx.graph._PyTreeCodeGen):
        return list(torch.utils._pytree.tree_flatten((tuple(args), dict(kwargs)))[0])
    names = [str(n.target).lstrip("*") for n in gm.graph.find_nodes(op="placeholder")]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if missing := [n for n in names if n not in given]:
        raise UnsupportedModelError(f"example_inputs lack {', '.join(missing)}")
    return [given[n] for n in names]


def propagate_shapes(gm: fx.GraphModule, values: Sequence[Any]) -> None:
    """Leave the fake tensor of one call on every node. Checked on 2.13."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*values)


def uncompiled_call(module: nn.Module) -> Callable[..., Any]:
    """``module(...)`` with its hooks, but not through ``module.compile()``. Checked on 2.13."""
    call: Callable[..., Any] = module._call_impl
    return call


def forget_compiled_call(module: nn.Module) -> None:
    """Undo ``module.compile()``. Checked on 2.13."""
    module._compiled_call_impl = None


def known_parameters() -> Any:
    """A mapping that holds tensors weakly and by identity. Checked on 2.13."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def inductor_modes() -> tuple[str, ...]:
    """Values that ``torch.compile(mode=...)`` may take."""
    from torch._inductor import list_mode_options

    return ("default", *(m for m in list_mode_options() if m != "default"))


def inductor_compile(
    gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None, uuid: str
) -> Callable[..., Any]:
    """AOTAutograd and Inductor, with ``uuid`` in the key of their on-disk caches.

    Those caches hash the graph but neither out-of-tree lowerings nor op implementations: without the tag a
    changed kernel would silently reuse the old one. Checked on 2.13: ``post_grad_custom_pre_pass`` accepts
    a ``CustomGraphPass`` and hashes its ``uuid()``.
    """
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    patches: dict[str, Any] = dict(list_mode_options(mode)) if mode not in (None, "default") else {}
    theirs = get_custom_graph_passes(config.post_grad_custom_pre_pass)
    patches["post_grad_custom_pre_pass"] = [*theirs, _cache_key_tag(uuid)]
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
    return cast("Callable[..., Any]", compiled)


def mark_static(x: torch.Tensor) -> None:
    """Tell Dynamo that ``x`` stays where it is, so that a CUDA graph may write it.

    Without a guard: it may be replaced, and then the graph is recorded again. Checked on 2.13.
    """
    torch._dynamo.mark_static_address(x, guard=False)


def inductor_cache() -> str:
    """The folder of Inductor's on-disk caches; it is made if it is not there. Checked on 2.13."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder: str = cache_dir()
    return folder


def _cache_key_tag(uuid: str) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class CacheKeyTag(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            pass

        def uuid(self) -> str:
            return uuid

    return CacheKeyTag()


@contextlib.contextmanager
def visible_mlps() -> Iterator[None]:
    """Without the fused kernel that ``nn.TransformerEncoderLayer`` is in evaluation mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    if not before:
        yield
        return
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def is_wrapper_tensor(value: object) -> bool:
    """Whether a tensor is a subclass around other tensors (a quantised weight). Checked on 2.13."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(value)


def inner_tensor(value: Any) -> str:
    """Path of attributes from a wrapper tensor to a plain tensor in it; empty for a plain one.

    Checked on 2.13: ``__tensor_flatten__`` names the inner tensors.
    """
    path = []
    while is_wrapper_tensor(value):
        path.append(value.__tensor_flatten__()[0][0])
        value = getattr(value, path[-1])
    return ".".join(path)


def held_bytes(value: Any) -> int:
    """Bytes that a tensor holds; a wrapper's are those of the tensors in it. Checked on 2.13."""
    if not is_wrapper_tensor(value):
        return int(value.nbytes)
    return sum(held_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])


def in_backward() -> bool:
    """Whether this thread is inside of a backward pass. Checked on 2.13: ``_current_graph_task_id``."""
    return bool(torch._C._current_graph_task_id() != -1)


def module_stack(node: fx.Node) -> list[tuple[int, str]]:
    """The modules whose forward a node comes from, innermost first: identity, and which call of it.

    Checked on 2.13: Dynamo keys ``nn_module_stack`` by ``id(module)`` and counts calls behind an ``@``,
    unless the module is reached under another name, which is the entry's first item. Other graphs have
    other keys.
    """
    found = []
    for key, value in reversed(list(node.meta.get("nn_module_stack", {}).items())):
        identity = str(key).partition("@")[0]
        if identity.isdecimal():
            found.append((int(identity), f"{key}:{value[0]}"))
    return found


def wrapper_of(node: fx.Node) -> fx.Node | None:
    """The graph input that is the wrapper tensor of which ``node``, a graph input too, is a part.

    Checked on 2.13: Dynamo lifts an inner tensor as an input of its own, whose ``_dynamo_source`` leads to
    the wrapper's by ``base``.
    """
    bases = set()
    source = getattr(node, "_dynamo_source", None)
    while (source := getattr(source, "base", None)) is not None:
        bases.add(source.name)
    inputs: Any = node.graph.find_nodes(op="placeholder")
    for other in inputs:
        source = getattr(other, "_dynamo_source", None)
        if source is not None and source.name in bases and is_wrapper_tensor(meta_tensor(other)):
            found: fx.Node = other
            return found
    return None


def size_hint(size: int | torch.SymInt) -> int:
    """The size that a graph was captured with, also where it may vary. Checked on 2.13: ``node.hint``."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def meta_tensor(node: fx.Node) -> Tensor | None:
    """The fake tensor that Dynamo (``example_value``) or export (``val``) left on a node."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None
