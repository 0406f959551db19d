"""Results whose memory comes back: never while anything reads them, and to nobody else's surprise."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.codegen.test_ops import positions, problem, stateless
from ttt_compiler.codegen.cpu import workspaces
from ttt_compiler.codegen.cpu.workspaces import leased, release_workspaces, workspace


@pytest.fixture(autouse=True)
def nothing_held():
    release_workspaces()
    yield
    release_workspaces()


def sizes():
    return {slot: [len(x.memory) for x in loans] for slot, loans in workspaces._local.loans.items()}


def lease(*shape, dtype=torch.float32, slot="a"):
    return leased(slot, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_comes_back_when_nobody_has_it(dtype):
    first = lease(3, 5, dtype=dtype)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((3, 5), dtype, True)
    at = first.data_ptr()
    assert at % 64 == 0
    del first
    assert lease(5, 3, dtype=dtype).data_ptr() == at


KEEP = {
    "itself": lambda x: x,
    "a view": lambda x: x[1:],
    "another dtype": lambda x: x.view(torch.int32),
    "its storage": lambda x: x.untyped_storage(),
    "numpy": lambda x: x.numpy(),
    "a graph": lambda x: torch.ones(3, 5, requires_grad=True) * x,
    "a capsule": torch.utils.dlpack.to_dlpack,
    "a parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
def test_memory_stays_with_whoever_has_it(keep):
    first = lease(3, 5).fill_(1.0)
    at, kept = first.data_ptr(), keep(first)
    del first
    second = lease(3, 5)
    assert second.data_ptr() != at
    del kept, second


def test_what_is_given_up_later_was_not_overwritten():
    first = lease(3, 5).fill_(1.0)
    for value in (2.0, 3.0, 4.0):
        lease(3, 5).fill_(value)
    assert first.eq(1.0).all()
    release_workspaces()
    lease(3, 5).fill_(5.0)
    assert first.eq(1.0).all()


def test_a_slot_holds_what_was_in_use_at_once():
    """Layers of a model keep their matrices side by side, in every step."""
    steps = []
    for _ in range(3):
        results = [lease(3, 5) for _ in range(4)]
        steps.append({x.data_ptr() for x in results})
        del results
    assert steps[0] == steps[1] == steps[2]
    assert sizes() == {"a": [60] * 4}


def test_slots_and_sizes_have_memory_of_their_own():
    first = lease(3, 5)
    at = first.data_ptr()
    other = lease(3, 5, slot="b")
    assert other.data_ptr() != at
    del first, other
    larger = lease(300, 5)
    assert larger.untyped_storage().nbytes() == 300 * 5 * 4
    assert sizes() == {"a": [6000], "b": [60]}


def test_threads_have_memory_of_their_own():
    at = lease(3, 5).data_ptr()  # given up at once
    found = []

    def there():
        held = lease(3, 5)
        found.append(held.data_ptr())

    thread = threading.Thread(target=there)
    thread.start()
    thread.join()
    assert found != [at]
    assert lease(3, 5).data_ptr() == at


def test_a_result_is_a_tensor_of_its_own():
    """To autograd: a view that was made without a graph could not be changed in place with one."""
    made = lease(3, 5)
    assert not made._is_view()
    made.fill_(1.0)
    assert made.mul_(torch.ones(5, requires_grad=True)).requires_grad
    args = problem(grad=True)
    for x in torch.autograd.grad(stateless(*args, positions()).sum(), args):
        assert not x._is_view()


def test_a_result_has_its_size():
    made = lease(3, 5)
    assert made.resize_(2, 5).shape == (2, 5)
    with pytest.raises(RuntimeError, match="not resizable"):
        made.resize_(4, 5)


def test_memory_that_comes_back_holds_nothing_of_before():
    """As ``torch.empty`` of this suite."""
    lease(3, 5).fill_(1.0)
    assert lease(3, 5).isnan().all()
    lease(3, 5, dtype=torch.bfloat16, slot="b").fill_(1.0)
    assert lease(3, 5, dtype=torch.bfloat16, slot="b").isnan().all()


def test_results_are_of_this_machines_memory():
    with torch.device("meta"):
        made = lease(3, 5), lease(0), workspace("w", (3,), torch.float32)
    assert {x.device.type for x in made} == {"cpu"}


def test_a_loan_may_end_in_another_thread():
    box = [lease(3, 5)]
    at = box[0].data_ptr()
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert lease(3, 5).data_ptr() == at


def test_a_result_can_be_shared_with_another_process():
    first = lease(3, 5).fill_(1.0)
    first.share_memory_()
    lease(3, 5).fill_(2.0)
    assert first.eq(1.0).all()


def test_what_is_held_has_a_limit_and_empty_results_have_no_memory(monkeypatch):
    monkeypatch.setattr(workspaces, "MOST_LEASED", 64)
    for shape, slot in (((12,), "a"), ((5,), "b"), ((4,), "c"), ((1,), "d"), ((0, 3), "e")):
        assert lease(*shape, slot=slot).shape == shape
    assert sizes() == {"a": [48], "b": [], "c": [16], "d": [], "e": []}
    # A slot whose result does not fit any more gives up its room.
    lease(17)
    assert sizes()["a"] == []


def test_buffers_of_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        workspace("w", (3,), torch.float32)
    workspace("w", (3,), torch.float32).fill_(1.0)


def test_gradients_of_one_step_outlive_the_next():
    """Also with a graph that is kept, whose backward runs twice."""
    args = problem(grad=True)
    y = stateless(*args, positions())
    first = torch.autograd.grad(y.sum(), args, retain_graph=True)
    copies = [x.clone() for x in first]
    torch.autograd.grad(stateless(*args, positions()).square().sum(), args)
    again = torch.autograd.grad(y.sum(), args)
    for a, b, c in zip(first, copies, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, b)
