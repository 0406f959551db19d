"""What every test may rely on: quiet libraries, a clean compiler, and memory that is never zero by luck."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides at its import whether kernels are compiled or interpreted; no test needs a device.
os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads that wait for a core the other one holds cost up to ten times more.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The other worker has a core already: Inductor's own pool would import torch once more in every process.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gc

import pytest
import torch

# Files whose tests take minutes each. A worker takes a whole file: begun last, one would keep a worker alone.
FIRST = (
    "goldens/test_official.py",
    "offline/test_machine_code.py",
    "architectures/test_sweep.py",
    "runtime/test_state_machine.py",
    "runtime/test_reliability.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Workers take files in the order below, not by how many tests they hold."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, and the others by how many tests they hold."""
    counts: dict[str, int] = {}
    for item in items:
        counts[str(item.path)] = counts.get(str(item.path), 0) + 1

    def rank(item: pytest.Item) -> tuple[bool, int, str]:
        path = item.path.as_posix()
        return not path.endswith(FIRST), -counts[str(item.path)], path

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Tracing makes objects by the million, and what was imported is looked through again and again for them.

    What a test drops is still collected, later: tests that count what is left call the collector themselves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    """At the end all is looked through once, else libraries report what they take for leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def clean_compiler():
    """No compiled code, and no recompile budget, is carried from one file to the next."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_empty():
    """``torch.empty`` gives NaN, so that reading what was never written shows."""
    before = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture
def compiles(monkeypatch):
    """Counts the graphs that reach Inductor: ``compiles.count``."""
    from ttt_compiler import compat

    class Counter:
        count = 0

    original = compat.inductor_compile

    def counting(*args, **kwargs):
        Counter.count += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(compat, "inductor_compile", counting)
    return Counter


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before, and models built the same whatever ran before."""
    torch._dynamo.reset()
    torch.manual_seed(0)
