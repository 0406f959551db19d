"""What the suite would measure, case by case, without running it: a page says how much of it is there.

Read from the parameters of the suite's own tests; what CI alone runs is no part. May be changed here: which
tests, and what makes a shape of their parameters.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from bench.results import WHOLE_CHUNK, Case


def _plain(kind: str) -> Callable[[Any], dict[str, Any]]:
    return lambda shape: {"kind": kind, "shape": vars(shape)}


def _sweep(kind: str, sweep: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "shape": {**vars(sweep.base), "variable": sweep.variable},
        "variable": sweep.variable,
        "values": list(sweep.values),
    }


# Per test: what its parameters become in ``extra_info``.
_TESTS: dict[str, dict[str, Callable[..., dict[str, Any]]]] = {
    "test_layer": {
        "test_forward": _plain("forward"),
        "test_prefill": _plain("prefill"),
        "test_training": _plain("training"),
    },
    "test_decode": {
        "test_step": _plain("decode"),
        "test_whole_chunk": _plain(WHOLE_CHUNK),
        "test_border": _plain("border"),
    },
    "test_model": {
        "test_logits": _plain("model logits"),
        "test_prefill": _plain("model prefill"),
        "test_model_training": _plain("model training"),
        "test_model_decode": _plain("model decode"),
        "test_model_border": _plain("border"),
    },
    "test_growth": {"test_growth": lambda sweep: _sweep("growth", sweep)},
    "test_memory": {"test_memory": lambda what, sweep: _sweep(f"memory, {what}", sweep)},
}


@functools.cache
def planned() -> tuple[Case, ...]:
    """Cases with their kind and shape, and nothing else; none where the suite is not there."""
    found: list[Case] = []
    for file, tests in _TESTS.items():
        name = f"bench.suite.{file}"
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        for test, info in tests.items():
            found += [Case(test, info(*values)) for values in _parameters(getattr(module, test))]
    return tuple(found)


def _parameters(test: Any) -> list[tuple[Any, ...]]:
    """Values that a test is run with, from its one mark that has several."""
    found = []
    (given,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
    for one in given:
        # A plain value, or what pytest.param made of some.
        values, marks = getattr(one, "values", (one,)), getattr(one, "marks", ())
        if not any(m.name == "ci" for m in marks):
            found.append(tuple(values))
    assert found, f"{test.__name__}: its parameters were read before, by a generator that is used up"
    return found
