"""What a decoded token costs with fast weights: against the static model, and the official algorithm.

    python -m bench.decode              # SmolLM2-135M, every 6th layer, chunks of 256; a few minutes
    python -m bench.decode --layer      # one projection alone, N before and after the factored/dense switch
    python -m bench.decode --host       # what a step costs besides its bytes; seconds
    python -m bench.decode --quick      # each of the above, small

All competitors are in one process and take turns; a correctness gate comes before any number. Bytes are the
floor: what must be read at least. With one thread (the default) a time is that thread's own processor time,
so that other work on the machine counts for little. The official algorithm takes one sequence: a batch is
read one by one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

import ttt_compiler as ttt
from bench.measure import Timing, clock_of, paired
from bench.official import official, reset, running
from ttt_compiler.codegen import ops  # noqa: F401  (registers the ops)
from ttt_compiler.codegen.layout import FACTORED, factored_limit
from ttt_compiler.compat.cache_names import installed_name
from ttt_compiler.pretrained import load_pretrained
from ttt_compiler.runtime.state import FastWeightState
from ttt_compiler.spec import SiteSpec

CHUNK, LR = 256, 0.3


class Decoder:
    """A model in the middle of a text: every call reads one more token of each row."""

    def __init__(
        self,
        model: torch.nn.Module,
        batch: int,
        prompt: int,
        *,
        fast: bool,
        prefill: torch.nn.Module | None = None,
    ) -> None:
        self.model = model if prefill is None else prefill
        self.cache = ttt.Session(model, batch).cache if fast else DynamicCache(config=model.config)
        self.token = torch.ones(batch, 1, dtype=torch.int64)
        ids = torch.randint(0, 1000, (batch, prompt), generator=torch.Generator().manual_seed(0))
        for start in range(0, prompt, CHUNK):
            self.read(ids[:, start : start + CHUNK].clone())
        self.model = model

    def read(self, ids: Tensor) -> Tensor:
        # Under the other of its two names a wrapper would rename it, at a price, in some competitors alone.
        return self.model(input_ids=ids, use_cache=True, **{installed_name(): self.cache}).logits

    def __call__(self) -> Tensor:
        return self.read(self.token)


class OneByOne:
    """The official algorithm on a batch: as many decoders as rows, on one model."""

    def __init__(self, model: torch.nn.Module, batch: int, prompt: int) -> None:
        self.model, self.rows, self.states = model, [], []
        for _ in range(batch):
            reset(model)
            self.rows.append(Decoder(model, 1, prompt, fast=False))
            self.states.append([(m.past, m.weight) for m in running(model)])

    def __call__(self) -> None:
        for row, state in zip(self.rows, self.states, strict=True):
            for module, (past, weight) in zip(running(self.model), state, strict=True):
                module.past, module.weight = past, weight
            row()
            state[:] = [(m.past, m.weight) for m in running(self.model)]


def gate(fast: torch.nn.Module, published: torch.nn.Module) -> None:
    """No number from a wrong result: both must compute the same logits over several chunks."""
    ids = torch.randint(0, 1000, (1, 2 * CHUNK + 9), generator=torch.Generator().manual_seed(1))
    reset(published)
    expected = published(ids, use_cache=False).logits
    got, session = [], ttt.Session(fast)
    for part in (ids[:, : CHUNK + 3], ids[:, CHUNK + 3 :]):
        got.append(fast(part.clone(), past_key_values=session.cache).logits)
    error = float((torch.cat(got, 1) - expected).abs().max() / expected.abs().max())
    assert error < 1e-3, f"logits differ from the official algorithm's by {error:.1e}: no timing"
    print(f"logits against the official algorithm: error {error:.1e} of the largest")


@torch.no_grad()
def whole_model(rounds: int, batches: Sequence[int], chunks: Sequence[int]) -> list[dict]:
    static = load_pretrained("smollm2")[0]
    fast = ttt.convert(copy.deepcopy(static), ttt.TTTConfig(layers="every:6", chunk_size=CHUNK, lr=LR))
    torch.manual_seed(0)
    for name, p in fast.named_parameters():
        if name.rpartition(".")[2].startswith("ttt_"):
            p.copy_(torch.randn(p.shape) * 0.02)
    chosen = [int(s.key.split(".")[2]) for s in ttt.Session(fast).state.specs]
    published = official(fast, chosen, CHUNK, LR)
    eager = copy.deepcopy(static)
    # Sizes vary from row to row of the table, and compiling takes longer than measuring.
    static.compile(dynamic=True)
    fast.compile(backend="inplace_ttt", dynamic=True)
    gate(fast, published)
    print(
        f"\nSmolLM2-135M fp32, layers {chosen}, C={CHUNK}, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    print("| B | N | form | static compiled ms | ours / static | static eager / static | official / static |")
    print("|---|---|---|---|---|---|---|")
    table = []
    for batch in batches:
        for written in (n * CHUNK for n in chunks):
            prompt = written + 8
            runs = {
                "static": Decoder(static, batch, prompt, fast=False, prefill=eager),
                "ours": Decoder(fast, batch, prompt, fast=True),
                "eager": Decoder(eager, batch, prompt, fast=False),
            }
            state = runs["ours"].cache.ttt
            key = state.specs[0].key
            assert state.chunks_written[key] == [written // CHUNK] * batch
            form = "W0" if not written else "factored" if state.column(key, FACTORED)[0] else "dense"
            runs["official"] = OneByOne(published, batch, prompt)
            for run in runs.values():
                run()
                run()
            x = paired(runs, rounds, clock_of(torch.get_num_threads()))
            cells = [_cell(x[n]) for n in ("ours", "eager", "official")]
            ms = x["static"].seconds * 1e3
            print(f"| {batch} | {written} | {form} | {ms:.1f} | {' | '.join(cells)} |", flush=True)
            table.append({"batch": batch, "written": written, "form": form, **_numbers(x)})
    return table


@torch.no_grad()
def one_layer(rounds: int, batches: Sequence[int], tokens: Sequence[int]) -> list[dict]:
    d, f, chunk = 1024, 3072, 64
    spec = SiteSpec("w", d, f, d, chunk, LR, "hidden_states", True, 5, "m")
    constants = spec.encode()
    torch.manual_seed(0)
    w0, conv, proj = torch.randn(d, f) * 0.02, torch.randn(d, 1, 5) * 0.1, torch.randn(d, d) * 0.01
    print(f"\none projection D={d} F={f} fp32, C={chunk}, {torch.get_num_threads()} threads, {rounds} rounds")
    print("| B | N | form | F.linear ms | ours / F.linear | bytes / F.linear's |")
    print("|---|---|---|---|---|---|")
    table = []
    for batch in batches:
        for written in tokens:
            state = FastWeightState.zeros([spec], batch, torch.float32, torch.device("cpu"))

            def step(h: Tensor, t: Tensor, state: FastWeightState = state) -> Tensor:
                return torch.ops.ttt.fast_weight_step(
                    h, t, w0, None, conv, proj, None, constants, *state.sites["w"], state.batch
                )

            for _ in range(written // chunk):
                step(torch.randn(batch, chunk, f), torch.randn(batch, chunk, d))
            h, t = torch.randn(batch, 1, f), torch.randn(batch, 1, d)
            exact = torch.stack([h[b] @ state.matrix("w", b, w0).t() for b in range(batch)])
            rows = state.sites["w"].rows.clone()
            error = float((step(h, t) - exact).abs().max() / exact.abs().max())
            assert error < 1e-4, f"error {error:.1e}: no timing"

            def again(step=step, h=h, t=t, site=state.sites["w"], rows=rows) -> Tensor:
                site.rows.copy_(rows)  # always the same step: no chunk ever fills
                return step(h, t)

            linear = {"static": lambda h=h: functional.linear(h, w0), "ours": again}
            x = paired(linear, rounds, clock_of(torch.get_num_threads()))
            few = 0 < written <= factored_limit(d, f, batch)
            own = batch * written * (d + f) / (d * f) if few else batch - 1 if written else 0
            form = "W0" if not written else "factored" if few else "dense"
            print(
                f"| {batch} | {written} | {form} | {x['static'].seconds * 1e3:.2f} | {_cell(x['ours'])} "
                f"| {1 + own:.2f} |",
                flush=True,
            )
            table.append({"batch": batch, "written": written, "form": form, "bytes": 1 + own, **_numbers(x)})
    return table


@torch.no_grad()
def host(rounds: int, batches: Sequence[int]) -> list[dict]:
    """One step of a matrix so small that nothing else counts."""
    chunk = 8
    spec = SiteSpec("w", 24, 40, 24, chunk, LR, "hidden_states", True, 5, "m")
    w0, conv, proj = torch.randn(24, 40), torch.randn(24, 1, 5), torch.randn(24, 24)
    constants = spec.encode()
    print(f"\nmicroseconds of one step of a site besides its bytes, {rounds} rounds")
    print("| B | form | no positions | positions | positions, rows of a pool |")
    print("|---|---|---|---|---|")
    table = []
    for batch in batches:
        for form, written in (("W0", 0), ("factored", 8), ("dense", 80)):
            if form == "factored" and factored_limit(24, 40, batch) < written:
                continue
            steps = {}
            for name, shared in (("plain", False), ("positions", False), ("pool", True)):
                state = FastWeightState.zeros(
                    [spec], batch, torch.float32, torch.device("cpu"), shared_lanes=shared
                )
                pos = None if name == "plain" else torch.full((batch, 1), written + 1)

                def step(h: Tensor, t: Tensor, pos: Tensor | None, state: FastWeightState = state) -> Tensor:
                    return torch.ops.ttt.fast_weight_step(
                        h, t, w0, None, conv, proj, pos, constants, *state.sites["w"], state.batch
                    )

                for _ in range(written // chunk):
                    step(torch.randn(batch, chunk, 40), torch.randn(batch, chunk, 24), None)
                assert (form == "factored") == bool(state.column("w", FACTORED)[0])
                rows, h, t = (
                    state.sites["w"].rows.clone(),
                    torch.randn(batch, 1, 40),
                    torch.randn(batch, 1, 24),
                )

                def again(step=step, h=h, t=t, pos=pos, site=state.sites["w"], rows=rows) -> Tensor:
                    site.rows.copy_(rows)
                    return step(h, t, pos)

                steps[name] = again
            x = paired(steps, rounds, clock_of(torch.get_num_threads()))
            print(
                f"| {batch} | {form} | {' | '.join(f'{t.seconds * 1e6:.0f}' for t in x.values())} |",
                flush=True,
            )
            table.append({"batch": batch, "form": form, **_numbers(x)})
    return table


def _numbers(x: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(t) for name, t in x.items()}


def _cell(x: Timing) -> str:
    return f"{x.ratio:.2f} [{x.low:.2f}, {x.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layer", action="store_true", help="one projection alone")
    parser.add_argument("--host", action="store_true", help="what a step costs besides its bytes")
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rounds = a.rounds or (10 if a.quick else 40)
    batches = (1, 4) if a.quick else (1, 4, 16)
    if a.host:
        table = host(rounds * 10, batches)
    elif a.layer:
        table = one_layer(rounds, batches, (0, 256, 1024) if a.quick else (0, 256, 512, 1024))
    else:
        table = whole_model(rounds, batches, (0, 1) if a.quick else (0, 1, 2))
    if a.json:
        said = {"threads": a.threads, "rounds": rounds, "torch": torch.__version__, "rows": table}
        Path(a.json).write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
