"""Every launch of the step of GPUs against its naive reference, on the operands of real histories."""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.codegen.test_step import KEY, RULES, feed, fresh, problem, spec
from tests.tolerances import SEGMENTATION, relative_error
from ttt_compiler.codegen.gpu import decode, sequence
from ttt_compiler.codegen.kernels import (
    append_tail,
    base_apply,
    decode_finish,
    decode_plan,
    decode_read,
    decode_values,
    factor_rows,
    gather_tokens,
    own_slot,
    write_chunks,
)
from ttt_compiler.codegen.kernels.own_slot import STAGE
from ttt_compiler.codegen.kernels.write_chunks import WRITTEN, Keys
from ttt_compiler.codegen.layout import StateTensors
from ttt_compiler.offline import interpreter


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    interpreter.install()


def copied(x):
    if isinstance(x, StateTensors | Keys):
        return type(x)(*(copied(y) for y in (x if isinstance(x, tuple) else vars(x).values())))
    return x.clone() if isinstance(x, torch.Tensor) else x


def close(a, b):
    """Equal but for the order of sums, undefined parts (NaN) included."""
    if isinstance(a, StateTensors):
        return all(close(x, y) for x, y in zip(a, b, strict=True))
    if not a.is_floating_point():
        return torch.equal(a, b)
    same = torch.equal(a.isnan(), b.isnan())
    return same and relative_error(a.nan_to_num(), b.nan_to_num()) < SEGMENTATION if a.numel() else True


def outputs_agree(name, given, ours, theirs):
    if name == "decode_plan":
        ours[2][:, WRITTEN] = 0
        return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if name == "gather_tokens":
        return torch.equal(ours[0], theirs[0]) and close(ours[1], theirs[1])
    if name == "base_apply":
        need = given["need"] != 0
        return close(ours.sum(0)[need], theirs[need])
    if name == "decode_values":
        made = theirs[:, 0] != 0
        return bool((ours[made, 0] == 1).all())
    if name == "own_slot":
        staged = (given["jobs"][:, 0] == STAGE)[:, None] & (theirs != 0)
        return torch.equal(ours[staged], theirs[staged])
    return ours is None or close(ours, theirs)


@pytest.fixture
def checked(monkeypatch):
    """Every launcher is run beside its reference; the set of those that ran."""
    ran = set()

    def wrap(module, name):
        launch, naive = getattr(module, name), getattr(module, f"naive_{name}")
        wanted = inspect.signature(naive).parameters

        def both(*args, **kwargs):
            given = inspect.signature(launch).bind(*args, **kwargs).arguments
            before = {k: copied(v) for k, v in given.items()}
            ours = launch(*args, **kwargs)
            theirs = naive(**{k: v for k, v in before.items() if k in wanted})
            assert outputs_agree(name, given, ours, theirs), name
            for key in wanted:
                if (
                    key in given
                    and isinstance(given[key], torch.Tensor | StateTensors)
                    and (name, key)
                    != (
                        "decode_values",
                        "state",
                    )
                ):
                    assert close(given[key], before[key]), f"{name}: {key}"
            ran.add(name)
            return ours

        for user in (decode, sequence):
            if hasattr(user, name):
                monkeypatch.setattr(user, name, both)

    wrap(append_tail, "append_tail")
    wrap(base_apply, "base_apply")
    wrap(decode_finish, "decode_finish")
    wrap(decode_plan, "decode_plan")
    wrap(decode_read, "decode_read")
    wrap(decode_values, "decode_values")
    wrap(factor_rows, "factor_rows")
    wrap(gather_tokens, "gather_tokens")
    wrap(own_slot, "own_slot")
    wrap(write_chunks, "write_chunks")
    return ran


@pytest.mark.parametrize(("rule", "revocable"), [("official", 0), ("everything", 4), ("decay", 0)])
def test_launches_of_a_history(checked, rule, revocable):
    g = torch.Generator().manual_seed(revocable)
    one = spec(3, RULES[rule], proj=rule != "decay")
    state = fresh(one, 3, torch.float32, revocable=revocable, shared_lanes=True)
    for call, length in enumerate([1] * 7 + [5] + [1] * 4):
        args = problem(3, length, torch.float32, call)
        args[2:] = problem(3, 1, torch.float32, 99)[2:]
        if rule == "decay":
            args[4] = None
        pos = torch.randint(1, 9, (3, length), generator=g)
        pos[call % 3, 0] = (-1, 0, 4)[call % 3]
        with interpreter.gpu_step_on_cpu_tensors():
            feed(state, one, args, 0, length, pos)
        if call % 2:
            state.select(torch.randint(0, 3, (3,), generator=g))
    assert state.sites[KEY].rows[:, 1].max() > 0
    assert len(checked) == 10
