"""Markdown of a roofline plan; ``docs/roofline.md`` is this text for the default plan.

May be changed here: how it reads. What is planned belongs to :mod:`ttt_compiler.roofline`. Every number comes
from the plan; sentences that state a relation are chosen by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ttt_compiler.model_cost import Added

if TYPE_CHECKING:
    from ttt_compiler.codegen.devices import Device
    from ttt_compiler.published import Compared, Study
    from ttt_compiler.roofline import Roofline, Row, Sweep

PAGE = "docs/roofline.md"
COMMAND = f"ttt-compiler bench --plan --markdown {PAGE}"
_FORMS = ("on_chip", "two_gemm", "dual", "stacked_cumsum")
_HEAD = f"""# Roofline plan

Written by `{COMMAND}`.
**Predicted, not measured**: shapes, closed-form counts and the device facts below. No GPU was used. A test
holds this page to what the code prints.
"""
_READING = """## How to read it

- *static* is the base model, compiled: every weight matrix, attention over the whole context, keys and
  values, pointwise traffic. Decode is one token per sequence, launched as one recorded graph. Training is
  forward and backward, without recomputation and optimiser.
- *ours* is the time that fast weights add, in percent of static: convolution, P, and the scans as the package
  runs them. A prefill keeps the state, in fp32: that is always our kernel (`on_chip`), as is a call with
  documents. A training forward takes the fastest of `on_chip`, `two_gemm` and `dual`, its gradients one of
  the first two. Where `two_gemm` is far below `on_chip` in the table by chunk length, a running sequence
  would gain from it: that is not built.
- *stacked* is the official training form: all chunks' weights in memory, summed in bf16. It leaves no state
  to go on from, so as a prefill it stands here for comparison alone.
- *form*: `on_chip` is our kernel (a tile of W stays in registers for the whole scan; BM x BD x BF, S groups),
  `two_gemm` an apply and an accumulate GEMM per chunk by the vendor's library, `dual` attention form inside
  of spans with one write between them.
- *KV* and *state* are of one sequence. *extra* is what training holds beside the static model: what is kept
  until the backward in all sites, and the largest workspace.
"""


def render(plan: Roofline) -> str:
    """The whole page."""
    layers, chunk = plan.config.layers, plan.config.chunk_size
    parts = [
        _HEAD,
        f"Fast weights in layers `{layers}`, C = {chunk:,}, bf16, P {'on' if plan.config.proj else 'off'}.\n",
        _READING,
        *_devices(plan.devices),
        *_tables(plan),
        *_sweeps(plan.sweeps),
        *_studies(plan.studies),
    ]
    return "\n".join(parts).rstrip() + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _devices(devices: Sequence[Device]) -> list[str]:
    head = (
        "device",
        "bf16 TFLOP/s",
        "memory TB/s",
        "cache MiB",
        "SMs",
        "GEMM",
        "our scan",
        "attention",
        "memory",
        "cache",
    )
    rows, reasons = [], []
    for d in devices:
        fractions = (d.gemm, d.scan, d.attention, d.hbm_part, d.l2_part)
        rows.append(
            (
                d.name,
                f"{d.peak(torch.bfloat16) / 1e12:,.0f}",
                f"{d.hbm / 1e12:.2f}",
                f"{d.l2 / 2**20:,.0f}",
                str(d.sms),
                *(f"{100 * f.value:.0f} %" for f in fractions),
            )
        )
        reasons.append(f"- {d.name}: {d.sources}.")
        reasons += [
            f"  - {name} {100 * f.value:.0f} %: {f.reason}."
            for name, f in zip(head[5:], fractions, strict=True)
        ]
    return [
        "## Devices\n",
        "Percentages are the part of each peak that is taken to be reached, with the reason below.\n",
        table(head, rows),
        "<details><summary>sources and reasons</summary>\n",
        "\n".join(reasons),
        "\nLetters: the list in `ttt_compiler/codegen/devices.py`.\n\n</details>\n",
    ]


def _tables(plan: Roofline) -> list[str]:
    parts = ["## Overheads\n"]
    seen: dict[tuple[tuple[str, ...], ...], str] = {}
    for device in plan.devices:
        rows = tuple(_cells(row) for row in plan.rows if row.device == device.name)
        parts.append(f"### {device.name}\n")
        if rows in seen:
            parts.append(f"Every number is the {seen[rows]}'s, above.\n")
            continue
        seen[rows] = device.name
        head = [
            *("model", "tokens", "prefill static", "ours", "form", "stacked", "decode B=1 static", "ours"),
            *(f"decode B={plan.decode_batch} static", "ours", "form", "training static", "ours", "stacked"),
            *("KV GiB", "state GiB", "extra ours GiB", "extra stacked GiB"),
        ]
        parts.append(table(head, rows))
    return parts


def _cells(row: Row) -> tuple[str, ...]:
    p, d, b, t = row.prefill, row.decode, row.decode_batch, row.training
    return (
        row.model,
        f"{row.tokens // 1024}k" if row.tokens % 1024 == 0 else f"{row.tokens:,}",
        _time(p.base.seconds),
        _percent(p.percent),
        p.form,
        _stacked(p),
        _time(d.base.seconds),
        _percent(d.percent),
        _time(b.base.seconds),
        _percent(b.percent),
        b.form,
        _time(t.base.seconds),
        _percent(t.percent),
        _stacked(t),
        _gib(row.kv_bytes),
        _gib(row.state_bytes),
        _gib(t.workspace),
        _gib(t.stacks or 0),
    )


def _sweeps(sweeps: Sequence[Sweep]) -> list[str]:
    rows = []
    for sweep in sweeps:
        ratios = {
            form: (ratio, f"{ratio:.2f} {limit} {label}".rstrip())
            for form, ratio, limit, label in sweep.ratios
        }
        cells = []
        for form in _FORMS:
            _, text = ratios.get(form, (0.0, "as two_gemm"))
            cells.append(text)
        rows.append((sweep.model, f"{sweep.chunk:,}", *cells))
    return [
        "## Which form, by chunk length\n",
        "One site's forward scan over 32k tokens on an H100 with the state kept, as a multiple of the\n"
        "static projection's time, and what binds: `on_chip` as a running sequence runs it. `dual` with its\n"
        "best span; the stacked form keeps no state.\n",
        table(("model", "C", *_FORMS), rows),
    ]


def _studies(studies: Sequence[tuple[Study, tuple[Compared, ...]]]) -> list[str]:
    parts = [
        "## Published measurements of prefill\n",
        "Measured columns are published, for the official implementation at batch 1. Predicted columns are\n"
        "that inference loop as it is written: two GEMMs per chunk, state in bf16. *Reaches* is the\n"
        "predicted time over the measured one.\n",
    ]
    for study, rows in studies:
        title = f"### {study.model} on one {study.device.name}\n"
        stated = "" if study.stated else " C is not stated, so several are predicted."
        parts += [title, f"{study.source}. Layers `{study.layers}`.{stated}\n", _compared(study, rows)]
        parts.append(_explanation(rows) if not study.stated else _spread(rows))
    parts.append(_together([row for _, rows in studies for row in rows]))
    return parts


def _compared(study: Study, rows: Sequence[Compared]) -> str:
    head = [
        *("attention", "tokens", "static k tok/s", "with TTT", "change", "added us/token"),
        "static predicted k tok/s",
        *(f"change predicted, C={chunk:,}" for chunk in study.chunks),
        *(
            f"added us/token predicted, C={study.chunks[0]:,}",
            "added FLOPs",
            "static reaches",
            "added reaches",
        ),
    ]
    cells = []
    for row in rows:
        m = row.measured
        cells.append(
            (
                "full" if m.window is None else f"window {m.window:,}",
                _tokens(row),
                f"{m.base:.2f}",
                f"{m.fast:.2f}",
                _percent(m.change),
                f"{m.added * 1e6:.2f}",
                f"{1e-3 / row.base:.1f}",
                *(_percent(change) for _, change in row.predicted_changes),
                f"{row.added[0][1] * 1e6:.2f}",
                _percent(row.added_flops),
                f"{100 * row.base_reached:.0f} %",
                f"{100 * row.added_reached:.0f} %",
            )
        )
    return table(head, cells)


def _explanation(rows: Sequence[Compared]) -> str:
    """What agrees, what does not, and what cannot be known, in numbers of the rows."""
    full = [row for row in rows if row.measured.window is None]
    window = next(row for row in rows if row.measured.window is not None)
    first, last = full[0], full[-1]
    base = _range((100 * row.base_reached for row in rows), ".0f")
    added = _range((100 * row.added_reached for row in rows), ".0f")
    factors = _range((row.measured.change / row.predicted_changes[0][1] for row in rows), ".1f")
    measured = _range((row.measured.added * 1e6 for row in rows), ".1f")
    slack = 200 * 0.005 / last.measured.base
    return f"""**What agrees.** The added work does not depend on the context, so its share falls as attention
grows. With full attention: measured {_change(first)} at {_tokens(first)} and {_change(last)} at
{_tokens(last)}; predicted {_predicted(first)} and {_predicted(last)}. With a window both are level:
{_change(window)} measured, {_predicted(window)} predicted.

**What does not.** Measured changes are {factors} times the predicted ones. Both sides of the ratio run far
from the roofline: the static model reaches {base} % of its predicted speed, the added work {added} % of its
own. Were both slowed alike, the changes would be equal; the added work is slowed more. Per token
{measured} us were added where products and bytes explain {1e6 * first.added[0][1]:.1f}.

**What cannot be known from outside.** FLOPs and bytes do not explain the rest. The loop is eager, a chunk
waits for the one before, convolution and transposes are kernels of their own; the chunk of that run and the
dtype of its writes are not published. The columns for shorter chunks say how much a short chunk alone would
explain. At {_tokens(last)} the throughputs have two decimals, so the change there is known to
{slack:.1f} points at best, less for being read off a figure.
"""


def _spread(rows: Sequence[Compared]) -> str:
    """How far measurements of the same added work lie apart within one study."""
    added = [row.measured.added * row.measured.tokens for row in rows]
    twice = [
        (row, sorted(a for a, other in zip(added, rows, strict=True) if _tokens(other) == _tokens(row)))
        for row in rows
        if [_tokens(other) for other in rows].count(_tokens(row)) > 1
    ]
    row, (least, most) = twice[0]
    reached = _range((100 * row.base_reached for row in rows), ".0f")
    return f"""The static model reaches {reached} % of its predicted speed. At {_tokens(row)} the same added
work took {1e3 * least:.0f} ms in one run and {1e3 * most:.0f} ms in the other, where
{1e3 * row.added[0][1] * row.measured.tokens:.0f} ms are predicted: what is added is a small difference of two
long runs, and the report gives no spread.
"""


def _together(rows: Sequence[Compared]) -> str:
    """What all studies say of the model."""
    factors = _range((row.measured.change / row.predicted_changes[0][1] for row in rows), ".1f")
    reached = _range((100 * row.base_reached for row in rows), ".0f")
    return f"""### What it means here

Over all rows the measured change is {factors} times the predicted one, and the static model's measured
speed {reached} % of the predicted one. The prediction is what a compiled implementation can approach, not
what those implementations reach; what ours reached on one GPU is in [gpu.md](gpu.md).
"""


def _change(row: Compared) -> str:
    return _percent(row.measured.change)


def _predicted(row: Compared) -> str:
    return _percent(row.predicted_changes[0][1])


def _tokens(row: Compared) -> str:
    return f"{row.measured.tokens // 1024}k"


def _range(values: Iterable[float], digits: str) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:{digits}} to {ordered[-1]:{digits}}"


def _time(seconds: float) -> str:
    if seconds < 1e-1:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _percent(value: float) -> str:
    return f"{value:+.1f} %"


def _stacked(added: Added) -> str:
    return "" if added.stacked_percent is None else _percent(added.stacked_percent)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}" if nbytes < 10 * 2**30 else f"{nbytes / 2**30:.0f}"
