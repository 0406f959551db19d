"""The step's operator in C++: torch calls it, it leaves to Python what it must, and it can be told not to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.codegen.test_step import KEY, feed, fresh, problem, spec
from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native import op
from ttt_compiler.codegen.layout import SEEN, spread_tokens
from ttt_compiler.errors import NonFiniteWriteError

CHUNK = 4


def entries(monkeypatch):
    """The calls that reach Python."""
    from ttt_compiler.codegen.cpu import step

    entered = []
    for name in ("fast_weight_step", "finish_step"):
        call = getattr(step, name)
        monkeypatch.setattr(step, name, lambda *a, name=name, call=call: entered.append(name) or call(*a))
    return entered


def test_torch_calls_it():
    assert op.load()
    table = torch._C._dispatch_dump_table("ttt::fast_weight_step").splitlines()
    assert [line for line in table if line.startswith("CPU: ") and ".cpp" in line]


def test_what_reaches_python(monkeypatch):
    one, state = spec(CHUNK), fresh(spec(CHUNK), 2, spread=True)
    args = problem(2, 16)
    assert op.load()
    entered = entries(monkeypatch)
    feed(state, one, args, 0, 3)
    assert entered == ["fast_weight_step"]
    for i in range(3, 9):
        feed(state, one, args, i, i + 1)
    assert entered == ["fast_weight_step"]
    pos = torch.ones(2, 16, dtype=torch.int64)
    pos[0, 9] = -1
    feed(state, one, args, 9, 10, pos)
    assert entered == ["fast_weight_step", "finish_step"]
    with native.unused():
        feed(state, one, args, 10, 11)
    assert entered[2:] == ["fast_weight_step"]
    assert state.column(KEY, SEEN) == [10, 11]


def test_errors_of_python_pass_through_it(monkeypatch):
    one, state = spec(CHUNK), fresh(spec(CHUNK), 1, spread=True)
    h, *others = problem(1, CHUNK)
    h[0, 2, 3] = float("nan")
    assert op.load()
    for i in range(CHUNK - 1):
        feed(state, one, [h, *others], i, i + 1)
    with pytest.raises(NonFiniteWriteError, match="chunk 0"):
        feed(state, one, [h, *others], CHUNK - 1, CHUNK)


@pytest.mark.parametrize("row", [2, -1, 1 << 40])
def test_a_row_that_is_not_there_is_an_error(row):
    one, state = spec(CHUNK), fresh(spec(CHUNK), 2, spread=True)
    state.batch[1] = row
    assert op.load()
    with pytest.raises(IndexError, match="has 2 rows"):
        feed(state, one, problem(2, 1), 0, 1)
    assert state.sites[KEY].rows[:, SEEN].tolist() == [0, 0]


@pytest.mark.parametrize("which", ["h", "t", "batch", "pos"])
def test_sizes_that_disagree_are_no_read_beyond_a_tensor(which):
    one, state = spec(CHUNK), fresh(spec(CHUNK), 2, spread=True)
    h, t, *others = problem(2, 1)
    if which == "h":
        h = h[..., :-1]
    elif which == "t":
        t = t[:1]
    elif which == "batch":
        state.batch = torch.tensor([0, 1, 0])
    pos = torch.zeros(2, 0, dtype=torch.int64) if which == "pos" else None
    assert op.load()
    with pytest.raises(ValueError, match="must be"):
        feed(state, one, [h, t, *others], 0, 1, pos)
    assert state.sites[KEY].rows[:, SEEN].tolist() == [0, 0]


def test_what_it_knows_of_a_site():
    one = spec(64)
    chunk, spread, _, count, *units = op.step_constants(one).tolist()
    assert (chunk, spread, len(units)) == (64, spread_tokens(one), 4 * count)


FORK = """
import os, torch
from tests.codegen.test_step import feed, fresh, problem, spec
from ttt_compiler.codegen.cpu.native import op
one, args = spec(4), problem(1, 8)
state = fresh(one, 1)
feed(state, one, args, 0, 2)
child = os.fork()
y = feed(state, one, args, 2, 3)
assert op.load() and y.isfinite().all()
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_fork_while_it_is_built():
    """The child has no thread that builds it."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
