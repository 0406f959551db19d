"""Machine code for GPUs that are not there: every shipped kernel, and every kernel of a converted Llama.

Compiling needs processes that are not interpreted; they are the modules' own command lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_compiler.codegen.kernels.tiles import SHIPPED
from ttt_compiler.offline.cross_compile import DTYPES, USES, Compiled, page
from ttt_compiler.offline.targets import TARGETS, target

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def run(module, *args):
    """Output and errors of a program of the package."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"ttt_compiler.offline.{module}", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [t.name for t in TARGETS])
def test_every_kernel_compiles(name):
    """No spills, shared memory within the limit, matrix units in use: the program fails otherwise."""
    done = run("cross_compile", "--target", name, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [Compiled(**row) for row in json.loads(done.stdout)]
    scans = [r for r in rows if r.kernel == "chunk_scan"]
    for dtype, size in DTYPES.items():
        for use, (role, _) in USES.items():
            found = {r.tile for r in scans if (r.dtype, r.use) == (dtype, use)}
            assert found == {f"{t.tokens}x{t.outer}x{t.inner}" for t in SHIPPED[name][size][role]}
    # The page is written by the same program; figures may move with the compiler, what is listed may not.
    listed = [line.split(" | ")[:7] for line in PAGE.read_text().splitlines() if f"| {name} |" in line]
    assert listed == [line.split(" | ")[:7] for line in page(rows).splitlines() if f"| {name} |" in line]


def test_gates_are_gates():
    row = Compiled("k", "forward", "sm_90", "bf16", "1x1x1", 4, 1, 255, 8, 300_000, 232_448, 0)
    assert len(row.faults) == 3
    assert not Compiled("k", "forward", "sm_90", "fp32", "1x1x1", 4, 1, 99, 0, 0, 232_448, 0).faults
    assert target("sm_80").capability == (8, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "gradients"),
    # Where library products are predicted to be faster, gradients have no kernel of ours.
    [("sm_90", "bfloat16", 3), ("sm_80", "float16", 3), ("sm_100", "float32", 0)],
)
def test_a_training_step_of_llama_compiles(name, dtype, gradients):
    done = run("whole_graphs", "--target", name, "--dtype", dtype)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    ours = [k for k in kernels if k["ours"]]
    # Layers share their kernels: one of the forward pass, three of the backward pass.
    assert [k["graph"] for k in ours] == ["forward"] + ["backward"] * gradients
    assert not any(k["spilled"] for k in ours)
    assert len(kernels) > 20
    for graph, least in (("forward", 2), ("backward", 2)):
        assert sum("chunk_conv" in k["name"] for k in kernels if k["graph"] == graph) >= least
    if dtype != "float32":
        assert all(k["matrix"] for k in ours)


def test_interpreted_processes_are_told():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    code = (
        "import triton, os; os.environ['TRITON_INTERPRET'] = '0'; "
        "from ttt_compiler.offline import interpreter; interpreter.install()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "must be chosen before triton is imported" in done.stderr
