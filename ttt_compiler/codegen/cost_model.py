"""Closed-form FLOPs and bytes of a fast-weight site, the order of the forms that can run it, and their names.

The counts of a site describe the algorithms in :mod:`ttt_compiler.codegen.cpu`; those of a form live in
:mod:`~ttt_compiler.codegen.forms`, :mod:`~ttt_compiler.codegen.on_chip` and
:mod:`~ttt_compiler.codegen.forms_cpu`. Nothing is measured here. May be changed here: a formula or a name,
together with the kernel that it describes, and which forms are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ttt_compiler.codegen import forms, forms_cpu
from ttt_compiler.codegen.cpu.gemm import ONEDNN_MIN_ROWS, SHADOW_MIN_ROWS, is_amd, writes_blocks
from ttt_compiler.codegen.devices import Device
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.kernels.tiles import SCAN, architecture, shipped
from ttt_compiler.codegen.on_chip import ScanConfig, on_chip, why_not, workspace_bytes
from ttt_compiler.codegen.phases import Cost, Phase, cost_of
from ttt_compiler.compat.processor import product_dtype
from ttt_compiler.spec import CONV, PROJ, SiteSpec, state_dtype

OVERHEAD_RULE = (
    "of the model's linear FLOPs, 2 per scalar of every weight matrix and token; embedding "
    "look-ups cost none, attention scores are not counted, experts count in full"
)


@dataclass(frozen=True)
class SiteFlops:
    """FLOPs of one site per token; a multiplication and an addition are two.

    Attributes:
        apply: ``h W^T``, what the static projection costs too.
        write: ``v^T h``, per written token.
        proj: ``conv(t) P``, per written token; 0 without P.
        conv: the depthwise convolution, per written token.
    """

    apply: int
    write: int
    proj: int
    conv: int

    @property
    def added(self) -> int:
        """What a written token costs beyond the static projection."""
        return self.write + self.proj + self.conv


def site_flops(spec: SiteSpec) -> SiteFlops:
    """FLOPs per token: apply 2DF; a written token adds 2DF + 2 Dt D + 2 K Dt."""
    projection = 2 * spec.d_model * spec.d_ff
    return SiteFlops(
        apply=projection,
        write=projection,
        proj=2 * spec.d_target * spec.d_model if spec.proj else 0,
        conv=2 * spec.conv_kernel * spec.d_target,
    )


def written_chunks(spec: SiteSpec, tokens: int, *, seen: int = 0) -> int:
    """Chunks that ``tokens`` tokens complete in a sequence that has seen ``seen``."""
    return (seen % spec.chunk + tokens) // spec.chunk


def call_flops(spec: SiteSpec, tokens: int, *, seen: int = 0) -> int:
    """FLOPs of one call of a running sequence: all tokens are applied, full chunks written."""
    flops = site_flops(spec)
    return tokens * flops.apply + written_chunks(spec, tokens, seen=seen) * spec.chunk * flops.added


def call_bytes(spec: SiteSpec, tokens: int, dtype: torch.dtype, *, seen: int = 0) -> int:
    """Bytes that one call of a running sequence must move at least.

    W is read once per piece between two chunk borders, h and t are read, y is written; a write
    reads its chunk's h and t and reads and writes W.
    """
    element, acc = dtype.itemsize, state_dtype(dtype).itemsize
    matrix = spec.d_model * spec.d_ff
    writes = written_chunks(spec, tokens, seen=seen)
    pieces = -(-(seen % spec.chunk + tokens) // spec.chunk)
    rows = tokens * (spec.d_ff + spec.d_target + spec.d_model) * element
    chunk = spec.chunk * (spec.d_ff + spec.d_target) * element
    return pieces * matrix * acc + rows + writes * (chunk + 2 * matrix * acc)


@dataclass(frozen=True)
class Choice:
    """One way to run a scan.

    Attributes:
        form: ``"on_chip"``, ``"two_gemm"``, ``"dual"`` or ``"recurrent"`` (a processor's loop).
        config: tiles of our kernel; None for the other forms.
        span: tokens inside of which ``dual`` is used; None for the other forms.
        phases: what runs.
        cost: predicted.
        workspace: bytes it needs besides operands and result.
    """

    form: str
    config: ScanConfig | None
    span: int | None
    phases: tuple[Phase, ...]
    cost: Cost
    workspace: int


def rank_scan_configs(shape: ScanShape, device: Device, configs: Sequence[ScanConfig]) -> list[Choice]:
    """The forms of a scan and the configurations of our kernel, the fastest by prediction first.

    Args:
        shape: of the scan.
        device: where.
        configs: to compare; what cannot run on the device is left out (:func:`on_chip.why_not` says why).

    Returns:
        One choice per configuration that can run, and one per other form. Equal predictions keep the order
        of ``configs``, so the result is the same everywhere.
    """
    state, narrow = shape.matrix * shape.state_itemsize, shape.matrix * shape.dtype.itemsize
    copies = state + (narrow if shape.state_itemsize != shape.dtype.itemsize else 0)
    found: list[tuple[str, ScanConfig | None, int | None, tuple[Phase, ...], int]] = [
        ("on_chip", c, None, on_chip(shape, device, c), workspace_bytes(c, shape))
        for c in configs
        if why_not(c, shape, device) is None
    ]
    if device.overlaps:
        found.append(("two_gemm", None, None, forms.two_gemm(shape, device), copies))
    else:
        found.append(("recurrent", None, None, forms_cpu.recurrent(shape, device), copies))
    span = forms.best_span(shape, device)
    if span > shape.chunk:
        scores = shape.batch * shape.chunk * min(span, shape.tokens) * shape.dtype.itemsize
        needed = scores + (copies if span < shape.tokens else 0)
        found.append(("dual", None, span, forms.dual(shape, device, span=span), needed))
    choices = [Choice(f, c, s, phases, cost_of(phases, device), w) for f, c, s, phases, w in found]
    return sorted(choices, key=lambda choice: choice.cost.seconds)


def linear_parameters(model: nn.Module) -> int:
    """Scalars of every weight matrix that multiplies a token, each counted once.

    An embedding table counts only where it is the output projection as well. What conversion added
    does not count.
    """
    looked_up = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
    }
    multiplied = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and name not in (CONV, PROJ):
                multiplied[id(parameter)] = parameter.numel()
    heads = getattr(model, "get_output_embeddings", lambda: None)()
    head = id(getattr(heads, "weight", None))
    return sum(size for key, size in multiplied.items() if key not in looked_up or key == head)


def overhead_percent(specs: Iterable[SiteSpec], model_params: int) -> float:
    """Added FLOPs per written token in percent of ``2 * model_params``; see ``OVERHEAD_RULE``.

    Args:
        specs: the sites.
        model_params: :func:`linear_parameters` of their model.
    """
    if model_params <= 0:
        return 0.0
    return 100.0 * sum(site_flops(s).added for s in specs) / (2 * model_params)


def lowering_name(spec: SiteSpec, device: torch.device, dtype: torch.dtype) -> str:
    """In words, what runs a site on ``device`` for operands of ``dtype``."""
    if device.type == "cuda" and torch.cuda.is_available():
        tile = shipped(architecture(device), dtype, SCAN)[0]
        return (
            f"{architecture(device)}: chunk scan on the chip, fp32 state, one Triton template per site with "
            f"tiles of up to {tile.outer} x {tile.inner} of W, or library products, by predicted time"
        )
    if device.type not in ("cpu", "meta"):
        return f"none: kernels exist for CPU and CUDA, and the weights are on {device.type}"
    mkl: bool = torch.backends.mkl.is_available()
    blas = "MKL" if mkl else "the BLAS that torch was built with"
    gemms = f"GEMMs by {blas}"
    if product_dtype(dtype) != dtype:
        gemms += f" in fp32: this processor has no unit for {str(dtype).removeprefix('torch.')} products"
    elif dtype in (torch.bfloat16, torch.float16):
        gemms = (
            f"{str(dtype).removeprefix('torch.')} GEMMs on a copy of the state, fewer than "
            f"{SHADOW_MIN_ROWS} rows on the state itself"
        )
    elif dtype == torch.float32 and is_amd() and _has_onednn():
        gemms += f", of {ONEDNN_MIN_ROWS} rows and more by oneDNN"
        if spec.chunk < ONEDNN_MIN_ROWS:
            gemms += f" (a chunk has {spec.chunk})"
    if writes_blocks(dtype):
        gemms += "; writes in blocks by oneDNN's kernel, added in fp32"
    state = str(state_dtype(dtype)).removeprefix("torch.float")
    return f"cpu: chunk scan in state form, fp{state} state, one opaque op per site; {gemms}"


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())
