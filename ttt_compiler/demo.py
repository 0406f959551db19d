"""The main job on real input: read a document that is longer than the model's window.

May be changed here: the steps, and the numbers that are kept (:class:`DemoResult`). How they are
shown belongs to ``demo_view.py``, how a document is read to ``windowed.py``.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt_compiler.config import Layers, TTTConfig
from ttt_compiler.conversion import convert
from ttt_compiler.errors import ConfigError, SnapshotError, TTTError
from ttt_compiler.pretrained import load_pretrained
from ttt_compiler.report import Report, explain
from ttt_compiler.runtime.root import require_root
from ttt_compiler.runtime.session import Session
from ttt_compiler.windowed import Window, WindowedReader

# How far the first chunk moves W under a random adapter: visible, and far from breaking the model.
RANDOM_DRIFT = 2e-3
# Before that scale is known: too small to blow up any model, large enough to be measured in fp32.
_RANDOM_CONV = 1e-3
Track = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class DemoOptions:
    """What the demo reads, and how.

    Attributes:
        model: see :func:`load_pretrained`.
        document: a UTF-8 text file; None for the language reference that ships with Python.
        out: folder for the plot, the numbers and the saved session.
        tokens: how much of the document is read; whole blocks only.
        window: tokens that attention sees at most.
        block: tokens per call.
        sink: first tokens of the document that stay in the window.
        continuation: tokens to generate at the end.
        layers: see TTTConfig; so are chunk_size, lr and target. An adapter brings its own.
        adapter: folder of a trained adapter.
        random_adapter: a random one, scaled so that a chunk moves W by about ``RANDOM_DRIFT``.
        seed: of the random adapter.
    """

    model: str | None = None
    document: Path | None = None
    out: Path = Path("demo-output")
    tokens: int = 8192
    window: int = 1024
    block: int = 512
    sink: int = 4
    continuation: int = 32
    layers: Layers = "every:6"
    chunk_size: int = 512
    lr: float = 0.3
    target: str = "hidden_states"
    adapter: Path | None = None
    random_adapter: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.to_config()
        if self.adapter is not None and self.random_adapter:
            raise ConfigError("--adapter and --random-adapter exclude each other")
        if self.block < 1 or self.sink < 0 or self.window < self.block + self.sink + 1:
            raise ConfigError(
                f"window={self.window} must hold a block ({self.block}), the sink ({self.sink}) "
                "and one token more"
            )
        if self.tokens < self.block or self.tokens % self.block:
            raise ConfigError(f"tokens={self.tokens} must be a positive multiple of block={self.block}")
        if self.continuation < 1:
            raise ConfigError(f"continuation={self.continuation} must be at least 1")
        if self.random_adapter and self.tokens < self.chunk_size:
            raise ConfigError(
                f"tokens={self.tokens} is less than one chunk ({self.chunk_size}), so nothing "
                "would be written"
            )

    def to_window(self) -> Window:
        """The window that these options ask for."""
        return Window(keep=self.window - self.block - self.sink, sink=self.sink)

    def to_config(self) -> TTTConfig:
        """The conversion that these options ask for."""
        return TTTConfig(layers=self.layers, chunk_size=self.chunk_size, lr=self.lr, target=self.target)


@dataclass
class DemoResult:
    """What the demo found.

    Attributes:
        report: of :func:`explain`.
        static_bits: bits of every token but the first, by the base model.
        fast_bits: the same with fast weights.
        equal: whether all logits of both passes are equal bit for bit.
        largest_effect: largest difference of two logits.
        largest_effect_at: position of that logit.
        drift: ``||W - W0|| / ||W0||`` per site, one entry per block of the document.
        chunks: chunks written per block of the document.
        seconds: per step.
        text: what the session continues the document with.
        session: what the saved session holds, see :meth:`Session.describe`.
        session_file: where it was saved.
        session_file_bytes: its size.
        restored: whether the loaded session continued with the same tokens and logits.
    """

    report: Report
    static_bits: list[float] = field(default_factory=list)
    fast_bits: list[float] = field(default_factory=list)
    equal: bool = True
    largest_effect: float = 0.0
    largest_effect_at: int = 0
    drift: dict[str, list[float]] = field(default_factory=dict)
    chunks: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    text: str = ""
    session: dict[str, Any] = field(default_factory=dict)
    session_file: str = ""
    session_file_bytes: int = 0
    restored: bool = False

    def buckets(self) -> list[tuple[int, int, float, float]]:
        """(first position, end, static, fast) with mean bits per token: 0-512, 512-1k, 1-2k, ..."""
        edges, end = [0, 512], len(self.static_bits) + 1
        while edges[-1] < end:
            edges.append(edges[-1] * 2)
        # The first token of a document is given, not predicted.
        spans = [(max(a, 1), min(b, end)) for a, b in itertools.pairwise(edges) if a < end]
        return [
            (
                a - (a == 1),
                b,
                _mean(self.static_bits[a - 1 : b - 1]),
                _mean(self.fast_bits[a - 1 : b - 1]),
            )
            for a, b in spans
            if b > a
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        data = {k: v for k, v in self.__dict__.items() if k != "report"}
        return {**data, "report": self.report.to_dict(), "buckets": self.buckets()}


def run_demo(options: DemoOptions, *, say: Callable[[str], None], track: Track) -> DemoResult:
    """Run all steps.

    Args:
        options: what to do.
        say: prints one line about the step that begins.
        track: wraps the blocks of the document, for a progress bar.

    Raises:
        TTTError: with what to change; nothing but files in ``options.out`` is left behind.
    """
    text = read_document(options.document)
    say("loading the model")
    (model, tokenizer), load_seconds = _timed(lambda: load_pretrained(options.model))
    ids = _tokenize(tokenizer, text, options.tokens)
    say("converting")
    _, convert_seconds = _timed(lambda: prepare(model, options))
    report, explain_seconds = _timed(lambda: explain(model))
    say("compiling: the first call of each shape takes minutes, later runs find the result on disk")
    _, compile_seconds = _timed(lambda: _warm_up(model, ids, options, track))
    result = DemoResult(report)
    result.seconds = {
        "load": load_seconds,
        "convert": convert_seconds,
        "explain": explain_seconds,
        "compile": compile_seconds,
    }
    say(f"reading {len(ids)} tokens with static and with fast weights, block by block")
    fast = _read(model, ids, options, result, track)
    assert fast.session is not None
    assert fast.last is not None
    first = int(fast.last.argmax())

    say("saving, continuing, restoring and continuing again")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "session.ttt"
    result.session = fast.session.describe()
    fast.session.save(path)
    result.session_file, result.session_file_bytes = str(path), path.stat().st_size
    before = fast.seconds
    tokens, logits = fast.generate(first, options.continuation)
    result.seconds["generate"] = fast.seconds - before
    again = WindowedReader(model, options.to_window(), Session.load(model, path))
    restored_tokens, restored_logits = again.generate(first, options.continuation)
    result.restored = tokens == restored_tokens and torch.equal(logits, restored_logits)
    if not result.restored:
        raise SnapshotError(f"{path}: the restored session continued differently; please report this")
    result.text = tokenizer.decode(tokens)
    return result


def prepare(model: nn.Module, options: DemoOptions) -> None:
    """Convert, load the adapter that was asked for, compile."""
    if options.adapter is not None:
        from ttt_compiler.adapter import load_adapter

        load_adapter(model, options.adapter)
    else:
        convert(model, options.to_config())
    if options.random_adapter:
        randomize(model, options.seed)
    model.compile(backend="inplace_ttt")


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Fill conv and P of every site with small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for conv, proj in _adapter_parameters(model).values():
        conv.copy_(torch.randn(conv.shape, generator=generator) * _RANDOM_CONV)
        if proj is not None:
            proj.copy_(torch.randn(proj.shape, generator=generator) / math.sqrt(proj.shape[0]))


@torch.no_grad()
def _scale_to(model: nn.Module, session: Session, drift: float) -> None:
    """Scale every conv so that a chunk moves W by about ``drift``, going by ``session``."""
    written = session.state.chunks_written
    for key, moved in session.drift().items():
        if moved[0] > 0:
            _adapter_parameters(model)[key][0].mul_(drift * written[key][0] / moved[0])


def _adapter_parameters(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    root = require_root(model)[1]
    return {spec.key: root.parameters(spec) for spec in root.specs}


def _warm_up(model: nn.Module, ids: Tensor, options: DemoOptions, track: Track) -> None:
    """Make every call shape of the demo once, so that reading is timed without compiling."""
    static, fast = _readers(model, options)
    assert fast.session is not None
    until_full = options.block * (1 + math.ceil((options.window - options.block) / options.block))
    blocks = _blocks(ids[:until_full], options.block)
    calls = [(reader, block) for block in blocks for reader in (static, fast)]
    calls.append((fast, ids[:1]))
    for i in track(range(len(calls)), "compiling"):
        reader, block = calls[i]
        reader.feed(block)
    if options.random_adapter:
        for block in _blocks(ids, options.block):
            if fast.position >= options.chunk_size:
                break
            fast.feed(block)
        _scale_to(model, fast.session, RANDOM_DRIFT)


def _read(
    model: nn.Module, ids: Tensor, options: DemoOptions, result: DemoResult, track: Track
) -> WindowedReader:
    """Read the document with both models side by side, block by block."""
    static, fast = _readers(model, options)
    assert fast.session is not None
    for start in track(range(0, len(ids), options.block), "reading"):
        block = ids[start : start + options.block]
        base, logits = static.feed(block), fast.feed(block)
        if not torch.equal(base, logits):
            result.equal = False
            effect, at = (base - logits).abs().amax(-1).max(0)
            if float(effect) > result.largest_effect:
                result.largest_effect, result.largest_effect_at = float(effect), start + int(at)
        for key, moved in fast.session.drift().items():
            result.drift.setdefault(key, []).append(moved[0])
        result.chunks.append(max(rows[0] for rows in fast.session.state.chunks_written.values()))
    result.static_bits, result.fast_bits = list(static.bits), list(fast.bits)
    result.seconds |= {"read, static": static.seconds, "read, fast weights": fast.seconds}
    return fast


def _readers(model: nn.Module, options: DemoOptions) -> tuple[WindowedReader, WindowedReader]:
    """The document's two readers: by the base model, with fast weights."""
    window = options.to_window()
    return WindowedReader(model, window), WindowedReader(model, window, Session(model))


def _blocks(ids: Tensor, size: int) -> list[Tensor]:
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def read_document(path: Path | None) -> str:
    """A text file, or the language reference that ships with Python.

    Raises:
        TTTError: the file cannot be read as UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TTTError(f"{path}: cannot be read as UTF-8 text ({e})") from e


def _tokenize(tokenizer: Any, text: str, tokens: int) -> Tensor:
    ids = tokenizer(text, truncation=True, max_length=tokens, add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise TTTError(
            f"the document has {len(ids)} tokens, but {tokens} were asked for. Pass fewer "
            "--tokens, or a longer --document"
        )
    return torch.tensor(ids)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _timed(step: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    value = step()
    return value, time.perf_counter() - started
