"""What the compat package says of triton: which repairs it needs, and that compiling is for the target named.

A repair that a release makes needless fails here, and goes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import torch
import triton
import triton.language as tl

from ttt_compiler.compat import interpreter

CHECKED_TRITON = "3.9"


@triton.jit
def product_kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(c.dtype.element_ty))


def program(source, **environment):
    """Standard output of a Python program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_checked_version():
    assert triton.__version__.startswith(CHECKED_TRITON)


def test_bfloat16_is_multiplied_and_rounded():
    interpreter.mend_bfloat16()
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, c, N=16)
    assert torch.equal(c, (a.float() @ b.float()).bfloat16())


def test_without_the_repair_it_is_not():
    """When this fails, ``mend_bfloat16`` has become needless."""
    source = """
        import torch, triton, triton.language as tl, tempfile, importlib.util, pathlib
        text = '''
        import triton, triton.language as tl
        @triton.jit
        def k(a, b, c, N: tl.constexpr):
            i = tl.arange(0, N)
            at = i[:, None] * N + i[None, :]
            tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))
        '''
        import textwrap
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, 'kernel.py')
            path.write_text(textwrap.dedent(text))
            spec = importlib.util.spec_from_file_location('kernel', path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            a = torch.full((16, 16), 0.5).bfloat16()
            c = torch.empty(16, 16)
            module.k[(1,)](a, a, c, N=16)
        print(bool(torch.allclose(c, torch.full((16, 16), 4.0))))
    """
    assert program(source, TRITON_INTERPRET="1").split() == ["False"]


def test_launches_compile_for_the_target_of_their_block():
    """One process, two targets: what was compiled for the first is not handed out for the second."""
    source = """
        import json, torch
        from ttt_compiler.codegen.kernels.append_tail import append_tail
        from ttt_compiler.compat import assembler, launches
        x, ring = torch.randn(2, 3, 64), torch.zeros(2, 8, 64)
        token, entry = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)
        found = []
        for target in (("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64), ("cuda", 80, 32)):
            with launches.compiling_launches(*target) as compiled:
                append_tail(x, ring, token, entry)
            [(name, code)] = compiled
            numbers = assembler.resources(code)
            found.append([name, code.metadata.target.arch, numbers["registers"] > 0, numbers["spilled"]])
        print(json.dumps(found))
    """
    found = json.loads(program(source, TRITON_INTERPRET="0"))
    assert found == [["append_tail_kernel", arch, True, 0] for arch in (80, 90, "gfx942", 80)]


def test_the_assembler_reports_what_a_kernel_takes():
    """Shared memory for both operands of a product, matrix units counted, none for fp32."""
    source = """
        import json
        from ttt_compiler.codegen.kernels.base_apply import base_apply_kernel as kernel
        from ttt_compiler.compat import assembler
        found = {}
        for dtype in ("bf16", "fp32"):
            types = dict.fromkeys(("h", "base"), f"*{dtype}") | {"need": "*i32", "partial": "*fp32"}
            compiled = assembler.compile_kernel(
                kernel,
                {p.name: types.get(p.name, "i32") for p in kernel.params},
                {"BM": 16, "BO": 32, "BI": 32, "PRECISION": "ieee", "stride_bi": 1},
                [p.name for p in kernel.params],
                "cuda", 80, 32, {"num_warps": 4, "num_stages": 3},
            )
            used = assembler.instructions(compiled, ["mma.sync"])
            found[dtype] = [assembler.resources(compiled)["shared"], used["mma.sync"]]
        print(json.dumps(found))
    """
    found = json.loads(program(source, TRITON_INTERPRET="0"))
    # (16 + 32) x 32 numbers for each stage but the one at work.
    assert found["bf16"][0] == 2 * 48 * 32 * 2
    assert found["bf16"][1] > 0
    assert found["fp32"][0] >= 2 * 48 * 32 * 4
    assert found["fp32"][1] == 0
