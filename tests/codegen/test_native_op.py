"""The step's operator in C++: torch calls it, it leaves to Python what it must, and it can be told not to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.codegen.test_step import KEY, feed, fresh, problem, spec
from ttt_compiler.codegen.cpu import native
from ttt_compiler.codegen.cpu.native import op
from ttt_compiler.codegen.layout import SEEN, spread_tokens
from ttt_compiler.errors import NonFiniteWriteError, UnsupportedDeviceError

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


@pytest.mark.parametrize("which", ["h", "t", "batch", "pos", "conv", "proj", "bias", "twice"])
@pytest.mark.parametrize("length", [1, 3])
def test_sizes_that_disagree_are_no_read_beyond_a_tensor(which, length):
    one, state = spec(CHUNK), fresh(spec(CHUNK), 2, spread=True)
    names = ("h", "t", "w0", "conv", "proj", "bias")
    args = dict(zip(names, problem(2, 3), strict=True))
    if which == "batch":
        state.batch = torch.tensor([0, 1, 0])
    elif which == "twice":
        state.batch = torch.tensor([1, 1])
    elif which != "pos":
        args[which] = args[which][..., :-1] if which == "h" else args[which][:-1]
    pos = torch.zeros(2, 0, dtype=torch.int64) if which == "pos" else None
    assert op.load()
    with pytest.raises((ValueError, IndexError), match=r"must be|each of them once"):
        feed(state, one, list(args.values()), 0, length, pos)
    assert state.sites[KEY].rows[:, SEEN].tolist() == [0, 0]


def test_tensors_on_another_device_are_named():
    one, state = spec(CHUNK), fresh(spec(CHUNK), 1)
    h, t, w0, _, proj, bias = problem(1, 1)
    conv = torch.zeros(w0.shape[0], 1, 5, dtype=h.dtype).to_sparse()
    assert op.load()
    with pytest.raises(UnsupportedDeviceError, match=r"torch\.sparse_coo on cpu"):
        feed(state, one, [h, t, w0, conv, proj, bias], 0, 1)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_and_grad_mode_change_nothing(grad):
    """Row 0 has written and row 1 begins again: both W and W0 are read, in the operands' dtype."""
    one, args = spec(CHUNK), problem(2, 12, torch.float32)
    states = [fresh(one, 2, torch.float32, spread=True) for _ in range(2)]
    pos = torch.ones(2, 12, dtype=torch.int64)
    pos[1, 9] = 0
    for i in range(12):
        want = feed(states[0], one, args, i, i + 1, pos)
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            got = feed(states[1], one, args, i, i + 1, pos)
        assert got.dtype == torch.float32
        assert torch.equal(got, want), i
        assert not got.requires_grad


def test_gradients_are_refused():
    one, args = spec(CHUNK), problem(1, 1)
    args[2].requires_grad_()
    assert op.load()
    with pytest.raises(RuntimeError, match="no_grad"):
        feed(fresh(one, 1), one, args, 0, 1)
    with torch.no_grad():
        assert not feed(fresh(one, 1), one, args, 0, 1).requires_grad


def test_a_step_counts_as_a_change():
    one, state = spec(CHUNK), fresh(spec(CHUNK), 1)
    assert op.load()
    before = [x._version for x in state.sites[KEY]]
    feed(state, one, problem(1, 1), 0, 1)
    assert all(x._version > n for x, n in zip(state.sites[KEY], before, strict=True))


def test_unused_ends_where_the_outer_one_does():
    with native.unused():
        with native.unused():
            assert not native.is_used()
        assert not native.is_used()
    assert native.is_used()


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


EXIT = """
import torch
from tests.codegen.test_step import feed, fresh, problem, spec
feed(fresh(spec(4), 1), spec(4), problem(1, 8), 0, 8)
"""


def test_a_process_that_ends_while_it_is_built_leaves_a_whole_library(tmp_path):
    """And no compiler behind that writes what the next process reads."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for source in (
        EXIT,
        EXIT.replace("8)\n", "8)\nfrom ttt_compiler.codegen.cpu.native import op; assert op.load()\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=600, check=False, env=env
        )
        assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.so"))) > 1
