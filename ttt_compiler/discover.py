"""Find the MLPs of a model by running it once on a few tokens under a recording backend.

No module or parameter name decides anything: the captured graphs are searched by dataflow, and the weights
are named through the identity of the tensors that enter the graphs. Further runs, each with another token
in the first row, show how tokens reach every MLP. May be changed here: example inputs. The parts are in
``discovery/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    held = _held(model)
    with _quiet(model) as restore, visible_mlps(), torch.no_grad():
        doubled = _in_two_rows(args, kwargs)
        if doubled is not None:
            # A model for one row at a time says so; then it is looked at with one.
            with contextlib.suppress(Exception):
                run(*doubled[0], **doubled[1])
                args, kwargs = doubled
            restore()
        if doubled is None or args is not doubled[0]:
            recorder.forget()
            run(*args, **kwargs)
            restore()
        for position in probed_positions(args, kwargs):
            changed = with_other_token(args, kwargs, position)
            if changed is not None:
                recorder.start_run(position)
                run(*changed[0], **changed[1])
                restore()
    if not recorder.graphs:
        raise UnsupportedModelError(
            f"{type(model).__name__} was not captured by Dynamo: is its forward disabled or a script module?"
        )
    leading = _leading_shape(args, kwargs)
    return dataclasses.replace(recorder.result(leading), keeps=_kept(model, held, leading))


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


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules hold as plain attributes, neither parameters nor buffers."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _kept(model: nn.Module, before: Mapping[str, Tensor], leading: tuple[int, int] | None) -> str | None:
    """The first plain attribute that the calls left with a row per sequence."""
    rows = None if leading is None or leading[0] < 2 else leading[0]
    changed = (n for n, x in _held(model).items() if x is not before.get(n) and x.shape[:1] == (rows,))
    return next(changed, None)


def _leading_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) and x.dim() >= 2:
            return int(x.shape[0]), int(x.shape[1])
    return None


def _mapped(fn: Callable[[Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    return [fn(x) for x in args], {name: fn(x) for name, x in kwargs.items()}


def _replacing(old: Tensor, new: Tensor) -> Callable[[Any], Any]:
    return lambda value: new if value is old else value


def _dense(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
    """Contiguous tensors: the changed copy of one must not differ from it in its strides (a recompile)."""
    return _mapped(lambda x: x.contiguous() if isinstance(x, Tensor) else x, args, kwargs)


def _in_two_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs | None:
    """A single row twice over: with one row alone, rows and tokens look the same. None for more rows."""
    shape = _leading_shape(args, kwargs)
    if shape is None or shape[0] != 1:
        return None

    def twice(x: Any) -> Any:
        single = isinstance(x, Tensor) and x.dim() >= 2 and x.shape[0] == 1
        return x.repeat_interleave(2, 0) if single else x

    return _mapped(twice, args, kwargs)


def probed_positions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens to change, one run each: the last, and one in the middle (attention in blocks)."""
    shape = _leading_shape(args, kwargs)
    return () if shape is None or shape[1] < 2 else tuple(dict.fromkeys((shape[1] - 1, shape[1] // 2)))


def with_other_token(args: Sequence[Any], kwargs: Mapping[str, Any], position: int) -> Inputs | None:
    """The same call with one token of row 0 changed, in the first sequence-shaped tensor."""
    # Ids and embeddings before masks and positions, whatever their order.
    first = [kwargs[n] for n in ("input_ids", "inputs_embeds") if n in kwargs]
    for x in (*first, *args, *kwargs.values()):
        if not isinstance(x, Tensor) or x.is_meta or x.dtype == torch.bool:
            continue
        if x.dim() < 2 or x.shape[1] < 2:
            continue
        other = x.clone()
        if x.dtype.is_floating_point:
            other[0, position] = -x[0, position] + 1
        else:
            # Ids stay inside the range that the inputs already use, if they use more than one.
            unlike = x[x != x[0, position]]
            other[0, position] = unlike[0] if unlike.numel() else (x[0, position] - 1).abs()
        return _mapped(_replacing(x, other), args, kwargs)
    return None


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Evaluation mode while the model is looked at; gives what puts its memory back between the runs.

    That is buffers and random numbers: a model with a memory would tell its runs apart by it.
    """
    training = {m for m in model.modules() if m.training}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    versions = [_version(buffer) for buffer, _ in buffers]
    random = torch.get_rng_state()

    def restore() -> None:
        torch.set_rng_state(random)
        for i, (buffer, value) in enumerate(buffers):
            # Only what was written: a state is bound to the version of quantised weights, which are buffers.
            if buffer.is_inference() or versions[i] != _version(buffer):
                buffer.copy_(value)
                versions[i] = _version(buffer)

    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield restore
    finally:
        with torch.no_grad():
            restore()
        for m in model.modules():
            m.training = m in training


def _version(buffer: Tensor) -> int:
    """How often a tensor was written; inference tensors do not count."""
    return 0 if buffer.is_inference() else buffer._version


def find_sites(net: nn.Module, *args: Any, **kwargs: Any) -> tuple[FoundMLP, ...]:
    """The MLPs of any module, found by calling it once on example inputs.

    Args:
        net: the module; it is not changed.
        args: example inputs, batch and tokens first; a transformers text model needs none.
        kwargs: example inputs by name.
    """
    return discover(net, (args, kwargs) if args or kwargs else None).mlps
