"""What was to be reached, and what a run reached: ``python -m bench.goals FILE... [--markdown FILE]``.

A goal is a bound on one figure of the cases that it is about; the worst of them counts, and how many of the
suite's cases there are is said. Of a bound that is missed it is said whether the arithmetic alone, by the
fastest product of the same run, would miss it, too. A goal that no case of the files is about is not
measured. May be changed here: bounds, with the sentence of a README that quotes one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

from bench.figures import (
    Figure,
    Figured,
    along,
    extra_memory,
    gain,
    growth_with_chunks,
    host,
    longest,
    over,
    over_floor,
)
from bench.model import ModelShape
from bench.page import Block, command
from bench.planned import planned
from bench.results import (
    RIVALS,
    WHOLE_CHUNK,
    WITH_SHARE,
    WITH_V,
    WITH_V_AND_WRITE,
    Case,
    held_against,
    peaks,
)

TRAIN, LOOP = "official training form", "official inference loop"
MEDIUM = {"d": 1024, "f": 3072, "batch": 1}
DTYPES = ("float32", "bfloat16")
FLOOR = "floor"
FLOOR_OF_A_STEP = "the slower of its bytes and, where W0 is read, the static product"
MODELS = ("SmolLM2-135M", "Qwen3-0.6B")
PROMPT = "model prefill"
MET, IN_PART, MISSED, BEYOND, UNKNOWN = "yes", "yes, so far", "NO", "NO, NOR THE FLOOR", "NOT MEASURED"
HEAD = ("goal", "bound", "measured [quartiles]", "at the floor", "met", "cases", "worst case")


@dataclass(frozen=True)
class Goal:
    """``what`` is at most (or at least) ``bound`` in every case that ``about`` picks.

    Attributes:
        what: in words.
        bound: of the figure.
        figure: of a case; None where it has none.
        about: which cases.
        least: whether the bound is a lower one.
        against: a competitor that ours is to be faster than.
        base: of decode, what the figure is relative to.
    """

    what: str
    bound: float
    figure: Figured
    about: Callable[[Case], bool]
    least: bool = False
    against: str | None = None
    base: str | None = None

    def at_the_floor(self, case: Case, peak: float | None) -> float | None:
        """The figure of a form that does nothing but the algorithm's FLOPs, at the fastest product's rate.

        Of a training step, of which memory does not hold every matrix, that of a form that keeps as many as
        ours. Of a step of decode, that of its bytes or the static product and of its share of v or of the
        write; of a whole chunk of steps, that of all bytes, v and the write. Of a model's prompt, that of the
        static model with v and the writes at the fastest product's rate.
        """
        if case.kind == PROMPT:
            return 1 + extra if (extra := self._writing(case, peak)) else None
        if self.base:
            base = case.floor() if self.base == FLOOR else case.seconds(self.base)
            least, static = case.floor(), case.seconds("static")
            both = case.seconds(WITH_V) or case.seconds(WITH_SHARE)
            if both and static and least:
                # The static product is there in both, and is not read where every row has a matrix.
                least += both - static
            elif not (least := case.seconds(WITH_V_AND_WRITE)):
                return None
            return least / base if base else None
        floor, other = case.floor(peak), case.seconds(self.against or "")
        if case.kind == "training" and peak:
            floor = case.info.get("flops_in_memory", case.info.get("flops", 0)) / peak
        return other / floor if floor and other else None

    def _writing(self, case: Case, peak: float | None) -> float | None:
        """What a model's prompt must take beyond the static model, as a part of that."""
        static = case.seconds(self.against or "")
        sizes = {x.name: case.shape.get(x.name) for x in fields(ModelShape)}
        if not static or not peak or None in sizes.values():
            return None
        return ModelShape(**sizes).flops_of_writing() / peak / static

    def measured(self, cases: Sequence[Case]) -> list[tuple[Case, Figure]]:
        """Cases with their figures, the worst first."""
        found = [(c, f) for c in cases if self.about(c) and (f := self.figure(c))]
        return sorted(found, key=lambda pair: pair[1].value, reverse=not self.least)

    def intended(self) -> int:
        """How many cases of the suite it is about, whichever allocator it asks for."""
        environments = ({"allocator": "default"}, {"allocator": "tuned"})
        return sum(any(self.about(Case(c.name, c.info, e)) for e in environments) for c in planned())

    def met(self, value: float) -> bool:
        """Whether the figure is within the bound."""
        return value >= self.bound if self.least else value <= self.bound

    def verdict(self, value: float, limit: float | None) -> str:
        """Of a figure, and of what the floor would reach."""
        if self.met(value):
            return MET
        return MISSED if limit is None or self.met(limit) else BEYOND


def of(kind: str, *, tuned: bool | None = False, **sizes: object) -> Callable[[Case], bool]:
    """Cases of a kind with these sizes; by the default allocator, the tuned one, or (None) either."""

    def about(case: Case) -> bool:
        return (
            case.kind == kind
            and tuned in (None, case.tuned)
            and all(case.shape.get(name) == value for name, value in sizes.items())
        )

    return about


def faster(what: str, least: float, name: str, about: Callable[[Case], bool]) -> Goal:
    """Ours is at least ``least`` times as fast as a competitor."""
    return Goal(f"{what}: {name} / ours", least, gain(name), about, least=True, against=name)


def goals() -> Iterator[Goal]:
    """All of them: layers, whole models, training, decode."""
    yield from _layers()
    yield from _never_slower()
    yield from _models()
    yield from _training()
    yield from _decode()


def _layers() -> Iterator[Goal]:
    at: dict[str, object] = {**MEDIUM, "tokens": 4096}
    sizes: tuple[tuple[str, dict[str, object]], ...] = ((" C=512", {"chunk": 512}), (", every C", {}))
    for (which, chunks), dtype in itertools.product(sizes, DTYPES):
        for kind in ("forward", "prefill"):
            about = of(kind, dtype=dtype, **at, **chunks)
            yield Goal(f"{kind} {dtype}, T=4096{which}: / FLOP floor", 1.05, over_floor, about)
    for chunk, train, loop in ((512, 1.85, 1.38), (256, 2.5, 1.35)):
        about = of("forward", chunk=chunk, dtype="float32", **at)
        yield faster(f"forward fp32 C={chunk}", train, TRAIN, about)
        yield faster(f"forward fp32 C={chunk}", loop, LOOP, about)
    about = of("forward", tuned=True, chunk=512, dtype="float32", **at)
    yield faster("forward fp32 C=512, tuned allocator", 1.3, TRAIN, about)
    yield faster("forward fp32 C=512, tuned allocator", 1.25, LOOP, about)
    for chunk, loop in ((512, 1.38), (256, 1.35)):
        yield faster(f"prefill fp32 C={chunk}", loop, LOOP, of("prefill", chunk=chunk, dtype="float32", **at))


def _never_slower() -> Iterator[Goal]:
    """Than an official form, each by itself: a form that was not measured is not hidden behind another."""
    for tuned, allocator in ((False, "default"), (True, "tuned")):
        for kind, forms in (("forward", (TRAIN, LOOP)), ("prefill", (LOOP,)), ("training", (TRAIN,))):
            for name in (x for form in forms for x in (form, f"{form}, compiled")):
                what = f"{kind}, every shape, {allocator} allocator: ours / {name}"
                yield Goal(what, 1.0, over(name), of(kind, tuned=tuned))
    for name in (TRAIN, LOOP, f"{LOOP}, compiled"):
        what = f"growth, every point of a sweep: {held_against(name, RIVALS)} / {name}"
        yield Goal(what, 1.0, along(name), _sweeps(layers=False))
    what = f"growth, 1 to 8 fast layers of a model: ours / {LOOP}"
    yield Goal(what, 1.0, along(LOOP), _sweeps(layers=True))


def _sweeps(*, layers: bool) -> Callable[[Case], bool]:
    return lambda case: case.kind == "growth" and (case.info.get("variable") == "layers") == layers


def _models() -> Iterator[Goal]:
    for name in MODELS:
        about = of("model logits", name=name, tokens=4096, dtype="float32")
        yield Goal(f"{name}, every 6th layer, T=4096: / static compiled", 1.03, over("static"), about)
    for name in MODELS:
        about = of("model decode", name=name, batch=1, dtype="float32")
        yield Goal(f"{name}, decode, B=1, between writes: / static compiled", 1.05, over("static"), about)
    for name in MODELS:
        about = of(PROMPT, name=name, tokens=4096, dtype="float32")
        what = f"{name}, every 6th layer, prefill T=4096: / static compiled"
        yield Goal(what, 1.03, over("static"), about, against="static")
    reading = ("official", f"{LOOP}, compiled", "static, eager")
    for kind, names in (
        ("model logits", reading),
        (PROMPT, reading),
        ("model training", (TRAIN, f"{TRAIN}, compiled")),
        ("model decode", ("official",)),
    ):
        for name in names:
            against = name if name.startswith("static") else None
            what = f"{kind}, every model and length: ours / {name}"
            yield Goal(what, 1.0, over(name), of(kind), against=against)


def _training() -> Iterator[Goal]:
    at: dict[str, object] = {**MEDIUM, "tokens": 8192, "chunk": 512, "dtype": "float32"}
    yield faster("training step", 1.65, TRAIN, of("training", **at))
    yield faster("training step", 2.0, f"{TRAIN}, checkpointed", of("training", **at))
    yield faster("training step, tuned allocator", 1.25, TRAIN, of("training", tuned=True, **at))
    what = "training step fp32"
    about = of("memory, training", d=1024, dtype="float32", variable="T")
    yield Goal(f"{what}, T=8192 C=512: extra memory / official form's", 0.2, extra_memory(8192), about)
    about = of("memory, training", d=1024, dtype="float32", variable="C")
    yield Goal(f"{what}: extra memory grows with (T/C)^x", 0.05, growth_with_chunks, about)


def _decode() -> Iterator[Goal]:
    """Whole chunks of steps, which pay for everything; then single places of a text; then the host."""
    what = "decode, B=1, mean step over a whole chunk: / static"
    yield Goal(what, 1.05, over("static"), of(WHOLE_CHUNK, batch=1, d=1024), base="static")
    for batch in (4, 16):
        what = f"decode, B={batch}, mean step over a whole chunk: / {WITH_V_AND_WRITE}"
        yield Goal(what, 1.2, over_floor, of(WHOLE_CHUNK, batch=batch, d=1024))
    what = f"decode, every B, mean step over a whole chunk: ours / {LOOP}"
    yield Goal(what, 1.0, over(LOOP), of(WHOLE_CHUNK, d=1024))
    for where, there in (
        ("before the first write", lambda past, _: past == 0),
        ("while v of the first chunk is made", lambda past, chunk: 0 < past < chunk),
        ("a matrix a row, nothing waiting", lambda past, chunk: past % chunk == 0),
        ("a matrix a row, a write in progress", lambda past, chunk: 0 < past % chunk <= _spread(chunk)),
        ("a matrix a row, v of a chunk made", lambda past, chunk: past % chunk > _spread(chunk)),
    ):
        later = where.startswith("a matrix")
        alone = f"decode, B=1, {where}: / static"
        yield Goal(alone, 1.05, over("static"), _places(1, there, later=later), base="static")
        for batch in (4, 16):
            what = f"decode, B={batch}, {where}: / {FLOOR_OF_A_STEP}"
            yield Goal(what, 1.2, over_floor, _places(batch, there, later=later), base=FLOOR)
    what = "decode, one layer: longest step / median, C<=512"
    yield Goal(what, 3.0, longest, of("border", d=1024))
    for name in MODELS:
        what = f"decode, {name}, every 6th layer: longest step / median, C=512"
        yield Goal(what, 3.0, longest, of("border", name=name, chunk=512))
    yield Goal("decode, a step's host time in microseconds", 15.0, host, of("host"))


def _places(batch: int, there: Callable[[int, int], bool], *, later: bool) -> Callable[[Case], bool]:
    """Steps of so many rows where, by the tokens before and the chunk, the text stands ``there``.

    ``later``: behind the first two chunks.
    """
    about = of("decode", batch=batch, d=1024)

    def at(case: Case) -> bool:
        past, chunk = int(case.shape["past"]), int(case.shape["chunk"])
        return later == (past >= 2 * chunk) and there(past, chunk)

    return lambda case: about(case) and at(case)


def _spread(chunk: int) -> int:
    """Over how many steps a write is spread, as ``spread_tokens`` of ``codegen/layout.py`` has it."""
    return 3 * chunk // 8


def table(cases: Sequence[Case]) -> Block:
    """A row per goal, and how many were met."""
    rows: list[Sequence[str]] = []
    rates = peaks(cases)
    for goal in goals():
        bound, intended = f"{'>=' if goal.least else '<='} {goal.bound:g}", goal.intended()
        found = goal.measured(cases)
        if not found:
            rows.append((goal.what, bound, "-", "-", UNKNOWN, f"0 of {intended or '?'}", "-"))
            continue
        case, figure = found[0]
        limit = goal.at_the_floor(case, rates.get(case.machine))
        # A suite that has no such cases was not asked how many there are.
        many = f"{len(found)} of {intended}" if intended >= len(found) else str(len(found))
        said = "-" if limit is None else Figure(limit).said(goal.bound)
        verdict = goal.verdict(figure.value, limit)
        if verdict == MET and len(found) < intended:
            verdict = IN_PART
        where = ", ".join(filter(None, (case.label, figure.where)))
        rows.append((goal.what, bound, figure.said(goal.bound), said, verdict, many, where))
    verdicts = [row[HEAD.index("met")] for row in rows]
    met, part, missed, beyond, unknown = map(verdicts.count, (MET, IN_PART, MISSED, BEYOND, UNKNOWN))
    summary = (
        f"{met + part} of {len(rows)} met ({part} of them as far as the suite's cases were measured), "
        f"{missed + beyond} missed ({beyond} of them at the floor, too), {unknown} not measured. The worst "
        "case of each counts."
    )
    return Block("Goals", [summary], HEAD, rows)


if __name__ == "__main__":
    command(__doc__.partition("\n")[0], lambda cases: [table(cases)])
