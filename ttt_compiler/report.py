"""``explain``: what was found in a model, what is or would become a fast weight, and its cost.

It never raises: what goes wrong becomes a line of the report. May be changed here: what is
reported. Detection and rules belong to ``discover.py`` and ``eligibility.py``, the plain text to
``report_text.py``, the page with pictures to ``report_html.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt_compiler import conversion
from ttt_compiler.codegen.cost_model import (
    OVERHEAD_RULE,
    linear_parameters,
    lowering_name,
    overhead_percent,
)
from ttt_compiler.codegen.devices import H100, Device, device_of
from ttt_compiler.config import TTTConfig
from ttt_compiler.discover import Discovery, FoundMLP, Inputs, discover
from ttt_compiler.discovery.choose_layers import block_indices, choose_layers
from ttt_compiler.eligibility import candidates_of, check_sites, why_not
from ttt_compiler.errors import NoMLPFoundError
from ttt_compiler.model_cost import ModelShape, Sites, decode, prefill, training
from ttt_compiler.passes.dataflow import Dataflow
from ttt_compiler.report_text import mebibytes, table, wrapped
from ttt_compiler.runtime.root import Root, unwrap
from ttt_compiler.runtime.tables import bytes_per_sequence, has_room_to_spread
from ttt_compiler.spec import SiteSpec

LEFT_OUT = "left out by layers="
_TARGET_SOURCES = {"hidden_states": "the MLP's own input", "input_embed": "the token embeddings"}
# The length that overheads are predicted for.
PREDICTED_TOKENS = 32768
_NAMES_SHOWN = 3
_LINES_SHOWN = 6


@dataclass(frozen=True)
class Row:
    """One MLP.

    Attributes:
        weight: name of the down-projection's weight.
        block: index of its block.
        d_model: D. d_ff: F.
        activation: e.g. ``"silu"``; None when the model could not be captured.
        gated: whether two branches are multiplied; None when unknown.
        bias: whether the projection has a bias; None when unknown.
        chosen: whether it is (or would become) a fast weight.
        reason: why it is not; None when chosen.
        causal: whether its input is independent of later tokens; None when not probed.
        dataflow: what was matched, to be drawn; None when the model could not be captured.
    """

    weight: str
    block: int
    d_model: int
    d_ff: int
    activation: str | None
    gated: bool | None
    bias: bool | None
    chosen: bool
    reason: str | None
    causal: bool | None
    dataflow: Dataflow | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found; ``print`` it, or take ``to_dict()``.

    Attributes:
        model: class of the model.
        converted: whether it carries fast weights already.
        config: the configuration that decides, JSON-ready; None when it is not known.
        rows: every MLP, in graph order.
        target_source: in words, what the written values are computed from.
        parameters_added: scalars in all conv and P.
        state_bytes: bytes of one sequence's state.
        flops_overhead_percent: added FLOPs per written token; see ``cost_model.OVERHEAD_RULE``.
        lowering: in words, what runs the sites.
        predicted: in words, the time that they are predicted to add on a GPU; see ``docs/roofline.md``.
        rejected: (reason, names of contractions) of everything that is no MLP down-projection.
        problems: what went wrong, and why a conversion would fail.
    """

    model: str
    converted: bool = False
    config: dict[str, Any] | None = None
    rows: tuple[Row, ...] = ()
    target_source: str | None = None
    parameters_added: int = 0
    state_bytes: int = 0
    flops_overhead_percent: float = 0.0
    lowering: str | None = None
    predicted: str | None = None
    rejected: tuple[tuple[str, tuple[str, ...]], ...] = ()
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; equal dataflows are listed once, and rows say which is theirs."""
        data = dataclasses.asdict(dataclasses.replace(self, rows=()))
        flows = list(dict.fromkeys(row.dataflow for row in self.rows if row.dataflow is not None))
        places = {flow: place for place, flow in enumerate(flows)}
        data["rows"] = [
            {
                **dataclasses.asdict(dataclasses.replace(row, dataflow=None)),
                "dataflow": None if row.dataflow is None else places[row.dataflow],
            }
            for row in self.rows
        ]
        data["dataflows"] = [dataclasses.asdict(flow) for flow in flows]
        data["rejected"] = [{"reason": r, "contractions": list(names)} for r, names in self.rejected]
        data["problems"] = list(self.problems)
        return data

    @property
    def headline(self) -> str:
        """How many MLPs are (or would be) fast weights."""
        chosen = sum(row.chosen for row in self.rows)
        verb = "are fast weights" if self.converted else "would become fast weights"
        return f"{self.model}: {chosen} of {len(self.rows)} MLP down-projections {verb}"

    @property
    def costs(self) -> dict[str, str]:
        """What the fast weights cost, in words; empty when there are none."""
        if not any(row.chosen for row in self.rows):
            return {}
        costs = {
            "target source": str(self.target_source),
            "parameters added": f"{self.parameters_added:,}",
            "state per sequence": mebibytes(self.state_bytes),
            "FLOPs per written token": f"+{self.flops_overhead_percent:.1f} % {OVERHEAD_RULE}",
            "lowering": str(self.lowering),
        }
        if self.predicted is not None:
            costs["predicted"] = self.predicted
        return costs

    def to_html(self) -> str:
        """The report with its dataflow drawn, as one page that needs nothing else."""
        from ttt_compiler.report_html import render

        return render(self)

    def save_html(self, path: str | Path) -> Path:
        """Write :meth:`to_html` to a file and return its path.

        Raises:
            TTTError: the file cannot be written.
        """
        from ttt_compiler.report_html import save

        return save(self, path)

    def __str__(self) -> str:
        lines = [self.headline]
        if self.config is not None:
            options = "  ".join(f"{k}={v!r}" for k, v in self.config.items() if k != "version")
            lines += wrapped(options, "  ")
        if self.rows:
            lines += ["", *table(self.rows)]
        if self.costs:
            lines.append("")
            for name, value in self.costs.items():
                lines += wrapped(value, f"{name:<25}")
        if self.rejected:
            lines += ["", "weighted contractions that are no MLP down-projection:"]
            for reason, names in self.rejected:
                more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
                shown = f"{reason}: {', '.join(names[:_NAMES_SHOWN])}{more}"
                lines += wrapped(shown, f"{len(names):>5} x ")
        if self.problems:
            lines += ["", "problems:"]
            for problem in self.problems:
                lines += wrapped(problem, "  - ")
        return "\n".join(lines)


def explain(
    model: nn.Module, config: TTTConfig | None = None, *, example_inputs: Inputs | None = None
) -> Report:
    """What is (or would be) a fast weight in ``model``, why the rest is not, and what it costs.

    Args:
        model: converted or not, compiled or not; it is not changed.
        config: what would be converted, by default ``TTTConfig()``; a converted model has its own.
        example_inputs: ``(args, kwargs)`` of one call; models of transformers need none.

    Returns:
        A report. Never raises: see ``Report.problems``.
    """
    problems: list[str] = []
    report = Report(model=type(model).__name__)
    try:
        model = unwrap(model)
        report = Report(model=type(model).__name__)
        root = conversion.root_of(model)
        if root is None:
            report = _explain_unconverted(model, config or TTTConfig(), example_inputs, problems)
        else:
            if config is not None and config != root.config:
                problems.append(
                    "the model is converted already, so config= was ignored; see ttt.revert(model)"
                )
            report = _explain_converted(model, root, example_inputs, problems)
    except Exception as e:
        problems.append(_problem(e))
    return dataclasses.replace(report, problems=tuple(problems))


def _explain_unconverted(
    model: nn.Module, config: TTTConfig, inputs: Inputs | None, problems: list[str]
) -> Report:
    report = Report(
        model=type(model).__name__,
        config=_shown(config),
        target_source=_target_source(config),
    )
    try:
        conversion.check_model(model)
    except Exception as e:
        problems.append(_problem(e))
    try:
        found = discover(model, inputs)
    except Exception as e:
        problems.append(_problem(e))
        return report
    report = dataclasses.replace(report, rejected=_rejected(found))
    keys: tuple[str, ...] = ()
    try:
        check_sites(model, config, found)
    except Exception as e:
        problems.append(_problem(e))
    try:
        keys = tuple(m.weight for m in choose_layers(config, candidates_of(config, found)))
    except Exception as e:
        # check_sites has said the same unless it failed for another reason first.
        if _problem(e) not in problems and candidates_of(config, found):
            problems.append(_problem(e))
    reasons = {m.weight: _reason(model, config, m, found, keys) for m in found.mlps}
    rows = tuple(_row(m, reasons[m.weight]) for m in found.mlps)
    specs = [
        spec
        for m in found.mlps
        if reasons[m.weight] is None
        for spec in conversion.site_specs(config, m, found, model)
    ]
    return _with_costs(dataclasses.replace(report, rows=rows), model, specs, problems)


def _explain_converted(model: nn.Module, root: Root, inputs: Inputs | None, problems: list[str]) -> Report:
    report = Report(
        model=type(model).__name__,
        converted=True,
        config=root.config.to_dict(),
        target_source=_target_source(root.config),
    )
    sites = {spec.weight for spec in root.specs}
    try:
        with conversion.disabled(model):
            found = discover(model, inputs)
        keys = tuple(m.weight for m in found.mlps if any(p.weight in sites for p in m.places))
        reasons = {
            m.weight: None if m.weight in keys else _reason(model, root.config, m, found, keys)
            for m in found.mlps
        }
        rows = tuple(_row(m, reasons[m.weight]) for m in found.mlps)
        report = dataclasses.replace(report, rows=rows, rejected=_rejected(found))
    except Exception as e:
        problems.append(_problem(e))
        report = dataclasses.replace(report, rows=_rows_of_specs(root.specs))
    return _with_costs(report, model, root.specs, problems)


def _with_costs(report: Report, model: nn.Module, specs: Sequence[SiteSpec], problems: list[str]) -> Report:
    if not specs:
        return report
    try:
        weight = conversion.tensor_of(model, specs[0].weight)
        dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
        return dataclasses.replace(
            report,
            parameters_added=sum(s.parameters_added for s in specs),
            state_bytes=bytes_per_sequence(specs, dtype, spread=has_room_to_spread(weight.device, 0)),
            flops_overhead_percent=overhead_percent(specs, linear_parameters(model)),
            lowering=lowering_name(specs[0], weight.device, dtype),
            predicted=_predicted(model, specs, weight.device, dtype),
        )
    except Exception as e:
        problems.append(_problem(e))
        return report


def _predicted(
    model: nn.Module, specs: Sequence[SiteSpec], where: torch.device, dtype: torch.dtype
) -> str | None:
    """Overheads by the cost model, on the GPU at hand where it is known, else on an H100."""
    device: Device = H100
    if where.type == "cuda":
        device = device_of(torch.cuda.get_device_name(where)) or H100
    if dtype not in device.peaks:
        return None
    shape = ModelShape.of(model, dtype=dtype, mlp=(specs[0].d_model, specs[0].d_ff))
    sites, tokens = Sites.group(specs), PREDICTED_TOKENS
    parts = {
        "prefill": prefill(shape, sites, tokens, device),
        "decode": decode(shape, sites, tokens, device),
        "training": training(shape, sites, tokens, device),
    }
    added = ", ".join(f"{name} {cost.percent:+.1f} %" for name, cost in parts.items())
    attention = "" if shape.attention_width else "; attention is not known and not counted"
    return (
        f"{added} of the model's own time on one {device.name} in {str(dtype).removeprefix('torch.')} at "
        f"{tokens:,} tokens (roofline, not measured{attention})"
    )


def _shown(config: TTTConfig) -> dict[str, Any]:
    """The configuration, JSON-ready even when a function chooses the layers."""
    if not callable(config.layers):
        return config.to_dict()
    name = getattr(config.layers, "__name__", type(config.layers).__name__)
    return {**dataclasses.replace(config, layers="all").to_dict(), "layers": f"<function {name}>"}


def _reason(
    model: nn.Module, config: TTTConfig, mlp: FoundMLP, found: Discovery, keys: Sequence[str]
) -> str | None:
    """Why an MLP stays as it is; what the layer choice leaves out may be impossible as well."""
    reason = why_not(model, config, mlp, found)
    if reason is None and mlp.weight not in keys:
        reason = f"{LEFT_OUT}{config.layers!r}"
    return reason


def _row(mlp: FoundMLP, reason: str | None) -> Row:
    return Row(
        weight=mlp.weight,
        block=mlp.block,
        d_model=mlp.d_model,
        d_ff=mlp.d_ff,
        activation=mlp.activation,
        gated=mlp.gated,
        bias=mlp.bias,
        chosen=reason is None,
        reason=reason,
        causal=mlp.causal,
        dataflow=mlp.dataflow,
    )


def _rows_of_specs(specs: Sequence[SiteSpec]) -> tuple[Row, ...]:
    blocks = block_indices([s.key for s in specs])
    return tuple(
        Row(s.key, block, s.d_model, s.d_ff, None, None, None, True, None, None)
        for s, block in zip(specs, blocks, strict=True)
    )


def _rejected(found: Discovery) -> tuple[tuple[str, tuple[str, ...]], ...]:
    grouped: dict[str, list[str]] = {}
    for name, reason in found.rejections:
        grouped.setdefault(reason, []).append(name or "<unnamed>")
    return tuple((reason, tuple(names)) for reason, names in grouped.items())


def _target_source(config: TTTConfig) -> str:
    return f"{config.target} ({_TARGET_SOURCES[config.target]})"


def _problem(e: Exception) -> str:
    """An error as a few lines; the list of refused contractions is in the report already."""
    lines = str(e).splitlines() or [""]
    if isinstance(e, NoMLPFoundError):
        lines = [lines[0].removesuffix(" Refused:")]
    more = ["..."] if len(lines) > _LINES_SHOWN else []
    return "\n".join([f"{type(e).__name__}: {lines[0]}", *lines[1:_LINES_SHOWN], *more])
