"""Schemas, fakes and autograd formulas of the fast-weight ops (namespace ``ttt``).

- ``ttt::site``: the marker that conversion emits in front of a module that applies a chosen weight. It
  only exists to carry parameters, positions and state into the captured graph, and names the weight by
  being given it; the rewrite pass removes it. Running it means that the model is not compiled with our
  backend, so its kernel raises. It returns its first argument.
- ``ttt::chunk_conv``, ``ttt::chunk_values``, ``ttt::limit_writes``, ``ttt::chunk_scan`` (+ their backward
  ops): the stateless, differentiable form. ``chunk_values`` is convolution and projection on CPU; on GPUs the
  projection is an ordinary matmul behind ``chunk_conv``.
- ``ttt::chunk_scan_keeping``: chunk_scan where autograd records it on CPU; its second output is W of some
  chunks, for the backward.
- ``ttt::chunk_table``, ``ttt::chunk_places``: chunks of a batch for kernels that must not wait for the host.
- ``ttt::fast_weight_step``: the stateful form; mutates the running sequence's tensors. On CPU an operator in
  C++ comes before the kernel that is registered here (:mod:`.cpu.native.op`), which calls
  ``ttt::fast_weight_rest`` for what it leaves.

May be changed here: schemas, together with the rewrite pass. Importing this registers the ops; it imports
no kernel toolchain.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ttt_compiler.codegen import gradients
from ttt_compiler.codegen.cpu import controls as cpu_controls
from ttt_compiler.codegen.cpu import conv as cpu_conv
from ttt_compiler.codegen.cpu import kept as cpu_kept
from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu import scan as cpu_scan
from ttt_compiler.codegen.cpu import step as cpu_step
from ttt_compiler.codegen.cpu import target_values as cpu_values
from ttt_compiler.codegen.cpu.native import op as native_op
from ttt_compiler.codegen.gpu.library import chunk_scan_backward_library
from ttt_compiler.codegen.kernels.chunk_table import (
    chunk_places,
    chunk_table,
    require_whole_documents,
    skip_nonfinite,
)
from ttt_compiler.codegen.kernels.tiles import architecture
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.errors import NotCompiledError, UnsupportedDeviceError
from ttt_compiler.spec import SiteSpec, state_dtype

_lib = torch.library.Library("ttt", "DEF")

_lib.define(
    "site(Tensor x, Tensor weight, str spec, Tensor conv, Tensor? proj, Tensor? tokens, Tensor? pos, "
    "Tensor? w, Tensor? tail_h, Tensor? tail_t, Tensor? tail_v, Tensor? lanes, Tensor? rows, Tensor? norms, "
    "Tensor? batch) -> Tensor"
)
_lib.define("chunk_table(Tensor pos, int chunk) -> Tensor")
_lib.define("skip_nonfinite(Tensor? table, Tensor v, Tensor h, int chunk) -> Tensor")
_lib.define("chunk_places(Tensor pos, int chunk) -> Tensor")
_lib.define("chunk_conv(Tensor t, Tensor conv, Tensor? pos, int chunk) -> Tensor")
_lib.define("chunk_conv_dweight(Tensor dv, Tensor t, Tensor? pos, int chunk, int kernel) -> Tensor")
_lib.define("chunk_values(Tensor t, Tensor conv, Tensor proj, Tensor? pos, int chunk) -> Tensor")
_lib.define(
    "chunk_values_backward(Tensor dv, Tensor t, Tensor conv, Tensor proj, Tensor? pos, int chunk, "
    "bool[3] needed) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "limit_writes(Tensor v, Tensor h, Tensor? limit, Tensor? pos, int chunk, bool unit_keys) -> Tensor"
)
_lib.define(
    "limit_writes_backward(Tensor grad, Tensor v, Tensor h, Tensor? limit, Tensor? pos, int chunk, "
    "bool unit_keys) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "chunk_scan(Tensor h, Tensor v, Tensor w0, Tensor? bias, Tensor? pos, int chunk, float decay=1.0, "
    "str on_nonfinite='raise') -> Tensor"
)
_lib.define(
    "chunk_scan_keeping(Tensor h, Tensor v, Tensor w0, Tensor? bias, Tensor? pos, int chunk, "
    "float decay=1.0, str on_nonfinite='raise') -> (Tensor, Tensor)"
)
_lib.define(
    "chunk_scan_backward(Tensor dy, Tensor h, Tensor v, Tensor w0, Tensor? pos, int chunk, float decay=1.0, "
    "str on_nonfinite='raise', Tensor? kept=None) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "chunk_scan_backward_library(Tensor dy, Tensor h, Tensor v, Tensor w0, int chunk, float decay) "
    "-> (Tensor, Tensor, Tensor)"
)
_STEP = (
    "(Tensor h, Tensor t, Tensor w0, Tensor? bias, Tensor conv, Tensor? proj, Tensor? pos, "
    "str spec, Tensor(a!) w, Tensor(b!) tail_h, Tensor(c!) tail_t, Tensor(d!) tail_v, Tensor(e!) lanes, "
    "Tensor(f!) rows, Tensor(g!) norms, Tensor batch"
)
_lib.define(f"fast_weight_step{_STEP}) -> Tensor")
_lib.define(f"fast_weight_rest{_STEP}, Tensor(h!)? y, Tensor? done, bool base_done) -> Tensor")
_lib.define("step_constants(Tensor rows, str spec) -> Tensor")


def _on_gpu(module: str, name: str) -> Callable[..., Any]:
    """A function of ``codegen/gpu`` that is imported when it is first called: it needs triton."""

    def call(*args: Any) -> Any:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(args[0]):
            return getattr(importlib.import_module(f"ttt_compiler.codegen.gpu.{module}"), name)(*args)

    return call


_step_on_gpu = _on_gpu("step", "fast_weight_step")


def _site(x: Tensor, weight: Tensor, spec: str, *_: object) -> Tensor:
    raise NotCompiledError(
        f"{SiteSpec.decode(spec).key} is a fast-weight layer, but this call does not run through "
        'backend="inplace_ttt". Type model.compile(backend="inplace_ttt") once, then call the model (or '
        "model.generate) as usual. To run the base model on purpose: with ttt.disabled(model): ... ; to undo "
        "the conversion: ttt.revert(model)"
    )


def _fast_weight_step(h: Tensor, *args: Any) -> Any:
    """On a GPU; and on CPU until the operator in C++ is there, or where it cannot be built."""
    if not h.is_cpu:
        require_kernels(h.device, "a running sequence")
        return _step_on_gpu(h, *args[:6], _decoded(args[6]), StateTensors(*args[7:14]), args[14])
    strange = [
        x for x in (h, *args) if isinstance(x, Tensor) and not (x.is_cpu and x.layout == torch.strided)
    ]
    if strange:
        raise UnsupportedDeviceError(
            f"a running sequence: some tensors are on {h.device}, one is {strange[0].layout} on "
            f"{strange[0].device}. Move the model to one device, and begin or load its session there"
        )
    if native.is_used():
        if h.shape[1] == 1 and native_op.load():
            return torch.ops.ttt.fast_weight_step(h, *args)
        native_op.start()
    whole: list[Any] = [h, *args, None, None, False]
    return _fast_weight_rest(*whole)


def _fast_weight_rest(
    h: Tensor,
    t: Tensor,
    w0: Tensor,
    bias: Any,
    conv: Tensor,
    proj: Any,
    pos: Any,
    spec: str,
    w: Tensor,
    tail_h: Tensor,
    tail_t: Tensor,
    tail_v: Tensor,
    lanes: Tensor,
    rows: Tensor,
    norms: Tensor,
    batch: Tensor,
    y: Any,
    done: Any,
    base_done: bool,
) -> Tensor:
    state = StateTensors(w, tail_h, tail_t, tail_v, lanes, rows, norms)
    call = (h, t, w0, bias, conv, proj, pos, _decoded(spec), state, batch)
    if y is None:
        return cpu_step.fast_weight_step(*call)
    return cpu_step.finish_step(*call, cpu_step.Step(y, done.tolist(), base_done))


def _scan_keeping(h: Tensor, v: Tensor, w0: Tensor, bias: Any, pos: Any, chunk: int, *rest: Any) -> Any:
    kept = cpu_kept.room(h, w0, chunk)
    return cpu_scan.chunk_scan(h, v, w0, bias, pos, chunk, *rest, kept=kept), kept


def _step_constants(rows: Tensor, spec: str) -> Tensor:
    return native_op.step_constants(_decoded(spec))


def _chunk_table(pos: Tensor, chunk: int) -> Tensor:
    require_whole_documents(pos)
    return chunk_table(pos, chunk)


_decoded = functools.lru_cache(maxsize=4096)(SiteSpec.decode)


_lib.impl("site", _site, "CompositeExplicitAutograd")
_lib.impl("chunk_table", _chunk_table, "CompositeExplicitAutograd")
_lib.impl("skip_nonfinite", skip_nonfinite, "CompositeExplicitAutograd")
_lib.impl("chunk_places", chunk_places, "CompositeExplicitAutograd")
_lib.impl("chunk_scan_backward_library", chunk_scan_backward_library, "CompositeExplicitAutograd")
_lib.impl("chunk_conv", cpu_conv.chunk_conv, "CPU")
_lib.impl("chunk_conv_dweight", cpu_conv.chunk_conv_dweight, "CPU")
_lib.impl("chunk_values", cpu_values.chunk_values, "CPU")
_lib.impl("chunk_values_backward", cpu_values.chunk_values_backward, "CPU")
_lib.impl("limit_writes", cpu_controls.limit_writes, "CPU")
_lib.impl("limit_writes_backward", cpu_controls.limit_writes_backward, "CPU")
_lib.impl("chunk_scan", cpu_scan.chunk_scan, "CPU")
_lib.impl("chunk_scan_keeping", _scan_keeping, "CPU")
_lib.impl("chunk_scan_backward", cpu_scan.chunk_scan_backward, "CPU")
# Behind a kernel for CPU, which it loads.
_lib.impl("fast_weight_step", _fast_weight_step, "CompositeExplicitAutograd")
_lib.impl("fast_weight_rest", _fast_weight_rest, "CPU")
_lib.impl("step_constants", _step_constants, "CPU")
for _module, _name in (
    ("conv", "chunk_conv"),
    ("conv", "chunk_conv_dweight"),
    ("controls", "limit_writes"),
    ("controls", "limit_writes_backward"),
    ("scan", "chunk_scan"),
    ("scan", "chunk_scan_backward"),
):
    _lib.impl(_name, _on_gpu(_module, _name), "CUDA")


def require_kernels(device: torch.device, where: str) -> None:
    """Raise unless fast-weight kernels exist for ``device``.

    Raises:
        UnsupportedDeviceError: naming ``where`` and what to do.
    """
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise UnsupportedDeviceError(
            f"{where} is on {device}: fast-weight kernels exist for CPU and CUDA. Type model.to('cpu')"
        )
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedDeviceError(
            f"{where} is on {device}, whose kernels need triton: pip install triton, or model.to('cpu')"
        )
    architecture(device)


@torch.library.register_fake("ttt::site", lib=_lib)
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("ttt::chunk_scan_backward_library", lib=_lib)
def _(
    dy: Tensor, h: Tensor, v: Tensor, w0: Tensor, chunk: int, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(v), w0.new_empty(w0.shape)


@torch.library.register_fake("ttt::chunk_table", lib=_lib)
def _(pos: Tensor, chunk: int) -> Tensor:
    return pos.new_empty(pos.shape[0], 2, pos.shape[1] + 2, dtype=torch.int32)


@torch.library.register_fake("ttt::skip_nonfinite", lib=_lib)
def _(table: Tensor | None, v: Tensor, h: Tensor, chunk: int) -> Tensor:
    return v.new_empty(v.shape[0], 2, v.shape[1] + 2, dtype=torch.int32)


@torch.library.register_fake("ttt::chunk_places", lib=_lib)
def _(pos: Tensor, chunk: int) -> Tensor:
    return pos.new_empty(pos.shape[0], pos.shape[1], 2, dtype=torch.int32)


@torch.library.register_fake("ttt::chunk_conv", lib=_lib)
def _(t: Tensor, conv: Tensor, pos: Tensor | None, chunk: int) -> Tensor:
    torch._check(conv.shape[0] == t.shape[-1], lambda: "conv must have one row of taps per channel of t")
    return torch.empty_like(t, memory_format=torch.contiguous_format)


@torch.library.register_fake("ttt::chunk_conv_dweight", lib=_lib)
def _(dv: Tensor, t: Tensor, pos: Tensor | None, chunk: int, kernel: int) -> Tensor:
    return t.new_empty(t.shape[-1], 1, kernel)


@torch.library.register_fake("ttt::chunk_values", lib=_lib)
def _(t: Tensor, conv: Tensor, proj: Tensor, pos: Tensor | None, chunk: int) -> Tensor:
    torch._check(conv.shape[0] == t.shape[-1], lambda: "conv must have one row of taps per channel of t")
    torch._check(t.shape[-1] == proj.shape[0], lambda: "t and proj disagree on the width of a target")
    return t.new_empty(*t.shape[:-1], proj.shape[1])


@torch.library.register_fake("ttt::chunk_values_backward", lib=_lib)
def _(
    dv: Tensor, t: Tensor, conv: Tensor, proj: Tensor, pos: Tensor | None, chunk: int, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [x.shape if need else (0,) for x, need in zip((t, conv, proj), needed, strict=True)]
    return t.new_empty(shapes[0]), conv.new_empty(shapes[1]), proj.new_empty(shapes[2])


@torch.library.register_fake("ttt::limit_writes", lib=_lib)
def _(v: Tensor, h: Tensor, *_: object) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.register_fake("ttt::limit_writes_backward", lib=_lib)
def _(grad: Tensor, v: Tensor, h: Tensor, limit: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(v, memory_format=contiguous),
        torch.empty_like(h, memory_format=contiguous),
        v.new_empty((), dtype=state_dtype(v.dtype) if limit is None else limit.dtype),
    )


@torch.library.register_fake("ttt::chunk_scan", lib=_lib)
def _(h: Tensor, v: Tensor, w0: Tensor, *_: object) -> Tensor:
    torch._check(h.shape[-1] == w0.shape[1], lambda: "h and w0 disagree on F")
    torch._check(v.shape[-1] == w0.shape[0], lambda: "v and w0 disagree on D")
    return h.new_empty(h.shape[0], h.shape[1], w0.shape[0])


@torch.library.register_fake("ttt::chunk_scan_keeping", lib=_lib)
def _(h: Tensor, v: Tensor, w0: Tensor, bias: Any, pos: Any, chunk: int, *_: object) -> tuple[Tensor, Tensor]:
    y = h.new_empty(h.shape[0], h.shape[1], w0.shape[0])
    return y, h.new_empty(cpu_kept.shape(h, w0, chunk), dtype=state_dtype(h.dtype))


@torch.library.register_fake("ttt::chunk_scan_backward", lib=_lib)
def _(dy: Tensor, h: Tensor, v: Tensor, w0: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(h, memory_format=contiguous),
        torch.empty_like(v, memory_format=contiguous),
        w0.new_empty(w0.shape),
    )


@torch.library.register_fake("ttt::fast_weight_step", lib=_lib)
def _(h: Tensor, t: Tensor, w0: Tensor, *_: object) -> Tensor:
    torch._check(h.shape[-1] == w0.shape[1], lambda: "h and w0 disagree on F")
    return h.new_empty(h.shape[0], h.shape[1], w0.shape[0])


for _name, (_backward, _setup) in gradients.FORMULAS.items():
    torch.library.register_autograd(f"ttt::{_name}", _backward, setup_context=_setup, lib=_lib)
_lib.impl("chunk_scan", gradients.chunk_scan, "Autograd")
