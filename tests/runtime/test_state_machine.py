"""Running state under any order of operations, against lists of tokens from which all is computed anew.

The model of a sequence is the tuple of its document's tokens and how many chunks had to be written by now.
Outputs, matrices, counters and norms follow from those by ``codegen/reference.py`` in fp64; nothing is
carried along. Memory that nobody may read is NaN: at the start, and again whenever the machine says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from safetensors.torch import load, save

from tests.codegen.test_step import KEY, LR, RULES, D, fresh, problem, spec
from tests.tolerances import FP64, relative_error
from ttt_compiler.codegen import ops, reference  # noqa: F401
from ttt_compiler.codegen.layout import (
    CACHED,
    CLIPPED,
    COLUMNS,
    DONE,
    FACTORED,
    LAST,
    LEFT,
    PEAK,
    SEEN,
    SKIPPED,
    SLOT,
    TOTAL,
    WRITES,
    live_start,
    spread_tokens,
)
from ttt_compiler.errors import CropError
from ttt_compiler.runtime.rows import export_row, import_row, row_layout
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec, WriteRule

# A token is a number: its rows stand in this pool. Every 11th is not finite in h, every 11th in t.
POOL = 4096
H, T, W0, CONV, PROJ, BIAS = problem(1, POOL)
H, T = H[0], T[0]
BAD = 11
H[5::BAD, 3] = float("inf")
T[7::BAD, 2] = float("nan")

MOST_STATES, MOST_ROWS, MOST_TOKENS = 4, 6, 9
NAN = float("nan")
# A norm of a product is found by the smaller of two Gram matrices, which loses half of the digits of a
# vanishing one; none vanishes here, and the measured difference stays below 1e-13.
NORMS = 1e-10

# Rules for finite tokens, and the same ones where some tokens are not.
SKIPPING = {
    "skip": WriteRule(on_nonfinite="skip"),
    "skip and decay": WriteRule(on_nonfinite="skip", decay=0.7),
    "everything": RULES["everything"],
}
CONTROLS = {**RULES, **SKIPPING}


@dataclass(frozen=True)
class Row:
    """One sequence of the model: its document's tokens, and its chunks that must be in the matrix."""

    doc: tuple[int, ...] = ()
    done: int = 0


@dataclass
class Live:
    """A state and what it must be."""

    state: FastWeightState
    one: SiteSpec
    rows: list[Row]


@dataclass(frozen=True)
class Written:
    """What writing the complete chunks of a document leaves behind."""

    matrix: torch.Tensor
    writes: int
    skipped: int
    clipped: int
    norms: tuple[float, float, float]


@functools.lru_cache(maxsize=20000)
def outputs(one: SiteSpec, doc: tuple[int, ...]) -> torch.Tensor:
    """y of every token of a document, by the specification."""
    index = torch.tensor(doc, dtype=torch.int64)
    return reference.chunked(H[index], T[index], W0, CONV, PROJ, LR, one.chunk, None, one.rule)[0] + BIAS


@functools.lru_cache(maxsize=20000)
def written(one: SiteSpec, doc: tuple[int, ...]) -> Written:
    """All that is known after ``doc``, a whole number of chunks."""
    index = torch.tensor(doc, dtype=torch.int64)
    chunk, controls = one.chunk, one.rule
    matrix = reference.chunked(H[index], T[index], W0, CONV, PROJ, LR, chunk, None, controls)[1]
    limit = reference.write_limit(W0, controls)
    free = WriteRule(keys=controls.keys, on_nonfinite="skip")
    writes = skipped = clipped = 0
    norms = []
    for ids in index.split(chunk) if doc else ():
        h, t = H[ids], T[ids]
        if not bool(h.isfinite().all() and t.isfinite().all()):
            skipped += 1
            continue
        writes += 1
        if limit is None:
            v = LR * reference.target(t, CONV, PROJ)
            if controls.keys == "unit":
                v = v / h.norm(dim=-1, keepdim=True)
            norms.append(float(v.norm() * h.norm()) / (chunk if controls.keys == "mean" else 1))
        else:
            norm = reference.increment(t, h, W0, CONV, PROJ, LR, free).norm()
            clipped += int(norm > limit)
            norms.append(float(torch.minimum(norm, limit)))
    last, peak, total = (norms[-1], max(norms), sum(norms)) if norms else (0.0, 0.0, 0.0)
    return Written(matrix, writes, skipped, clipped, (last, peak, total))


picks = st.integers(0, MOST_STATES - 1)
# What a token of a call with positions is: mostly the next of its document.
KINDS = st.sampled_from(["next"] * 6 + ["padding", "start"])


class StateMachine(RuleBasedStateMachine):
    """Several states at once, of one site, forks among them; see the module."""

    # What has happened in the whole run, over all examples.
    met: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Live] = []
        self.token = 0

    # -- what there is ---------------------------------------------------------------------------------

    @initialize(
        batch=st.integers(1, 4),
        chunk=st.integers(1, 5),
        revocable=st.integers(0, 8),
        control=st.sampled_from(sorted(CONTROLS)),
        shared=st.booleans(),
        spread=st.booleans(),
    )
    def begin(self, batch, chunk, revocable, control, shared, spread):
        self._open(batch, spec(chunk, CONTROLS[control]), revocable, shared, spread)

    @rule(
        batch=st.integers(1, 4),
        chunk=st.integers(1, 5),
        revocable=st.integers(0, 8),
        control=st.sampled_from(sorted(CONTROLS)),
        shared=st.booleans(),
        spread=st.booleans(),
    )
    @precondition(lambda self: len(self.live) < MOST_STATES)
    def open(self, batch, chunk, revocable, control, shared, spread):
        self._open(batch, spec(chunk, CONTROLS[control]), revocable, shared, spread)

    @rule(which=picks)
    @precondition(lambda self: 0 < len(self.live) < MOST_STATES)
    def fork(self, which):
        live = self._pick(which)
        self.live.append(Live(live.state.clone(), live.one, list(live.rows)))
        self._note("fork")

    @rule(which=picks)
    @precondition(lambda self: len(self.live) > 1)
    def drop(self, which):
        self.live.pop(which % len(self.live))

    # -- tokens ----------------------------------------------------------------------------------------

    @rule(which=picks, size=st.integers(0, MOST_TOKENS))
    @precondition(lambda self: self.live)
    def append(self, which, size):
        live = self._pick(which)
        self._feed(live, [["next"] * size] * len(live.rows), None)

    @rule(which=picks, calls=st.integers(2, 12))
    @precondition(lambda self: self.live)
    def decode(self, which, calls):
        """Token by token, over chunks' ends and from one form of the matrix into the next."""
        live = self._pick(which)
        for _ in range(calls):
            self._feed(live, [["next"]] * len(live.rows), None)

    @rule(which=picks, size=st.integers(1, MOST_TOKENS), same=st.booleans(), data=st.data())
    @precondition(lambda self: self.live)
    def append_with_positions(self, which, size, same, data):
        live = self._pick(which)
        batch = len(live.rows)
        drawn = st.lists(KINDS, min_size=size, max_size=size)
        kinds = [data.draw(drawn)] * batch if same else [data.draw(drawn) for _ in range(batch)]
        pos = torch.tensor([[{"next": 1, "start": 0, "padding": -1}[k] for k in row] for row in kinds])
        # Positions count up in real calls. That only their sign and zero matter is a part of the rule.
        pos = torch.where(pos > 0, torch.arange(1, size + 1), pos)
        self._feed(live, kinds, pos[:1] if same else pos)

    @rule(which=picks, tokens=st.integers(0, 12))
    @precondition(lambda self: self.live)
    def crop(self, which, tokens):
        live = self._pick(which)
        if any(len(r.doc) - r.done * live.one.chunk < tokens for r in live.rows):
            before = [x.clone() for x in live.state.sites[KEY]]
            with pytest.raises(CropError):
                live.state.crop(tokens)
            assert all(map(_same, before, live.state.sites[KEY]))
            self._note("refused crop")
            return
        live.state.crop(tokens)
        live.rows = [Row(r.doc[: len(r.doc) - tokens], r.done) for r in live.rows]
        self._note("crop")

    @rule(which=picks, tokens=st.integers(0, 10))
    @precondition(lambda self: self.live)
    def keep_revocable(self, which, tokens):
        state = self._pick(which).state
        before = state.revocable
        state.keep_revocable(tokens)
        assert state.revocable == max(before, tokens)

    # -- rows ------------------------------------------------------------------------------------------

    @rule(which=picks, data=st.data())
    @precondition(lambda self: self.live)
    def select(self, which, data):
        live = self._pick(which)
        old = st.integers(0, len(live.rows) - 1)
        order = data.draw(st.lists(old, min_size=1, max_size=MOST_ROWS))
        live.state.select(torch.tensor(order))
        live.rows = [live.rows[i] for i in order]
        self._note("select")

    @rule(which=picks, times=st.integers(1, 3))
    @precondition(lambda self: self.live)
    def repeat_interleave(self, which, times):
        live = self._pick(which)
        if len(live.rows) * times > MOST_ROWS:
            return
        live.state.repeat_interleave(times)
        live.rows = [r for r in live.rows for _ in range(times)]

    @rule(which=picks, data=st.data())
    @precondition(lambda self: self.live)
    def reset(self, which, data):
        live = self._pick(which)
        batch = len(live.rows)
        rows = data.draw(st.none() | st.sets(st.integers(0, batch - 1), max_size=batch))
        live.state.reset(rows)
        live.rows = [Row() if rows is None or b in rows else r for b, r in enumerate(live.rows)]

    # -- out of the tables and back ----------------------------------------------------------------------

    @rule(which=picks, data=st.data())
    @precondition(lambda self: self.live)
    def park_a_row(self, which, data):
        """One sequence leaves its tables and comes back, as it stands."""
        live = self._pick(which)
        b = data.draw(st.sampled_from(_writing(live) or range(len(live.rows))))
        row = {name: x.clone() for name, x in export_row(live.state, KEY, b).items()}
        live.state.reset([b])
        import_row(live.state, live.one, b, row, lambda _: W0)
        self.met["parked while writing"] += int("writing" in row)

    @rule(which=picks)
    @precondition(lambda self: self.live)
    def finish_writes(self, which):
        live = self._pick(which)
        live.state.finish_writes(lambda _: W0)
        site = live.state.sites[KEY]
        assert not site.spreads or not site.rows[live.state.batch, LEFT].any()

    @rule(which=picks, more=st.integers(0, 3), shared=st.booleans(), data=st.data())
    @precondition(lambda self: self.live)
    def save_and_load(self, which, more, shared, data):
        """A new state of any of the rows in any order, by way of a file's bytes."""
        live = self._pick(which)
        order = data.draw(st.lists(st.integers(0, len(live.rows) - 1), min_size=1, max_size=MOST_ROWS))
        revocable = live.state.revocable + more
        state = fresh(live.one, len(order), revocable=revocable, shared_lanes=shared, spread=not revocable)
        for b, source in enumerate(order):
            import_row(state, live.one, b, _through_a_file(live, source), lambda _: W0)
        self.live.append(Live(state, live.one, [live.rows[i] for i in order]))
        self.live = self.live[-MOST_STATES:]
        self._note("save")

    @rule(which=picks, other=picks, data=st.data())
    @precondition(lambda self: self.live)
    def move_a_row(self, which, other, data):
        """One sequence out of a batch takes the place of one in the middle of another batch."""
        source, target = self._pick(which), self._pick(other)
        if source.one != target.one or source.state.revocable > target.state.revocable:
            return
        i = data.draw(st.integers(0, len(source.rows) - 1))
        j = data.draw(st.integers(0, len(target.rows) - 1))
        row, known = _through_a_file(source, i), source.rows[i]
        target.state.reset([j])
        import_row(target.state, target.one, j, row, lambda _: W0)
        target.rows[j] = known
        self._note("move")

    @rule(which=picks)
    @precondition(lambda self: self.live)
    def poison(self, which):
        """Memory that no row reads becomes NaN again. Of forks, one's dead rows are another's live ones."""
        live = self._pick(which)
        if len(live.state._sharers) == 1:
            _poison(live.state.sites[KEY], live.one.chunk)

    # -- what must hold ------------------------------------------------------------------------------------

    @invariant()
    def every_state_is_its_model(self):
        for live in self.live:
            table = live.state.sites[KEY].rows[live.state.batch].tolist()
            assert len(table) == len(live.rows)
            for b, (counts, row) in enumerate(zip(table, live.rows, strict=True)):
                _check_row(live, b, counts, row)

    # -- helpers -------------------------------------------------------------------------------------------

    def _pick(self, which: int) -> Live:
        return self.live[which % len(self.live)]

    def _open(self, batch: int, one: SiteSpec, revocable: int, shared: bool, spread: bool) -> None:
        state = fresh(one, batch, revocable=revocable, shared_lanes=shared, spread=spread)
        self.live.append(Live(state, one, [Row()] * batch))

    def _note(self, what: str) -> None:
        type(self).met[what] += 1
        event(what)

    def _next(self, one: SiteSpec) -> int:
        """A token that no sequence has; a finite one unless the rule may skip it."""
        while True:
            self.token = (self.token + 1) % POOL
            if one.rule.on_nonfinite == "skip" or self.token % BAD not in (5, 7):
                return self.token

    def _feed(self, live: Live, kinds: list[list[str]], pos: torch.Tensor | None) -> None:
        """One call of the op, and the same tokens to the model."""
        one, batch, size = live.one, len(live.rows), len(kinds[0])
        tokens = [[self._next(one) for _ in range(size)] for _ in range(batch)]
        index = torch.tensor(tokens, dtype=torch.int64).reshape(batch, size)
        live.state.own()
        y = torch.ops.ttt.fast_weight_step(
            *(H[index], T[index], W0, BIAS, CONV, PROJ, pos, one.encode()),
            *live.state.sites[KEY],
            live.state.batch,
        )
        for b in range(batch):
            live.rows[b], expected = self._advanced(live, live.rows[b], tokens[b], kinds[b])
            clean = H[index[b]].isfinite().all(-1)
            if bool(clean.any()):
                error = relative_error(y[b, clean], expected[clean])
                assert error < FP64, (b, error)
        self.met["tokens"] += batch * size
        table = live.state.sites[KEY].rows[live.state.batch].tolist()
        for counts in table:
            self.met["writing"] += int(len(counts) > COLUMNS and counts[LEFT] > 0)
            self.met["factored"] += int(counts[FACTORED] > 0)
            self.met["dense"] += int(counts[WRITES] > 0 and counts[FACTORED] == 0)
            self.met["waiting"] += int(counts[CACHED] > 0)
            self.met["skipped"] += int(counts[SKIPPED] > 0)
            self.met["clipped"] += int(counts[CLIPPED] > 0)

    def _advanced(
        self, live: Live, row: Row, tokens: list[int], kinds: list[str]
    ) -> tuple[Row, torch.Tensor]:
        """The row after a call, and what the call must give."""
        chunk, revocable = live.one.chunk, live.state.revocable
        y = torch.empty(len(tokens), D, dtype=torch.float64)
        doc, done, start = row.doc, row.done, len(row.doc)
        # (token's place in the call, place in its document) of the document that is being read.
        places: list[tuple[int, int]] = []

        def close() -> None:
            for i, place in places:
                y[i] = outputs(live.one, doc)[place]
            places.clear()

        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind == "padding":
                y[i] = H[token] @ W0.t() + BIAS
                continue
            if kind == "start":
                close()
                doc, done, start = (), 0, 0
            places.append((i, len(doc)))
            doc = (*doc, token)
        close()
        if len(doc) > start:
            done = max(done, (len(doc) - revocable) // chunk)
        return Row(doc, done), y


def _check_row(live: Live, b: int, counts: list[int], row: Row) -> None:
    one, state = live.one, live.state
    assert (counts[SEEN], counts[DONE]) == (len(row.doc), row.done)
    known = written(one, row.doc[: row.done * one.chunk])
    assert (counts[WRITES], counts[SKIPPED], counts[CLIPPED]) == (known.writes, known.skipped, known.clipped)
    matrix = state.matrix(KEY, b, W0)
    assert relative_error(matrix, known.matrix) < FP64
    norms = state.sites[KEY].norms[state.batch[b]]
    torch.testing.assert_close(
        norms[[LAST, PEAK, TOTAL]], torch.tensor(known.norms, dtype=norms.dtype), rtol=NORMS, atol=0
    )
    # What is not written yet is kept bit for bit.
    rest = torch.tensor(row.doc[live_start(counts, one.chunk) :], dtype=torch.int64)
    kept = export_row(state, KEY, b)
    assert _same(kept["tail_h"], H[rest])
    assert _same(kept["tail_t"], T[rest])


def _writing(live: Live) -> list[int]:
    """Sequences whose write is in progress."""
    table = live.state.sites[KEY].rows[live.state.batch].tolist()
    return [b for b, counts in enumerate(table) if len(counts) > COLUMNS and counts[LEFT]]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    return bool(torch.equal(a.nan_to_num(nan=1e300), b.nan_to_num(nan=1e300)))


def _through_a_file(live: Live, sequence: int) -> dict[str, torch.Tensor]:
    row = export_row(live.state, KEY, sequence)
    row = load(save({name: x.contiguous().clone() for name, x in row.items()}))
    layout = row_layout(live.one, live.state.dtype, row["rows"].tolist(), live.state.revocable)
    assert layout is not None, "a row that was written would be refused when it is read"
    assert {name: (tuple(x.shape), x.dtype) for name, x in row.items()} == layout
    return row


def _poison(site, chunk: int) -> None:
    table = site.rows.tolist()
    alive = torch.zeros(site.tail_h.shape[:2], dtype=torch.bool)
    for row, counts in enumerate(table):
        columns = torch.arange(live_start(counts, chunk), counts[SEEN]) % site.capacity
        lanes = site.lanes[row, columns].long() if site.lanes.shape[1] else row
        alive[lanes, columns] = True
        if counts[CACHED] == 0 and not any(counts[COLUMNS:]):
            site.tail_v[row] = NAN
    site.tail_h[~alive] = NAN
    site.tail_t[~alive] = NAN
    read = {counts[SLOT] for counts in table if counts[WRITES]}
    for slot in set(range(len(table))) - read:
        site.w[slot] = NAN


class SpreadMachine(StateMachine):
    """The same where writes are spread: chunks are long enough for several steps, and rules allow it."""

    met: ClassVar[Counter[str]] = Counter()

    def _open(self, batch: int, one: SiteSpec, revocable: int, shared: bool, spread: bool) -> None:
        one = spec(8 if one.chunk % 2 else 16, one.rule)
        if not spread_tokens(one):
            one = dataclasses.replace(one, rule=WriteRule(on_nonfinite=one.rule.on_nonfinite))
        super()._open(batch, one, max(0, revocable - 7), shared, True)

    @rule(which=picks, data=st.data())
    @precondition(lambda self: self.live)
    def park_in_a_write(self, which, data):
        """Token by token to where a write is in progress, if one begins within a chunk."""
        live = self._pick(which)
        for _ in range(live.one.chunk):
            if _writing(live):
                break
            self._feed(live, [["next"]] * len(live.rows), None)
        self.park_a_row(which, data)

    def _feed(self, live: Live, kinds: list[list[str]], pos: torch.Tensor | None) -> None:
        """Tokens without positions come one by one: a longer call finishes what is being written."""
        for i in range(len(kinds[0])) if pos is None else ():
            super()._feed(live, [[k[i]] for k in kinds], None)
        if pos is not None:
            super()._feed(live, kinds, pos)


MET = ("fork", "select", "save", "move", "dense", "tokens")


@pytest.mark.parametrize(
    ("machine", "examples", "what"),
    [
        (StateMachine, 120, (*MET, "factored", "waiting", "clipped", "crop", "refused crop")),
        (SpreadMachine, 250, (*MET, "writing", "parked while writing")),
    ],
)
def test_states_are_their_models_whatever_happens(machine, examples, what):
    machine.met.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
    missing = [one for one in what if machine.met[one] < 10]
    assert not missing, f"the machine hardly ever met {missing}: {machine.met}"


@pytest.mark.parametrize("machine", [StateMachine, SpreadMachine])
def test_writes_are_skipped_between_others(machine):
    """Chunks with a token that is not finite and chunks without one, in turns: few random runs have both."""
    run = machine()
    run.begin(batch=1, chunk=3, revocable=0, control="skip", shared=False, spread=True)
    (live,) = run.live
    for i in range(8):
        # Behind 7 the next eight are finite: 8, 9, 10, 0, .., 4 by the eleventh. Behind 4 the next is not.
        run.token += ((4 if i % 2 else 7) - run.token) % BAD
        for _ in range(live.one.chunk):
            run.append(0, 1)
            run.every_state_is_its_model()
    (counts,) = live.state.sites[KEY].rows[live.state.batch].tolist()
    assert (counts[DONE], counts[WRITES], counts[SKIPPED]) == (8, 4, 4)
