"""Inductor's code generation for CUDA on a machine without CUDA. Checked on torch 2.13, triton 3.9.

May be changed here: what Inductor asks of a device while it generates code. Nothing here is run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx

from ttt_compiler.compat.driver import stub_driver
from ttt_compiler.compat.processor import cpp_compiler


@functools.cache
def install_guard() -> None:
    """Let tensors of a CUDA device that is not there pass through autograd and copies.

    torch without CUDA has no device guard for it, and refuses or aborts. Checked on 2.13: c10 has a guard
    that does nothing, and a C++ call that registers it.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    if torch.version.cuda is not None:
        return
    compiler = cpp_compiler()
    if compiler is None:
        raise RuntimeError("generating code for a device that is not there needs a C++ compiler (CXX)")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", str(source)]
        subprocess.run([*command, "-o", str(library), f"-L{root / 'lib'}", "-lc10"], check=True)
        torch.ops.load_library(str(library))


_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
}
"""


@contextlib.contextmanager
def fake_cuda(arch: int, name: str, processors: int, shared_memory: int, l2: int) -> Iterator[None]:
    """Inductor and triton believe that one CUDA device is there.

    ``torch.cuda.is_available`` stays what it is: Dynamo would ask for the state of a generator.
    """
    install_guard()
    from torch._dynamo import device_interface
    from torch._inductor import utils
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    capability = divmod(arch, 10)
    properties = types.SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=processors,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=shared_memory,
        shared_memory_per_multiprocessor=shared_memory + 1024,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 << 30,
        L2_cache_size=l2,
        gcnArchName="",
        is_integrated=0,
    )
    memoised = (utils.get_max_num_sms, utils.is_big_gpu, _triton.has_triton, DeviceProperties.create)
    lazy_init = joint_graph.lazy_init

    def of_cuda(owner: Any, **values: Any) -> Iterator[Any]:
        for key, value in values.items():
            yield mock.patch.object(owner, key, value)

    def forget() -> None:
        for f in memoised:
            getattr(f, "cache_clear", lambda: None)()

    def given(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    interface = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:
        stack.enter_context(stub_driver("cuda", arch, 32))
        forget()
        stack.callback(forget)
        for patch in of_cuda(
            torch.cuda,
            get_device_properties=given(properties),
            get_device_capability=given(capability),
            get_device_name=given(name),
            current_device=given(0),
            device_count=given(1),
            is_tf32_supported=given(True),
            is_bf16_supported=given(True),
            synchronize=given(None),
            _lazy_init=given(None),
        ):
            stack.enter_context(patch)
        for patch in of_cuda(
            interface,
            is_available=staticmethod(given(True)),
            get_device_properties=staticmethod(given(properties)),
            current_device=staticmethod(given(0)),
            device_count=staticmethod(given(1)),
            get_raw_stream=staticmethod(given(0)),
            synchronize=staticmethod(given(None)),
            is_bf16_supported=staticmethod(given(True)),
        ):
            stack.enter_context(patch)
        for patch in of_cuda(
            interface.Worker,
            get_device_properties=staticmethod(given(properties)),
            current_device=staticmethod(given(0)),
        ):
            stack.enter_context(patch)
        # Its patterns are traced on tensors of the device.
        on_cpu = functools.partial(lazy_init, torch.device("cpu"))
        stack.enter_context(mock.patch.object(joint_graph, "lazy_init", lambda *_: on_cpu()))  # noqa: PT008
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", given(None)))
        workers = device_interface.caching_worker_device_properties
        stack.enter_context(mock.patch.dict(workers, {"cuda": [properties]}))
        yield


def generating(sink: list[tuple[str, str]]) -> Callable[..., Any]:
    """An ``inner_compile`` that generates code for a fake CUDA device, and runs the graph as it is.

    It is called with the graphs that AOTAutograd made of a model on CPU. ``sink`` receives ``"forward"`` or
    ``"backward"`` and the generated module of each.
    """
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    device = torch.device("cuda", 0)

    def moved(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        eager = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        there = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        for node in there.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
        mode: Any = V.fake_mode
        with mode, torch.no_grad():
            inputs = [moved(x) for x in example_inputs]
            FakeTensorProp(there, mode).propagate_dont_convert_inputs(*inputs)
        found: list[str] = []

        def generate(self: Any) -> Any:
            wrapper, _ = self.codegen()
            found.append(wrapper.value)

            class NotRun:
                def call(self, *_: Any) -> Any:
                    raise RuntimeError("this code was generated for a device that is not there")

            return NotRun()

        with mock.patch.object(GraphLowering, "compile_to_module", generate), torch.no_grad():
            try:
                compile_fx_inner(there, inputs, **kwargs)
            except Exception:
                # What follows code generation wants the device; the code is there, or this is an error.
                if not found:
                    raise
        sink.append(("backward" if kwargs.get("is_backward") else "forward", found[0]))

        def run(args: list[Any]) -> list[Any]:
            return list(eager(*args))

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return inner


def generated_kernels(code: str) -> dict[str, str]:
    """Name and source of every Triton kernel in a generated module."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", code, re.S))


def compile_generated(name: str, source: str) -> Any:
    """Machine code of a generated kernel, for the architecture that its own metadata name."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(PyCodeCache.load(source), name)
    config = kernel.configs[0]
    meta = kernel._create_compile_meta(config)
    options = kernel._create_compile_options(config, meta)
    warp = kernel.device_props.warp_size_or_default
    return triton.compile(
        ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0]),
        target=GPUTarget(meta["device_type"], meta["cc"], warp),
        options=options,
    )
