"""What a converted model must compute, eagerly, without any of the passes: the reference at every site.

The model runs as plain torch. Whenever an operation applies a chosen weight, its result is replaced by
``codegen/reference.py``; the target source is the input of the up-projection that ran last before it. That
is a rule of execution order and widths, independent of the matcher's dataflow. May be changed here: which
operations apply a weight. Slow, and only right for models whose MLP runs its projections one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ttt_compiler.codegen import reference
from ttt_compiler.compat import uncompiled_call
from ttt_compiler.conversion import disabled
from ttt_compiler.runtime.root import Root, require_root
from ttt_compiler.runtime.site import weight_of
from ttt_compiler.spec import SiteSpec

_LINEAR = ("linear",)
_MATMUL = ("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")


def oracle_call(
    model: nn.Module, *args: Any, pos: Tensor | None = None, kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Call the converted ``model``, stateless, with the reference in the place of every site.

    Args:
        model: a converted model; it need not be compiled, and is not changed.
        args: arguments of the call.
        pos: positions ``[B or 1, T]`` for the document rule; None is one document per row.
        kwargs: keyword arguments of the call.
    """
    model, root = require_root(model)
    kwargs = dict(kwargs or {})
    sequences = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 1)
    rows, tokens = next(sequences).shape[:2]
    with disabled(model), _Embeddings(model) as embeddings, _Oracle(root, embeddings, pos, rows, tokens):
        return uncompiled_call(model)(*args, **kwargs)


class _Embeddings:
    """Keeps what the token embedding returned last, for ``target="input_embed"``."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.last: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> _Embeddings:
        if hasattr(self._model, "get_input_embeddings"):
            module: nn.Module = self._model.get_input_embeddings()  # type: ignore[operator]
            self._handle = module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.last = out


class _Oracle(TorchFunctionMode):
    """Intercepts the operations that apply a weight."""

    def __init__(
        self, root: Root, embeddings: _Embeddings, pos: Tensor | None, rows: int, tokens: int
    ) -> None:
        super().__init__()
        self._root, self._embeddings, self._pos = root, embeddings, pos
        self._rows, self._tokens = rows, tokens
        self._sites: dict[int, list[SiteSpec]] = {}
        for spec in root.specs:
            weight = weight_of(root.modules[spec.key], spec)
            self._sites.setdefault(_storage(weight), []).append(spec)
        # (input, its width, output's width) of projections in the order they ran.
        self._projections: list[tuple[Tensor, int, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        applied = _applied(getattr(func, "__name__", ""), args, kwargs)
        if applied is None or not isinstance(out, Tensor):
            return out
        h, weight, bias = applied
        places = self._sites.get(_storage(weight))
        if places:
            return self._fast(places.pop(0), h, weight, bias, out)
        self._projections.append((h, h.shape[-1], out.shape[-1]))
        return out

    def _fast(self, spec: SiteSpec, h: Tensor, w0: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        conv, proj = self._root.parameters(spec)
        t = self._embeddings.last if spec.target == "input_embed" else self._input_of_up(spec)
        assert t is not None
        h, t = (_sequence(x, self._rows, self._tokens, spec.time_major) for x in (h, t))
        y = reference.batched(h, t, w0, conv, proj, spec.lr, spec.chunk, self._pos, bias, spec.rule)
        return (y.transpose(0, 1) if spec.time_major else y).reshape(out.shape)

    def _input_of_up(self, spec: SiteSpec) -> Tensor:
        for x, width, out in reversed(self._projections):
            if width == spec.d_model and out >= spec.d_ff:
                return x
        raise LookupError(f"{spec.key}: no up-projection ran before it")


def _applied(name: str, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(data, weight ``[out, in]``, bias) of an operation that may apply a weight, None for any other."""
    named = [kwargs.get(k) for k in ("input", "weight", "bias")]
    if name in _LINEAR:
        values = [*args, *named[len(args) :]]
        return values[0], values[1], values[2]
    if name == "addmm":
        return args[1], args[2].t(), args[0]
    if name in _MATMUL and len(args) == 2 and all(isinstance(a, Tensor) and a.dim() > 1 for a in args):
        return args[0], args[1].transpose(-1, -2), None
    if name == "einsum" and len(args) == 3 and args[2].dim() == 2:
        return args[1], args[2].t(), None
    return None


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _sequence(x: Tensor, rows: int, tokens: int, time_major: bool) -> Tensor:
    if time_major:
        return x.reshape(tokens, rows, x.shape[-1]).transpose(0, 1)
    return x.reshape(rows, tokens, x.shape[-1])
