"""Saving and loading what a model has read: SmolLM2-135M after 16k tokens.

    python -m bench.session_io            # 16384 tokens, every 6th layer, C=512; several minutes of reading

With all keys and values, and with a window of the last 1024 tokens (what a session costs that lives by its
fast weights). Loading is checked bit for bit before its time is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import ttt_compiler as ttt
from ttt_compiler.pretrained import load_pretrained
from ttt_compiler.runtime.files import read_header
from ttt_compiler.runtime.rows import export_row
from ttt_compiler.runtime.tables import bytes_per_sequence


def same(a: ttt.Session, b: ttt.Session) -> bool:
    """Fast weights, keys and values bit for bit."""
    rows = all(
        torch.equal(x, y)
        for s in a.state.specs
        for x, y in zip(*(export_row(z.state, s.key, 0).values() for z in (a, b)), strict=True)
    )
    layers = zip(a.cache.layers, b.cache.layers, strict=True)
    return rows and all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in layers)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("tokens", 16384), ("piece", 512), ("chunk", 512), ("threads", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = load_pretrained("smollm2")[0]
    ttt.convert(model, ttt.TTTConfig(layers="every:6", chunk_size=a.chunk, lr=0.3))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if name.rpartition(".")[2].startswith("ttt_"):
            p.copy_(torch.randn(p.shape) * 0.02)
    model.compile(backend="inplace_ttt_eager", dynamic=True)
    session = ttt.Session(model)
    formula = bytes_per_sequence(session.state.specs, torch.float32, spread=True)
    assert session.state.nbytes == formula
    print(f"fast weights: {formula:,} bytes by the formula, {session.state.nbytes:,} held")
    ids = torch.randint(0, 1000, (1, a.tokens), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for i in range(0, a.tokens, a.piece):
        model(ids[:, i : i + a.piece], past_key_values=session.cache)
    print(f"read {a.tokens} tokens in {time.perf_counter() - start:.0f} s, {a.threads} threads")
    print("| what is kept | compress | file MiB | save s | load s | largest relative error of W - W0 |")
    print("|---|---|---|---|---|---|")
    for kept in ("all keys and values", "the last 1024"):
        if kept != "all keys and values":
            session.evict(keep=1024)
        for method in (None, "bf16", "int8", "lowrank:64"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "s.ttt"
                save, load = [], []
                for _ in range(a.rounds):
                    start = time.perf_counter()
                    session.save(path, compress=method)
                    save.append(time.perf_counter() - start)
                    start = time.perf_counter()
                    loaded = ttt.Session.load(model, path)
                    load.append(time.perf_counter() - start)
                assert method is not None or same(session, loaded)
                said = read_header(path, ttt.errors.SnapshotError)[0].get("compress", {})
                error = max(said.get("relative_errors", {"": 0.0}).values())
                print(
                    f"| {kept} | {method or 'no'} | {path.stat().st_size / 2**20:.0f} "
                    f"| {statistics.median(save):.2f} | {statistics.median(load):.2f} | {error:.1e} |"
                )


if __name__ == "__main__":
    main()
