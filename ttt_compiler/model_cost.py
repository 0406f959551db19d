"""Time of a whole model with and without fast weights, predicted: prefill, decode, training.

The static model is every weight matrix, attention over the context, and pointwise traffic; it is taken to be
compiled, so that pointwise operations between products are one kernel each. Fast weights change the
down-projections of their sites and nothing else. May be changed here: what of a model is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ttt_compiler.codegen import decode_cost, forms, forms_cpu, training_cost
from ttt_compiler.codegen.choose import predicted, predicted_gradient_form
from ttt_compiler.codegen.cost_model import Choice, linear_parameters, rank_scan_configs
from ttt_compiler.codegen.decode_cost import DecodeShape
from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.kernels.tiles import GRADIENT, RUNNING, SCAN
from ttt_compiler.codegen.phases import Cost, Phase, cost_of
from ttt_compiler.spec import SiteSpec

# Kernels per layer and token of a compiled model's decode step.
_DECODE_KERNELS = 10
# Attention's backward makes five products where its forward makes two.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its time.

    Attributes:
        name: of the model.
        linear: scalars of the weight matrices that multiply every token, without the output projection.
        head: scalars of the output projection; of a prompt only the last token needs it.
        layers: transformer layers.
        d_model: width of the residual stream.
        d_ff: width of an MLP's inside.
        attention_width: heads x head width; 0 when attention is not known, and then not counted.
        kv_width: heads of keys x head width.
        window: tokens that attention sees at most; None for all.
        dtype: of weights and operands.
    """

    name: str
    linear: int
    head: int
    layers: int
    d_model: int
    d_ff: int
    attention_width: int
    kv_width: int
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        name: str = "",
        dtype: torch.dtype | None = None,
        mlp: tuple[int, int] = (0, 0),
    ) -> ModelShape:
        """Read off a module, on the meta device too. Attention needs a configuration of transformers.

        Args:
            model: the module.
            name: default its class.
            dtype: default its parameters'.
            mlp: D and F where there is no such configuration.
        """
        every = linear_parameters(model)
        found: Any = getattr(model, "config", None)
        if hasattr(found, "get_text_config"):
            found = found.get_text_config(decoder=True)
        heads = getattr(found, "num_attention_heads", None) or 0
        width = getattr(found, "hidden_size", None) or mlp[0]
        each = getattr(found, "head_dim", None) or (width // heads if heads else 0)
        output = getattr(model, "get_output_embeddings", lambda: None)()
        head = int(getattr(getattr(output, "weight", None), "numel", lambda: 0)())
        if dtype is None:
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return cls(
            name=name or type(model).__name__,
            linear=every - head,
            head=head,
            layers=getattr(found, "num_hidden_layers", None) or 1,
            d_model=width,
            d_ff=getattr(found, "intermediate_size", None) or mlp[1],
            attention_width=heads * each,
            kv_width=(getattr(found, "num_key_value_heads", None) or heads) * each,
            dtype=dtype,
        )

    def pairs(self, tokens: int) -> float:
        """(query, key) pairs of causal attention over ``tokens`` tokens."""
        seen = tokens if self.window is None else min(tokens, self.window)
        return seen * (seen + 1) / 2 + (tokens - seen) * seen

    def cached(self, context: int) -> int:
        """Bytes of keys and values of one row."""
        seen = context if self.window is None else min(context, self.window)
        return 2 * self.layers * seen * self.kv_width * self.dtype.itemsize


@dataclass(frozen=True)
class Sites:
    """Fast-weight sites of one shape.

    Attributes:
        count: how many.
        d_model, d_ff, d_target, chunk: D, F, Dt, C.
        proj: whether P exists.
    """

    count: int
    d_model: int
    d_ff: int
    d_target: int
    chunk: int
    proj: bool

    @classmethod
    def group(cls, specs: Iterable[SiteSpec]) -> tuple[Sites, ...]:
        """Equal sites together, in order of their first."""
        counts: dict[tuple[int, int, int, int, bool], int] = {}
        for s in specs:
            shape = (s.d_model, s.d_ff, s.d_target, s.chunk, s.proj)
            counts[shape] = counts.get(shape, 0) + 1
        return tuple(cls(count, *shape) for shape, count in counts.items())

    def scan(self, tokens: int, batch: int, dtype: torch.dtype, *, final: bool = False) -> ScanShape:
        """The scan of one site over ``tokens`` tokens."""
        return ScanShape(tokens, self.d_model, self.d_ff, self.chunk, batch, dtype, final=final)


def static_prefill(model: ModelShape, tokens: int, device: Device, *, batch: int = 1) -> tuple[Phase, ...]:
    """The base model reads a prompt; the last token alone is projected on the vocabulary."""
    item, rows = model.dtype.itemsize, batch * tokens
    rate = device.peak(model.dtype)
    linear = 2.0 * rows * model.linear
    attended = 4.0 * batch * model.layers * model.attention_width * model.pairs(tokens)
    per_layer = 8 * model.d_model + 3 * model.d_ff + 2 * (model.attention_width + model.kv_width)
    reads = 2 * rows * (model.attention_width + model.kv_width) * item * model.layers
    reached = rate * device.gemm.value
    # Per layer: q k v, o, gate and up, down; attention; two norms with their additions, rope, activation.
    return (
        Phase("linear", linear, linear / reached, hbm=model.linear * item, launches=4 * model.layers),
        Phase(
            "attention", attended, attended / (rate * device.attention.value), reads, launches=model.layers
        ),
        Phase("pointwise", hbm=rows * model.layers * per_layer * item, launches=4 * model.layers),
        Phase("head", 2.0 * batch * model.head, hbm=model.head * item),
    )


def static_decode(model: ModelShape, context: int, device: Device, *, batch: int = 1) -> tuple[Phase, ...]:
    """The base model makes one token per row: weights once, keys and values of every row."""
    flops = 2.0 * batch * (model.linear + model.head)
    seen = context if model.window is None else min(context, model.window)
    attended = 4.0 * batch * model.layers * model.attention_width * seen
    rate = device.peak(model.dtype)
    weights = (model.linear + model.head) * model.dtype.itemsize
    kernels = (_DECODE_KERNELS - 1) * model.layers
    return (
        Phase("weights", flops, flops / rate, hbm=weights, launches=kernels),
        Phase(
            "attention", attended, attended / rate, hbm=batch * model.cached(context), launches=model.layers
        ),
    )


def static_training(model: ModelShape, tokens: int, device: Device, *, batch: int = 1) -> tuple[Phase, ...]:
    """Forward and backward of the base model; no recomputation, no optimiser, loss on every token."""
    linear, attention, pointwise, _ = static_prefill(model, tokens, device, batch=batch)
    head = 2.0 * batch * tokens * model.head
    rate = device.peak(model.dtype) * device.gemm.value
    item = model.dtype.itemsize
    return (
        *(linear,) * 3,
        attention,
        Phase("attention backward", _ATTENTION_BACKWARD * attention.flops,
              _ATTENTION_BACKWARD * attention.seconds, hbm=3 * attention.hbm),
        *(pointwise,) * 3,
        Phase("head", 3 * head, 3 * head / rate, hbm=3 * model.head * item, launches=3),
    )  # fmt: skip


@functools.cache
def ours(shape: ScanShape, device: Device, use: str, form: str = "on_chip") -> Choice:
    """What the package runs for a scan: see :func:`ttt_compiler.codegen.choose.predicted`."""
    if device.overlaps:
        return predicted(device, use, shape, form)
    return next(choice for choice in rank_scan_configs(shape, device, ()) if choice.form == "recurrent")


@dataclass(frozen=True)
class Added:
    """What fast weights add to one call of a model.

    Attributes:
        base: of the static model.
        seconds: added by ours.
        stacked: added by the stacked (official training) form; None where it does not exist.
        form: of ours, with its tiles.
        workspace: bytes that ours needs for a moment, and in training what it keeps until the backward.
        stacks: the same of the stacked form; None where it does not exist.
    """

    base: Cost
    seconds: float
    stacked: float | None
    form: str
    workspace: int
    stacks: int | None

    @property
    def percent(self) -> float:
        """Time that ours adds, in percent of the static model's."""
        return 100 * self.seconds / self.base.seconds

    @property
    def stacked_percent(self) -> float | None:
        """The same of the stacked form."""
        return None if self.stacked is None else 100 * self.stacked / self.base.seconds


def prefill(
    model: ModelShape, sites: Iterable[Sites], tokens: int, device: Device, *, batch: int = 1
) -> Added:
    """What a prompt of ``tokens`` tokens costs; ours keeps the state after it, the stacked form does not."""
    seconds = stacked = 0.0
    workspace = stacks = 0
    names: dict[str, None] = {}
    for site in sites:
        shape = site.scan(tokens, batch, model.dtype, final=True)
        values = _seconds(forms.values(shape, device, d_target=site.d_target, proj=site.proj), device)
        base = _seconds(_static(shape, device), device)
        choice = ours(shape, device, RUNNING)
        names[named(choice)] = None
        seconds += site.count * (choice.cost.seconds + values - base)
        stacked += site.count * (_seconds(forms.stacked_cumsum(shape, device), device) + values - base)
        workspace = max(workspace, choice.workspace)
        stacks = max(stacks, forms.stack_bytes(shape, training=False))
    cost = cost_of(static_prefill(model, tokens, device, batch=batch), device)
    return Added(cost, seconds, stacked, ", ".join(names), workspace, stacks)


def decode(
    model: ModelShape, sites: Iterable[Sites], context: int, device: Device, *, batch: int = 1
) -> Added:
    """What one token per row costs after ``context`` tokens, launched as one recorded graph."""
    seconds = 0.0
    names: dict[str, None] = {}
    for site in sites:
        written = context // site.chunk * site.chunk
        shape = DecodeShape(batch, written, site.d_model, site.d_ff, site.chunk, model.dtype)
        name, phases = decode_cost.choose(shape, device)
        names[name] = None
        base = decode_cost.static(shape, device)
        seconds += site.count * (
            cost_of(phases, device, recorded=True).seconds - cost_of(base, device, recorded=True).seconds
        )
    cost = cost_of(static_decode(model, context, device, batch=batch), device, recorded=True)
    return Added(cost, seconds, None, ", ".join(names), 0, None)


def training(
    model: ModelShape, sites: Iterable[Sites], tokens: int, device: Device, *, batch: int = 1
) -> Added:
    """What forward and backward of ``tokens`` tokens cost."""
    seconds = stacked = 0.0
    workspace = stacks = saved = kept = 0
    names: dict[str, None] = {}
    for site in sites:
        shape = site.scan(tokens, batch, model.dtype)
        values = _seconds(
            training_cost.values_step(shape, device, d_target=site.d_target, proj=site.proj), device
        )
        base = _seconds(training_cost.static_step(shape, device), device)
        form = predicted_gradient_form(device, shape) if device.overlaps else "recurrent"
        phases, needed = training_cost.our_step(shape, device, functools.partial(_scan, form=form))
        official, stack = training_cost.stacked_step(shape, device)
        names[ours(shape, device, SCAN).form] = None
        seconds += site.count * (_seconds(phases, device) + values - base)
        stacked += site.count * (_seconds(official, device) + values - base)
        saved += site.count * training_cost.saved_bytes(shape, device)
        kept += site.count * training_cost.saved_bytes(shape, device, stacked=True)
        workspace, stacks = max(workspace, needed), max(stacks, stack)
    cost = cost_of(static_training(model, tokens, device, batch=batch), device)
    return Added(cost, seconds, stacked, ", ".join(names), workspace + saved, stacks + kept)


def named(choice: Choice) -> str:
    """A choice in a word, with the tiles of our kernel or the span of the dual form."""
    if choice.span is not None:
        return f"{choice.form} L{choice.span}"
    if choice.config is None:
        return choice.form
    c = choice.config
    return f"{choice.form} {c.bm}x{c.bd}x{c.bf} S{c.groups}"


def _scan(shape: ScanShape, device: Device, form: str) -> tuple[tuple[Phase, ...], int]:
    # Gradients have operands of their own, or leave a state.
    choice = ours(shape, device, GRADIENT if shape.apart or shape.final else SCAN, form)
    return choice.phases, choice.workspace


def _static(shape: ScanShape, device: Device) -> tuple[Phase, ...]:
    return forms.static(shape, device) if device.overlaps else forms_cpu.static(shape, device)


def _seconds(phases: tuple[Phase, ...], device: Device) -> float:
    return cost_of(phases, device).seconds
