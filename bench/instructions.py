"""Instructions of one decode step of ``ttt::fast_weight_step``, so small that only the host's path counts.

    python -m bench.instructions --json FILE     # some minutes under valgrind, seconds by perf

Counted in a process of its own by ``perf stat`` where the processor's counters can be read, else by
callgrind. A run of N steps is taken from a run of 2N, so that what comes before the steps cancels. Our loops
in C++ are built for AVX2, since valgrind runs no AVX-512; torch chooses by what it is told of the processor.
Counts of the two tools are therefore not comparable, and the tool is recorded. May be changed here: sizes and
steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch._inductor import config

from bench.environment import environment
from bench.layer import KEY, fresh_state
from ttt_compiler.codegen import ops  # noqa: F401  (registers the ops)
from ttt_compiler.codegen.layout import DONE, SEEN, WRITES
from ttt_compiler.errors import TTTError

SIZE, CHUNK, BATCHES = 8, 4096, (1, 4)
_PERF = ("perf", "stat", "-x", ",", "-e", "instructions:u")
_CALLGRIND = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
# One line of either tool's stderr; perf says "<not supported>" in place of the number.
_COUNT = re.compile(r"^(?:==\d+== Collected : (\d+)|(\d+),,instructions:u)", re.MULTILINE)


def counter() -> tuple[str, ...]:
    """The command in front of what is counted.

    Raises:
        TTTError: this machine has none.
    """
    if shutil.which(_PERF[0]) and _COUNT.search(_run((*_PERF, "true")).stderr):
        return _PERF
    if shutil.which(_CALLGRIND[0]):
        return _CALLGRIND
    raise TTTError("perf counts no instructions here and valgrind is missing. Type: apt-get install valgrind")


def per_step(tool: tuple[str, ...], batch: int, steps: int) -> float:
    """Instructions of one step of ``batch`` sequences."""
    return (count(tool, batch, 2 * steps) - count(tool, batch, steps)) / steps


def count(tool: tuple[str, ...], batch: int, steps: int) -> int:
    """Instructions of a process that does so many steps.

    Raises:
        TTTError: it failed, or the tool printed no count.
    """
    given = ("--run", str(batch), str(steps))
    done = _run((*tool, sys.executable, "-m", "bench.instructions", *given))
    found = _COUNT.search(done.stderr)
    if done.returncode or not found:
        raise TTTError(f"{' '.join(tool)} counted nothing:\n{done.stderr[-2000:]}")
    return int(found[1] or found[2])


@torch.no_grad()
def run(batch: int, steps: int) -> None:
    """What is counted: single tokens after one written chunk; none of them ends the next.

    Each makes its share of the next chunk's v, as in a session.
    """
    assert steps < CHUNK, f"{steps} steps reach the end of a chunk"
    torch.set_num_threads(1)
    if platform.machine() == "x86_64":
        config.cpp.march, config.cpp.simdlen = "haswell", 256
    state = fresh_state(SIZE, SIZE, CHUNK, batch, torch.float32)
    site, constants = state.sites[KEY], state.specs[0].encode()
    torch.manual_seed(0)
    # One chunk was written: by hand, that the run is short.
    site.w.normal_()
    for column, value in ((SEEN, CHUNK), (DONE, 1), (WRITES, 1)):
        site.rows[:, column] = value
    w0, conv, proj = torch.randn(SIZE, SIZE), torch.randn(SIZE, 1, 5), torch.randn(SIZE, SIZE)
    x = torch.ones(batch, 1, SIZE)
    for _ in range(steps):
        torch.ops.ttt.fast_weight_step.default(
            x, x, w0, None, conv, proj, None, constants, *site, state.batch
        )
    assert state.tokens_seen == [CHUNK + steps] * batch


def _run(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    # The order of sets, and with it the count, follows the seed.
    environ = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000, help="N; the longer run has twice as many")
    parser.add_argument("--json", metavar="FILE", help="write it there too")
    parser.add_argument("--run", nargs=2, type=int, metavar=("B", "N"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.run:
        return run(*a.run)
    if not 0 < 2 * a.steps < CHUNK:
        parser.error(f"--steps: 1 to {CHUNK // 2 - 1}")
    try:
        tool = counter()
        # What is built at a first step is built before the counting.
        _run((sys.executable, "-m", "bench.instructions", "--run", "1", "1"))
        found = {f"B={b}": round(per_step(tool, b, a.steps)) for b in BATCHES}
    except TTTError as e:
        raise SystemExit(f"error: {e}") from e
    said = {
        "kind": "instructions",
        "tool": tool[0],
        "steps": a.steps,
        "d": SIZE,
        "f": SIZE,
        "per_step": found,
    }
    print(json.dumps(said))
    if a.json:
        Path(a.json).write_text(json.dumps({**said, "environment": environment()}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
