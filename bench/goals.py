"""What was to be reached, and what a run reached: ``python -m bench.goals FILE... [--markdown FILE]``.

A goal is a bound on one figure of the cases that it is about; the worst of them counts. A goal that no case
of the files is about is listed as not measured. May be changed here: bounds, if the README says so too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.page import Block, command
from bench.results import OURS, WITH_V, Case, peaks

TRAIN, LOOP = "official training form", "official inference loop"
MEDIUM = {"d": 1024, "f": 3072, "batch": 1}
DTYPES = ("float32", "bfloat16")
FLOOR = "floor"
MODELS = ("SmolLM2-135M", "Qwen3-0.6B")


@dataclass(frozen=True)
class Figure:
    """A value, and quartiles of it where the rounds have them."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        spread = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{spread}"


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
    figure: Callable[[Case], Figure | None]
    about: Callable[[Case], bool]
    least: bool = False
    against: str | None = None
    base: str | None = None

    def at_the_floor(self, case: Case, peak: float | None) -> float | None:
        """The figure of a form that does nothing but the algorithm's FLOPs, at the fastest product's rate.

        Of a step of decode, that of the static product with what the step must make of v.
        """
        if self.base and (least := case.seconds(WITH_V)):
            base = case.floor() if self.base == FLOOR else case.seconds(self.base)
            return least / base if base else None
        floor, other = case.floor(peak), case.seconds(self.against or "")
        return other / floor if floor and other else None

    def measured(self, cases: Sequence[Case]) -> tuple[Case, Figure] | None:
        """The worst case and its figure."""
        found = [(c, f) for c in cases if self.about(c) and (f := self.figure(c))]
        worst = min if self.least else max
        return worst(found, key=lambda pair: pair[1].value) if found else None

    def met(self, value: float) -> bool:
        """Whether the figure is within the bound."""
        return value >= self.bound if self.least else value <= self.bound


def over_floor(case: Case) -> Figure | None:
    """Ours by the case's floor."""
    ours, floor = case.times.get(OURS), case.floor()
    if not ours or not floor:
        return None
    scale = ours["seconds"] / floor / ours["ratio"]
    return Figure(ours["seconds"] / floor, ours["low"] * scale, ours["high"] * scale)


def over(name: str) -> Callable[[Case], Figure | None]:
    """Ours by a competitor."""

    def figure(case: Case) -> Figure | None:
        found = (case.info.get("ours_over") or {}).get(name)
        return Figure(found["ratio"], found["low"], found["high"]) if found else None

    return figure


def gain(name: str) -> Callable[[Case], Figure | None]:
    """How many times as fast as a competitor ours is."""

    def figure(case: Case) -> Figure | None:
        found = over(name)(case)
        return Figure(1 / found.value, 1 / (found.high or 1), 1 / (found.low or 1)) if found else None

    return figure


def worst_over(*names: str) -> Callable[[Case], Figure | None]:
    """Ours by the competitor that is closest to it."""

    def figure(case: Case) -> Figure | None:
        found = [f for name in names if (f := over(name)(case))]
        return max(found, key=lambda f: f.value) if found else None

    return figure


def host(case: Case) -> Figure | None:
    """Microseconds of a step beside those of a product of the same tiny size."""
    if OURS not in case.times:
        return None
    return Figure((case.times[OURS]["seconds"] - case.times["static"]["seconds"]) * 1e6)


def border(case: Case) -> Figure | None:
    """The longest step by the median step."""
    return Figure(case.info["worst"]) if "worst" in case.info else None


def extra_memory(tokens: int) -> Callable[[Case], Figure | None]:
    """Memory beyond the static layer's at so many tokens, ours by the official form's."""

    def figure(case: Case) -> Figure | None:
        if case.info.get("variable") != "T":
            return None
        points = zip(case.info.get("values") or [], case.info.get("extra_ratio") or [], strict=True)
        return next((Figure(ratio) for at, ratio in points if at == tokens), None)

    return figure


def growth_with_chunks(case: Case) -> Figure | None:
    """The exponent of ours in the number of chunks T/C."""
    fitted = (case.info.get("fit_extra") or {}).get(OURS)
    return Figure(-fitted["exponent"]) if fitted and case.info.get("variable") == "C" else None


def of(kind: str, *, tuned: bool | None = False, **sizes: object) -> Callable[[Case], bool]:
    """Cases of a kind with these sizes; by the default allocator, the tuned one, or (None) either."""

    def about(case: Case) -> bool:
        allocator = str(case.environment.get("allocator", "default"))
        return (
            case.kind == kind
            and tuned in (None, allocator != "default")
            and all(case.shape.get(name) == value for name, value in sizes.items())
        )

    return about


def decoding(batch: int, there: Callable[[int], bool]) -> Callable[[Case], bool]:
    """Steps of so many rows, at these places of a text."""
    about = of("decode", batch=batch, d=1024)
    return lambda case: about(case) and there(int(case.shape["past"]))


def faster(what: str, least: float, name: str, about: Callable[[Case], bool]) -> Goal:
    """Ours is at least ``least`` times as fast as a competitor."""
    return Goal(f"{what}: {name} / ours", least, gain(name), about, least=True, against=name)


def goals() -> Iterator[Goal]:
    """All of them, in the order of the README."""
    at: dict[str, object] = {**MEDIUM, "tokens": 4096}
    for dtype in DTYPES:
        for kind in ("forward", "prefill"):
            about = of(kind, chunk=512, dtype=dtype, **at)
            yield Goal(f"{kind} {dtype}, T=4096 C=512: / FLOP floor", 1.05, over_floor, about)
    for chunk, train, loop in ((512, 1.85, 1.38), (256, 2.5, 1.35)):
        about = of("forward", chunk=chunk, dtype="float32", **at)
        yield faster(f"fp32 C={chunk}", train, TRAIN, about)
        yield faster(f"fp32 C={chunk}", loop, LOOP, about)
    about = of("forward", tuned=True, chunk=512, dtype="float32", **at)
    yield faster("fp32 C=512, tuned allocator", 1.3, TRAIN, about)
    yield faster("fp32 C=512, tuned allocator", 1.25, LOOP, about)
    for chunk, loop in ((512, 1.38), (256, 1.35)):
        about = of("prefill", chunk=chunk, dtype="float32", **MEDIUM, tokens=4096)
        yield faster(f"fp32 C={chunk}, with a state", loop, LOOP, about)
    for tuned, allocator in ((False, "default"), (True, "tuned")):
        for kind in ("forward", "prefill"):
            about = of(kind, tuned=tuned)
            what = f"{kind}, whole grid, {allocator} allocator: ours / either official form"
            yield Goal(what, 1.0, worst_over(TRAIN, LOOP), about)
            compiled = worst_over(f"{TRAIN}, compiled", f"{LOOP}, compiled")
            yield Goal(f"{what}, compiled", 1.0, compiled, about)
    for name in MODELS:
        about = of("model logits", name=name, tokens=4096, dtype="float32")
        yield Goal(f"{name}, every 6th layer, T=4096: / static compiled", 1.03, over("static"), about)
    at = {**MEDIUM, "tokens": 8192, "chunk": 512, "dtype": "float32"}
    yield faster("training step", 1.65, TRAIN, of("training", **at))
    yield faster("training step", 2.0, f"{TRAIN}, checkpointed", of("training", **at))
    yield faster("training step, tuned allocator", 1.25, TRAIN, of("training", tuned=True, **at))
    about = of("memory, training", d=1024)
    yield Goal("training step, T=8192 C=512: extra memory / official form's", 0.2, extra_memory(8192), about)
    yield Goal("training step: extra memory grows with (T/C)^x", 0.05, growth_with_chunks, about)
    for where, there in (
        ("before the first write", lambda past: past == 0),
        ("while v of a chunk is made", lambda past: past == 256),
        ("a matrix a row", lambda past: past >= 1024),
    ):
        alone, many = f"decode, B=1, {where}: / static", f"decode, B=16, {where}: / byte floor"
        yield Goal(alone, 1.05, over("static"), decoding(1, there), base="static")
        yield Goal(many, 1.2, over_floor, decoding(16, there), base=FLOOR)
    yield Goal("decode, one layer: longest step / median, C<=512", 3.0, border, of("border", d=1024))
    for name in MODELS:
        what = f"decode, {name}, every 6th layer: longest step / median, C=512"
        yield Goal(what, 3.0, border, of("border", name=name, chunk=512))
    yield Goal("decode, a step's host time in microseconds", 15.0, host, of("host"))


def table(cases: Sequence[Case], *, all_of_them: bool = True) -> Block:
    """A row per goal, or per goal that was measured."""
    rows: list[Sequence[str]] = []
    rates = peaks(cases)
    for goal in goals():
        found, bound = goal.measured(cases), f"{'>=' if goal.least else '<='} {goal.bound:g}"
        if found is None:
            rows += [(goal.what, bound, "-", "-", "not measured", "-")] if all_of_them else []
            continue
        case, figure = found
        limit = goal.at_the_floor(case, rates.get(case.machine))
        said, met = "-" if limit is None else f"{limit:.3g}", "yes" if goal.met(figure.value) else "NO"
        rows.append((goal.what, bound, str(figure), said, met, case.label))
    head = ("goal", "bound", "measured [quartiles]", "at the floor", "met", "case")
    return Block("Goals", head=head, rows=rows)


if __name__ == "__main__":
    command(__doc__.partition("\n")[0], lambda cases: [table(cases)])
