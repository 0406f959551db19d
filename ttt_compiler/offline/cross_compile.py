"""Every tile of the scan kernel, compiled for every architecture; run it as a program.

    python -m ttt_compiler.offline.cross_compile --write docs/kernels.md

It must not be interpreted: a process with ``TRITON_INTERPRET=1`` has no compiler. What it proves: the kernels
compile, nothing is spilled, shared memory is within the limit, the matrix units are used. What it does not:
speed, races. May be changed here: what is compiled, and the gates.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ttt_compiler.codegen.kernels.decode_plan import MOST_ROWS
from ttt_compiler.codegen.kernels.tiles import DECAY, GRADIENT, RUNNING, SCAN, SHIPPED
from ttt_compiler.compat import assembler, launches
from ttt_compiler.offline.targets import TARGETS, Target
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, WriteRule

# Names of operand types as torch and triton spell them, and what tf32 is to fp32.
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
_BACK = {"REVERSE": True, "HAS_BASE": False, "WRITE_ALL": True}
_RUN = {"HAS_TABLE": True, "HAS_INIT": True, "HAS_FINAL": True, "HAS_SLOTS": True}
# The ways in which the scan is used, and the tiles that each may have.
USES: dict[str, tuple[str, dict[str, Any]]] = {
    "forward": (SCAN, {}),
    "documents": (SCAN, {"HAS_TABLE": True}),
    "decay": (DECAY, {"HAS_TABLE": True, "DECAY": 0.99}),
    "decay, gradient by W": (DECAY, {"SHARED": False, "HAS_TABLE": True, "DECAY": 0.99}),
    "decay, gradient by S": (DECAY, {"SHARED": False, "HAS_TABLE": True, "DECAY": 0.99, **_BACK}),
    "gradient by W": (GRADIENT, {"SHARED": False}),
    "gradient by S": (GRADIENT, {"SHARED": False, **_BACK}),
    "gradient of v": (GRADIENT, {"HAS_TABLE": True, **_BACK}),
    "gradient of v and W0": (GRADIENT, {"HAS_FINAL": True, **_BACK}),
    "running": (RUNNING, _RUN),
    "running, decay": (DECAY, {"DECAY": 0.99, **_RUN}),
}


# Bytes that a kernel without a tile may spill: for those the assembler takes few registers, so that many run
# at a time, and puts a scalar or two aside once.
SCALARS = 32
# Running sequences that between them launch every kernel in every form: rule, R, whether rows may be forks.
SEQUENCES = (
    (WriteRule(), 0, False),
    (WriteRule(keys="unit", max_norm=1.0, decay=0.99), 32, True),
)
# Rows and tokens of a call. One token of many rows, as many as it can have, is a matrix product.
CALLS = ((4, 1), (MOST_ROWS, 1), (4, 100))


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one architecture.

    Attributes:
        kernel: its name.
        use: key of ``USES``.
        target: name of the architecture.
        dtype: of the operands.
        tile: tokens x rows of W x columns of W; ``"-"`` for kernels that hold none for long.
        warps: of a block.
        stages: of the pipeline.
        registers: of a thread.
        spilled: bytes.
        shared: bytes of shared memory of a block.
        limit: most bytes of shared memory.
        matrix: instructions of matrix units in the code.
    """

    kernel: str
    use: str
    target: str
    dtype: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    limit: int
    matrix: int

    @property
    def faults(self) -> list[str]:
        """Gates that it does not pass."""
        found = []
        if self.spilled > (SCALARS if self.tile == "-" else 0):
            found.append(f"{self.spilled} bytes are spilled")
        if self.shared > self.limit:
            found.append(f"{self.shared} bytes of shared memory, of {self.limit}")
        if self.dtype != "fp32" and self.tile != "-" and not self.matrix:
            found.append("no matrix unit is used")
        return found


def scan_kernels(target: Target) -> Iterator[Compiled]:
    """The scan: every shipped tile, type and use."""
    from ttt_compiler.codegen.kernels.chunk_scan import chunk_scan_kernel

    for dtype, size in DTYPES.items():
        for use, (role, flags) in USES.items():
            for tile in SHIPPED[target.name][size][role]:
                constants: dict[str, Any] = {
                    "CHUNK": 512,
                    "DECAY": 1.0,
                    "REVERSE": False,
                    "SHARED": True,
                    "HAS_BASE": True,
                    "HAS_TABLE": False,
                    "HAS_INIT": False,
                    "HAS_FINAL": False,
                    "HAS_SLOTS": False,
                    "WRITE_ALL": False,
                    "GROUPS": 2,
                    "ACCUMULATES": True,
                    "BM": tile.tokens,
                    "BO": tile.outer,
                    "BI": tile.inner,
                    "PRECISION": "ieee",
                    "stride_bi": 1,
                    **flags,
                }
                present = {
                    "k": not constants["SHARED"],
                    "base": constants["HAS_BASE"],
                    "table": constants["HAS_TABLE"],
                    "init": constants["HAS_INIT"],
                    "init_slot": constants["HAS_INIT"],
                    "final": constants["HAS_FINAL"],
                    "final_slot": constants["HAS_FINAL"] and constants["HAS_SLOTS"],
                }
                constants |= {name: None for name, there in present.items() if not there}
                pointers = dict.fromkeys(("q", "k", "v", "base"), f"*{dtype}")
                pointers |= dict.fromkeys(("init", "final", "partial"), "*fp32")
                pointers |= dict.fromkeys(("table", "init_slot", "final_slot"), "*i32")
                names = [p.name for p in chunk_scan_kernel.params]
                compiled = assembler.compile_kernel(
                    chunk_scan_kernel,
                    {n: pointers.get(n, "i32") for n in names},
                    constants,
                    [n for n in names if n not in ("B", "T", "stride_tb", "stride_tk")],
                    target.backend,
                    target.arch,
                    target.warp,
                    {"num_warps": tile.warps, "num_stages": tile.stages},
                )
                used = assembler.instructions(compiled, target.matrix_units)
                yield Compiled(
                    kernel="chunk_scan",
                    use=use,
                    target=target.name,
                    dtype=dtype,
                    tile=f"{tile.tokens}x{tile.outer}x{tile.inner}",
                    warps=tile.warps,
                    stages=tile.stages,
                    limit=target.shared_memory,
                    matrix=sum(used.values()),
                    **assembler.resources(compiled),
                )


def step_kernels(target: Target) -> Iterator[Compiled]:
    """Every kernel that a running sequence launches: one token, several, with forks, controls and rollback.

    The step is called as it is, on tensors of this machine, with tiles of the target; launches compile.
    """
    from ttt_compiler.codegen.gpu import decode, schedules
    from ttt_compiler.codegen.gpu.step import fast_weight_step
    from ttt_compiler.codegen.layout import DONE, FACTORED, SEEN, WRITES

    d, f, chunk = 256, 768, 64
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seen: set[tuple[str, str]] = set()
        for (rule, revocable, shared), (batch, tokens) in itertools.product(SEQUENCES, CALLS):
            spec = SiteSpec("w", d, f, d, chunk, 0.3, "hidden_states", True, 5, "m", rule=rule)
            state = FastWeightState.zeros(
                [spec], batch, dtype, torch.device("cpu"), revocable=revocable, shared_lanes=shared
            )
            rows = state.sites["w"].rows
            rows[:, SEEN], rows[:, DONE], rows[:, WRITES] = 2 * chunk - 1, 1, 1
            rows[1, FACTORED] = chunk
            h, t = (torch.randn(batch, tokens, x).to(dtype) for x in (f, d))
            w0, conv, proj = (torch.randn(x).to(dtype) for x in ((d, f), (d, 1, 5), (d, d)))
            with (
                launches.compiling_launches(target.backend, target.arch, target.warp) as found,
                mock.patch.object(schedules, "interpreted", return_value=False),
                mock.patch.object(decode, "interpreted", return_value=False),
                mock.patch.object(schedules, "architecture", return_value=target.name),
                mock.patch.object(schedules, "_processors", return_value=target.processors),
            ):
                fast_weight_step(h, t, w0, None, conv, proj, None, spec, state.sites["w"], state.batch)
            for kernel, compiled in found:
                if kernel == "chunk_scan_kernel" or (kernel, compiled.hash) in seen:
                    continue
                seen.add((kernel, compiled.hash))
                used = assembler.instructions(compiled, target.matrix_units)
                yield Compiled(
                    kernel=kernel.removesuffix("_kernel"),
                    use="running",
                    target=target.name,
                    dtype=name,
                    tile="-",
                    warps=compiled.metadata.num_warps,
                    stages=compiled.metadata.num_stages,
                    limit=target.shared_memory,
                    matrix=sum(used.values()),
                    **assembler.resources(compiled),
                )


def page(rows: list[Compiled]) -> str:
    """The table as Markdown."""
    head = (
        "| kernel | use | architecture | operands | tile | warps | stages | registers | spilled "
        "| shared memory | of | matrix instructions |"
    )
    lines = [
        "# Kernels",
        "",
        "Written by `python -m ttt_compiler.offline.cross_compile --write docs/kernels.md`; a test "
        "compiles them afresh. A tile is tokens x rows of W x columns of W. Shared memory is in bytes of a "
        "block.",
        "",
        head,
        "|" + "---|" * 12,
    ]
    for r in rows:
        cells = (r.kernel, r.use, r.target, r.dtype, r.tile, r.warps, r.stages, r.registers, r.spilled)
        lines.append(f"| {' | '.join(map(str, (*cells, r.shared, r.limit, r.matrix)))} |")
    return "\n".join(lines) + "\n"


def merged(rows: Iterable[Compiled]) -> list[Compiled]:
    """One row per kernel and operand type: the most that any of its variants takes."""
    found: dict[tuple[str, str], Compiled] = {}
    for r in rows:
        most = found.get((r.kernel, r.dtype), r)
        found[r.kernel, r.dtype] = dataclasses.replace(
            most,
            **{k: max(getattr(most, k), getattr(r, k)) for k in ("registers", "spilled", "shared", "matrix")},
        )
    return list(found.values())


def main() -> None:
    """Compile, print or write, and fail when a gate does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", action="append", help="an architecture; by default all")
    parser.add_argument("--write", metavar="FILE", help="write the page there")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead")
    a = parser.parse_args()
    targets = [t for t in TARGETS if not a.target or t.name in a.target]
    rows = [r for t in targets for r in (*scan_kernels(t), *merged(step_kernels(t)))]
    if a.write:
        Path(a.write).write_text(page(rows))
    else:
        print(json.dumps([dataclasses.asdict(r) for r in rows]) if a.json else page(rows))
    faults = [f"{r.kernel} {r.target} {r.dtype} {r.tile} {r.use}: {f}" for r in rows for f in r.faults]
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
