"""How the suite times: every competitor in one process, in turns, after a correctness gate.

One round of pytest-benchmark is one call of every competitor, in an order that changes; each call is timed by
itself and a ratio is taken within its round, so that a busy machine disturbs both sides alike. What
pytest-benchmark prints is the length of a round; the figures are in ``extra_info`` of its JSON.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.environment import environment
from bench.measure import clock_of, one_round, summary
from bench.results import OURS, held_against

Runs = dict[str, Callable[[], object]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="few sizes, few rounds: under three minutes")
    parser.addoption("--full", action="store_true", help="the dear cases too: hours")
    parser.addoption("--ci", action="store_true", help="what CI runs: tiny, is it right; no figure is read")
    parser.addoption("--rounds", type=int, help="rounds of every comparison")
    parser.addoption("--threads", type=int, default=1, help="threads of torch")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a run for CI and of a quick one, what is marked so; of the others, what is not for CI, nor dear."""
    ci, quick, full = (config.getoption(f"--{name}") for name in ("ci", "quick", "full"))
    for item in items:
        if not ci:
            # A large model's case takes longer than any test may, beside other work.
            item.add_marker(pytest.mark.timeout(0))
        if ci != (item.get_closest_marker("ci") is not None):
            item.add_marker(pytest.mark.skip(reason="not a part of --ci" if ci else "a part of --ci alone"))
        elif quick and not ci and item.get_closest_marker("quick") is None:
            item.add_marker(pytest.mark.skip(reason="not a part of --quick"))
        elif not full and item.get_closest_marker("full") is not None:
            item.add_marker(pytest.mark.skip(reason="a part of --full alone"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["ttt"] = environment()


@pytest.fixture(autouse=True)
def graphs_of_its_own():
    """Dynamo compiles one function for a few shapes; beyond its limit they would run uncompiled."""
    torch._dynamo.reset()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, dict[str, float]]]:
    """A function that times competitors and files the result.

    The first one is the base of the ratios, unless ``bases`` names each one's own. ``rivals`` names which of
    our forms a competitor is held against, if not the plain one. Seconds are of one of a call's ``repeats``.
    """

    def run(
        runs: Runs,
        rounds: int = 7,
        bases: dict[str, str] | None = None,
        rivals: dict[str, str] | None = None,
        repeats: int = 1,
        **info: Any,
    ) -> dict[str, dict[str, float]]:
        clock, names = clock_of(torch.get_num_threads()), list(runs)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        order = random.Random(0)

        def turn() -> None:
            for name, taken in one_round(runs, clock, order).items():
                seconds[name].append(taken / repeats)

        option = request.config.getoption
        rounds = option("--rounds") or (1 if option("--ci") else 3 if option("--quick") else rounds)
        benchmark.pedantic(turn, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info |= info
        benchmark.extra_info["times"] = times = {
            name: summary(taken[1:], seconds[(bases or {}).get(name, names[0])][1:])
            for name, taken in seconds.items()
        }
        benchmark.extra_info["ours_over"] = {
            name: summary(seconds[ours][1:], taken[1:])
            for name, taken in seconds.items()
            if (ours := held_against(name, rivals or {})) in seconds and not name.startswith(OURS)
        }
        return times

    return run
