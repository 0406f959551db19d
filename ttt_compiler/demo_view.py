"""How the demo shows what it found: text on the terminal, one plot, one JSON file.

May be changed here: wording and layout. Nothing is claimed that was not measured in this run: one
document and one adapter say nothing about others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ttt_compiler.demo import RANDOM_DRIFT, DemoOptions, DemoResult

_PLOT_BIN = 256
_SMALL = 5e-5


class View:
    """Prints the demo's steps and its result.

    Args:
        console: where to; a progress bar is drawn only on a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """One line about the step that begins."""
        self._print(f"- {text}")

    def track(self, items: Iterable[int], what: str) -> Iterable[int]:
        """The items, with a progress bar on a terminal."""
        blocks = list(items)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            yield from progress.track(blocks, description=what)

    def show(self, options: DemoOptions, result: DemoResult) -> None:
        """Everything that was found."""
        tokens = len(result.static_bits) + 1
        self._print("")
        self._print(str(result.report))
        self._print("")
        self._print(
            f"{options.document or 'the language reference of Python'}: {tokens:,} tokens, read "
            f"in blocks of {options.block} through a window of {options.window} ({options.sink} "
            "of them sink tokens)"
        )
        self.console.print(_bits_table(result))
        self._print(verdict(options, result))
        if any(any(values) for values in result.drift.values()):
            self.console.print(_drift_table(result))
        self._print("Training an adapter is not part of this version.")
        self._print("")
        self._print("the session continues the document (greedily, not part of the comparison above):")
        self._print(f"  {result.text!r}")
        cached, cache, fast = (
            result.session[k] for k in ("cached_tokens", "cache_bytes", "fast_weight_bytes")
        )
        self._print(
            f"saved to {result.session_file} ({_mebibytes(result.session_file_bytes)}: keys and "
            f"values of {cached} tokens {_mebibytes(cache)}, fast weights {_mebibytes(fast)}); "
            "restored, it continued with the same tokens and the same logits, bit for bit"
        )
        self._print("")
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
        self._print(f"wall time: {times} ({torch.get_num_threads()} threads, torch {torch.__version__})")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def verdict(options: DemoOptions, result: DemoResult) -> str:
    """What the two columns say, and nothing more."""
    if result.equal:
        lines = [
            "Both columns are equal: every logit of the two passes is the same, bit for bit.",
        ]
        if options.adapter is None:
            lines.append(
                "That is as it must be: the adapter is untrained (its convolution is zero), so "
                "nothing is written into the weights. Use --adapter DIR for a trained one, or "
                "--random-adapter to see the state move."
            )
        else:
            lines.append("This adapter wrote nothing that changes an output.")
        return "\n".join(lines)
    lines = [
        f"The fast weights changed the outputs: the largest effect on a logit is "
        f"{result.largest_effect:.4g}, at position {result.largest_effect_at}."
    ]
    if options.random_adapter:
        lines.append(
            f"The adapter is random (seed {options.seed}), scaled so that the first chunk moves "
            f"each W by about {RANDOM_DRIFT:g} of its norm. It shows that state moves and what it "
            "costs; it is not expected to help."
        )
    elif options.adapter is None:
        lines.append("Nothing was written, so they should be equal bit for bit. Please report this as a bug.")
    else:
        lines.append("One document and one run: this says nothing about other documents.")
    return "\n".join(lines)


def write_files(options: DemoOptions, result: DemoResult) -> list[Path]:
    """The plot and the numbers; returns their paths."""
    options.out.mkdir(parents=True, exist_ok=True)
    numbers = options.out / "demo.json"
    numbers.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    plot = options.out / "bits-per-token.png"
    _plot(options, result, plot)
    return [plot, numbers]


def _bits_table(result: DemoResult) -> Table:
    table = Table("position", title="bits per token", title_justify="left", box=SIMPLE_HEAD)
    for name in ("static", "fast weights", "difference"):
        table.add_column(name, justify="right")
    for start, end, static, fast in result.buckets():
        change = fast - static
        difference = "0" if static == fast else f"{change:+.4f}"
        if 0 < abs(change) < _SMALL:
            difference = f"{change:+.0e}"
        table.add_row(f"{_short(start)}-{_short(end)}", f"{static:.4f}", f"{fast:.4f}", difference)
    return table


def _drift_table(result: DemoResult) -> Table:
    """Norm of what was written relative to W0, after 1, 2, 4, ... chunks and the last one."""
    last_block = {chunks: i for i, chunks in enumerate(result.chunks) if chunks}
    shown = [c for c in last_block if c & (c - 1) == 0 or c == max(last_block)]
    table = Table(
        title="|W - W0| / |W0| after so many chunks (every chunk: demo.json)",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("weight", overflow="fold")
    for count in shown:
        table.add_column(str(count), justify="right", no_wrap=True)
    for key, values in result.drift.items():
        moved = (f"{values[last_block[count]]:.1e}" for count in shown)
        table.add_row(key.removesuffix(".weight"), *moved)
    return table


def _plot(options: DemoOptions, result: DemoResult, path: Path) -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    moved = any(any(values) for values in result.drift.values())
    figure = Figure(figsize=(8, 7 if moved else 4), layout="constrained")
    axes = figure.subplots(2 if moved else 1, 1, squeeze=False, sharex=True)[:, 0]
    width = min(_PLOT_BIN, max(1, len(result.static_bits) // 8))
    for bits, name, style in (
        (result.static_bits, "static", {"linewidth": 3.0, "alpha": 0.5}),
        (result.fast_bits, "fast weights", {"linewidth": 1.2, "linestyle": "--"}),
    ):
        starts = range(0, len(bits) - width + 1, width)
        means = [sum(bits[i : i + width]) / width for i in starts]
        axes[0].plot([i + width / 2 for i in starts], means, label=name, **style)
    axes[0].set_ylabel(f"bits per token (mean of {width})")
    axes[0].legend()
    axes[0].set_title(
        f"{result.report.model}, window of {options.window} tokens" + _plot_note(options, result)
    )
    if moved:
        ends = [(i + 1) * options.block for i in range(len(result.chunks))]
        for key, values in result.drift.items():
            axes[1].plot(ends, values, marker=".", label=key.removesuffix(".weight"))
        axes[1].set_ylabel("|W - W0| / |W0|")
        axes[1].legend(fontsize="small")
    axes[-1].set_xlabel("position in the document")
    figure.savefig(path, dpi=120)


def _plot_note(options: DemoOptions, result: DemoResult) -> str:
    if options.random_adapter:
        return "\nrandom adapter: shows state moving, not an improvement"
    return "\nuntrained adapter: both are equal" if options.adapter is None and result.equal else ""


def _short(position: int) -> str:
    return f"{position // 1024}k" if position >= 1024 and position % 1024 == 0 else str(position)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
