"""Find the MLPs of a model by running it once on a few tokens under a recording backend.

No module or parameter name decides anything: the captured graphs are searched by dataflow, and the weights
are named through the identity of the tensors that enter the graphs. Further runs, each with another token
in the first row, show how tokens reach every MLP. May be changed here: example inputs. The parts are in
``discovery/``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.compat import capture, uncompiled_call, visible_mlps
from ttt_compiler.discovery.found import Discovery, FoundMLP
from ttt_compiler.discovery.recorder import Recorder
from ttt_compiler.errors import UnsupportedModelError

__all__ = ["Discovery", "FoundMLP", "Inputs", "default_inputs", "discover", "find_sites"]

_BATCH, _TOKENS = 2, 9

Inputs = tuple[Sequence[Any], Mapping[str, Any]]


def discover(model: nn.Module, example_inputs: Inputs | None = None) -> Discovery:
    """Capture ``model`` and describe its MLPs; the model is not changed.

    Args:
        model: any module; a transformers causal language model needs no inputs.
        example_inputs: ``(args, kwargs)`` of one call, batch and tokens first.

    Raises:
        UnsupportedModelError: the model cannot be called without example inputs, or was not captured.
    """
    args, kwargs = example_inputs if example_inputs is not None else default_inputs(model)
    args, kwargs = _dense(args, kwargs)
    recorder = Recorder(model)
    run = capture(uncompiled_call(model), recorder)
    with _quiet(model), visible_mlps(), torch.no_grad():
        args, kwargs = _run_in_two_rows(model, run, args, kwargs)
        for position in probed_positions(args, kwargs):
            changed = with_other_token(args, kwargs, position)
            if changed is not None:
                recorder.start_run(position)
                with _restored(model):
                    run(*changed[0], **changed[1])
    if not recorder.graphs:
        raise UnsupportedModelError(
            f"{type(model).__name__} was not captured by Dynamo: is its forward disabled or a script module?"
        )
    return recorder.result(_leading_shape(args, kwargs))


def default_inputs(model: nn.Module) -> Inputs:
    """A few random token ids for a transformers model.

    Raises:
        UnsupportedModelError: for other models, asking for ``example_inputs``.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    vocab = getattr(config, "vocab_size", None)
    if vocab is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} is no text model of transformers, so its inputs are unknown. Type "
            "ttt.convert(model, config, example_inputs=((x,), {})) with one batch x [batch, tokens, ...]"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (_BATCH, _TOKENS), generator=generator)
    device = next(model.parameters()).device
    return (), {"input_ids": ids.to(device), "use_cache": False}


def _leading_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and x.dim() >= 2:
            return int(x.shape[0]), int(x.shape[1])
    return None


def _dense(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """Contiguous tensors: the changed copy of one must not differ from it in its strides (a recompile)."""
    values = [x.contiguous() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
    return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))


def _run_in_two_rows(
    model: nn.Module, run: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Inputs:
    """Run once, a single row twice over: with one row alone, rows and tokens look the same."""
    shape = _leading_shape(args, kwargs)
    if shape is not None and shape[0] == 1:
        values = [
            x.repeat_interleave(2, 0) if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[0] == 1 else x
            for x in (*args, *kwargs.values())
        ]
        doubled = values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))
        # A model for one row at a time says so; then it is looked at with one.
        with contextlib.suppress(Exception), _restored(model):
            run(*doubled[0], **doubled[1])
            return doubled
    with _restored(model):
        run(*args, **kwargs)
    return args, kwargs


def probed_positions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens to change, one run each: the last, and one in the middle (attention in blocks)."""
    shape = _leading_shape(args, kwargs)
    return () if shape is None or shape[1] < 2 else tuple(dict.fromkeys((shape[1] - 1, shape[1] // 2)))


def with_other_token(args: Sequence[Any], kwargs: Mapping[str, Any], position: int) -> Inputs | None:
    """The same call with one token of row 0 changed, in the first sequence-shaped tensor."""
    values: list[Any] = [*args, *kwargs.values()]
    names: list[str | None] = [None] * len(args) + list(kwargs)
    # Ids and embeddings before masks and positions, whatever their order.
    order = sorted(range(len(values)), key=lambda i: names[i] not in ("input_ids", "inputs_embeds"))
    for i in order:
        x = values[i]
        if (
            isinstance(x, Tensor)
            and x.dim() >= 2
            and x.shape[1] > 1
            and not x.is_meta
            and x.dtype != torch.bool
        ):
            x = x.clone()
            if x.dtype.is_floating_point:
                x[0, position] = -x[0, position] + 1
            else:
                # Ids stay inside the range that the inputs already use, if they use more than one.
                others = x[x != x[0, position]]
                x[0, position] = others[0] if others.numel() else (x[0, position] - 1).abs()
            values[i] = x
            return values[: len(args)], dict(zip(kwargs, values[len(args) :], strict=True))
    return None


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Buffers and random numbers as before: a model with a memory would tell its runs apart by it."""
    before = {buffer: buffer.clone() for buffer in model.buffers() if not buffer.is_meta}
    versions = {buffer: _version(buffer) for buffer in before}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for buffer, value in before.items():
                if versions[buffer] != _version(buffer) or buffer.is_inference():
                    buffer.copy_(value)


def _version(buffer: Tensor) -> int:
    """How often a tensor was written; inference tensors do not count."""
    return 0 if buffer.is_inference() else buffer._version


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and untouched random state while the model is looked at."""
    training = {m for m in model.modules() if m.training}
    model.eval()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for m in model.modules():
                m.training = m in training


def find_sites(net: nn.Module, *args: Any, **kwargs: Any) -> tuple[FoundMLP, ...]:
    """The MLPs of any module, found by calling it once on example inputs.

    Args:
        net: the module; it is not changed.
        args: example inputs, batch and tokens first; a transformers text model needs none.
        kwargs: example inputs by name.
    """
    return discover(net, (args, kwargs) if args or kwargs else None).mlps
