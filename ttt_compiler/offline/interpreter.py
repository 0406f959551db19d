"""Triton's interpreter under everything: kernels launched by hand, and what Inductor generates.

Set ``TRITON_INTERPRET=1`` before triton is imported, then :func:`install` once. May be changed here: what the
interpreter needs to be right; two of its faults are mended in :mod:`ttt_compiler.compat.interpreter`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ttt_compiler.errors import ConfigError


def install() -> None:
    """Make the interpreter's arithmetic that of a GPU: bf16 products and roundings, and libdevice.

    Raises:
        ConfigError: ``TRITON_INTERPRET`` was not set when triton was imported.
    """
    import triton

    if not triton.knobs.runtime.interpret or type(triton.language.cdiv).__name__ != "InterpretedFunction":
        raise ConfigError(
            "the interpreter must be chosen before triton is imported: set TRITON_INTERPRET=1 "
            f"(it is {os.environ.get('TRITON_INTERPRET')!r}) in the environment of the process"
        )
    from ttt_compiler.compat import interpreter

    interpreter.mend_bfloat16()


@contextlib.contextmanager
def inductor_on_cpu_tensors() -> Iterator[None]:
    """Inductor generates Triton for CPU tensors, and the interpreter runs it.

    Raises:
        ConfigError: see :func:`install`.
    """
    install()
    from ttt_compiler.compat import interpreter

    with interpreter.triton_on_cpu():
        yield


@contextlib.contextmanager
def gpu_step_on_cpu_tensors() -> Iterator[None]:
    """``ttt::fast_weight_step`` runs the code of GPUs on CPU tensors too.

    Raises:
        ConfigError: see :func:`install`.
    """
    install()
    from unittest import mock

    from ttt_compiler.codegen.cpu import native
    from ttt_compiler.codegen.cpu import step as cpu_step
    from ttt_compiler.codegen.gpu import step as gpu_step

    with native.unused(), mock.patch.object(cpu_step, "fast_weight_step", gpu_step.fast_weight_step):
        yield
