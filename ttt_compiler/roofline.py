"""The roofline plan: what fast weights are predicted to cost, per model, length and device.

Everything is computed from shapes and from :mod:`ttt_compiler.codegen.devices`; nothing is run, and no GPU
was used to fit it. May be changed here: what is tabulated. The text is made by
:mod:`ttt_compiler.roofline_text`, counts by :mod:`ttt_compiler.model_cost`; published measurements are in
:mod:`ttt_compiler.published`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttt_compiler.architectures.presets import PRESETS
from ttt_compiler.codegen import forms
from ttt_compiler.codegen.cost_model import rank_scan_configs
from ttt_compiler.codegen.devices import DEVICES, H100, Device
from ttt_compiler.codegen.forms import ScanShape
from ttt_compiler.codegen.kernels.tiles import RUNNING
from ttt_compiler.codegen.phases import cost_of
from ttt_compiler.config import TTTConfig
from ttt_compiler.errors import ConfigError
from ttt_compiler.model_cost import Added, decode, named, ours, prefill, training
from ttt_compiler.planned import Planned, planned_model
from ttt_compiler.published import STUDIES, Compared, Study, compare

CONTEXTS = (8192, 32768, 131072, 262144)
# Rows of the second decode column: one sequence reads either matrix once, a batch shares only W0.
DECODE_BATCH = 16
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Row:
    """One model at one length on one device.

    Attributes:
        model: name.
        tokens: length of the prompt, of the context, of the training sequence.
        device: name.
        prefill: of a prompt.
        decode: of one token of one sequence.
        decode_batch: of one token each of ``DECODE_BATCH`` sequences.
        training: of a forward and backward.
        kv_bytes: keys and values of one sequence.
        state_bytes: fast weights of one sequence.
    """

    model: str
    tokens: int
    device: str
    prefill: Added
    decode: Added
    decode_batch: Added
    training: Added
    kv_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Sweep:
    """One site's scan by every form, in units of the static projection's time.

    Attributes:
        model: whose site.
        chunk: C.
        ratios: (form, time over the static projection's, binding limit, tiles or span), fastest first.
    """

    model: str
    chunk: int
    ratios: tuple[tuple[str, float, str, str], ...]


@dataclass(frozen=True)
class Roofline:
    """The plan.

    Attributes:
        config: layers and chunk of all rows.
        rows: by device, model, length.
        sweeps: forms against chunk length, on an H100 at 32k tokens.
        studies: published measurements beside predictions.
        devices: what was assumed of each device.
        decode_batch: sequences of the second decode column.
    """

    config: TTTConfig
    rows: tuple[Row, ...]
    sweeps: tuple[Sweep, ...]
    studies: tuple[tuple[Study, tuple[Compared, ...]], ...]
    devices: tuple[Device, ...]
    decode_batch: int = DECODE_BATCH

    def __str__(self) -> str:
        from ttt_compiler.roofline_text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; seconds, bytes, percent."""
        plain = ("model", "tokens", "device", "kv_bytes", "state_bytes")
        costs = ("prefill", "decode", "decode_batch", "training")
        rows = [
            {
                **{name: getattr(row, name) for name in plain},
                **{name: _flat(getattr(row, name)) for name in costs},
            }
            for row in self.rows
        ]
        studies = [
            {
                "source": study.source,
                "model": study.model,
                "device": study.device.name,
                "rows": [
                    {
                        **dataclasses.asdict(row),
                        "measured_change_percent": row.measured.change,
                        "predicted_change_percent": dict(row.predicted_changes),
                        "base_reached": row.base_reached,
                        "added_reached": row.added_reached,
                    }
                    for row in rows
                ],
            }
            for study, rows in self.studies
        ]
        return {
            "config": self.config.to_dict(),
            "decode_batch": self.decode_batch,
            "rows": rows,
            "sweeps": [dataclasses.asdict(sweep) for sweep in self.sweeps],
            "studies": studies,
        }


def roofline(
    models: Sequence[str] = tuple(PRESETS),
    devices: Sequence[Device] = DEVICES,
    config: TTTConfig | None = None,
    *,
    contexts: Sequence[int] = CONTEXTS,
) -> Roofline:
    """Predict every model at every length on every device.

    Args:
        models: names that :func:`ttt_compiler.pretrained.load_config` knows; published ones need no network.
        devices: see :func:`ttt_compiler.codegen.devices.device_named`.
        config: which layers, which chunk length; default ``TTTConfig()``.
        contexts: lengths in tokens.

    Raises:
        ConfigError: a length is below 1, or a model's name is unknown.
    """
    if any(tokens < 1 for tokens in contexts):
        raise ConfigError(f"contexts={list(contexts)} must all be at least 1")
    config = TTTConfig() if config is None else config
    planned = [planned_model(name, config) for name in models]
    rows = tuple(_row(one, tokens, device) for device in devices for one in planned for tokens in contexts)
    sweeps = tuple(s for one in planned for s in sweep(one, H100))
    studies = tuple((study, compare(study)) for study in STUDIES)
    return Roofline(config, rows, sweeps, studies, tuple(devices))


def sweep(planned: Planned, device: Device, *, tokens: int = 32768) -> tuple[Sweep, ...]:
    """Every form of the first site's scan against the chunk length, the best of each form."""
    site, found = planned.sites[0], []
    for chunk in CHUNKS:
        shape = ScanShape(tokens, site.d_model, site.d_ff, chunk, 1, planned.shape.dtype, final=True)
        base = cost_of(forms.static(shape, device), device).seconds
        best: dict[str, tuple[str, float, str, str]] = {}
        choices = [ours(shape, device, RUNNING), *rank_scan_configs(shape, device, ())]
        for choice in choices:
            label = named(choice).partition(" ")[2]
            best.setdefault(choice.form, (choice.form, choice.cost.seconds / base, choice.cost.limit, label))
        stacked = cost_of(forms.stacked_cumsum(shape, device), device)
        best["stacked_cumsum"] = ("stacked_cumsum", stacked.seconds / base, stacked.limit, "")
        found.append(Sweep(planned.shape.name, chunk, tuple(sorted(best.values(), key=lambda x: x[1]))))
    return tuple(found)


def _row(planned: Planned, tokens: int, device: Device) -> Row:
    shape, sites = planned.shape, planned.sites
    return Row(
        model=shape.name,
        tokens=tokens,
        device=device.name,
        prefill=prefill(shape, sites, tokens, device),
        decode=decode(shape, sites, tokens, device),
        decode_batch=decode(shape, sites, tokens, device, batch=DECODE_BATCH),
        training=training(shape, sites, tokens, device),
        kv_bytes=shape.cached(tokens),
        state_bytes=planned.state_bytes,
    )


def _flat(added: Added) -> dict[str, Any]:
    return {
        "base_seconds": added.base.seconds,
        "base_limit": added.base.limit,
        "added_seconds": added.seconds,
        "overhead_percent": added.percent,
        "stacked_overhead_percent": added.stacked_percent,
        "form": added.form,
        "workspace_bytes": added.workspace,
        "stacked_bytes": added.stacks,
    }
