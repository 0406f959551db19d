"""What a running sequence's fast weights take: by the formula, in tensors, and in the process.

    python -m bench.state_memory          # SmolLM2-135M, every 6th layer, C=256; a minute

The process is looked at after a session is made, and when every row has a matrix of its own. Keys and values
are subtracted by their exact size.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
from pathlib import Path

import torch

import ttt_compiler as ttt
from ttt_compiler.pretrained import load_pretrained
from ttt_compiler.runtime.tables import bytes_per_sequence

MIB = 2**20


def resident() -> int:
    """Bytes of this process that are in memory, without what the allocator holds back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("chunk", 256), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--quick", action="store_true", help="two sequences only")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = load_pretrained("smollm2")[0]
    ttt.convert(model, ttt.TTTConfig(layers="every:6", chunk_size=a.chunk, lr=0.3))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if name.rpartition(".")[2].startswith("ttt_"):
            p.copy_(torch.randn(p.shape) * 0.02)
    model.compile(backend="inplace_ttt_eager", dynamic=True)

    def read(session: ttt.Session, tokens: int) -> None:
        ids = torch.randint(
            0, 1000, (session.batch_size, a.chunk), generator=torch.Generator().manual_seed(0)
        )
        while session.tokens_seen[0] < tokens:
            model(input_ids=ids, past_key_values=session.cache)

    print("| B | read | form | formula MiB per sequence | tensors / formula | process / formula |")
    print("|---|---|---|---|---|---|")
    table = []
    for batch in (2,) if a.quick else (1, 2, 4, 8):
        # Once before, so that workspaces and compiled code are there.
        read(ttt.Session(model, batch), a.chunk)
        start = resident()
        session = ttt.Session(model, batch)
        for tokens in (0, a.chunk):
            read(session, tokens)
            said = session.describe()
            formula = bytes_per_sequence(session.state.specs, torch.float32, spread=True)
            assert formula * batch == session.state.nbytes
            held = resident() - start - said["cache_bytes"]
            row = {
                "batch": batch,
                "tokens": session.tokens_seen[0],
                "form": "dense" if tokens else "W0",
                "formula_bytes": formula,
                "tensor_ratio": session.state.nbytes / (formula * batch),
                "process_ratio": held / (formula * batch),
            }
            table.append(row)
            print(
                f"| {batch} | {row['tokens']} | {row['form']} | {formula / MIB:.2f} "
                f"| {row['tensor_ratio']:.3f} | {row['process_ratio']:.3f} |",
                flush=True,
            )
        # Nothing of this session may be there when the next one's growth is taken.
        del session
    if a.json:
        Path(a.json).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
