"""Seconds until a compiled model has answered, and has decoded a token: one fresh process per start.

    python -m bench.startup ours        # static or ours; a JSON object on the last line

With ``TORCHINDUCTOR_CACHE_DIR`` in an empty folder a start is cold; another one with the same folder is warm.
Kernels of ours in C++ lie in that folder too. ``bench/suite/test_startup.py`` does both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

WHO = ("static", "ours")
TOKENS, CHUNK = 64, 16


def start(who: str) -> dict[str, float]:
    """Import, a small model's first and second call, then a prompt with a cache and two tokens behind it.

    Seconds of each, by the wall's clock. A first token waits for the operator that decodes, which is built
    beside the calls before it.
    """
    begin = time.perf_counter()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if who == "ours":
        import ttt_compiler as ttt
    imported = time.perf_counter()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval()
    if who == "ours":
        ttt.convert(model, ttt.TTTConfig(layers="all", chunk_size=CHUNK))
        model.compile(backend="inplace_ttt")
    else:
        model.compile()
    ids = torch.ones(1, TOKENS, dtype=torch.int64)
    built = time.perf_counter()
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=False).logits
        answered = time.perf_counter()
        second = model(input_ids=ids, use_cache=False).logits
        again = time.perf_counter()
        prompt = model(input_ids=ids, use_cache=True)
        kept = time.perf_counter()
        tokens = []
        for _ in range(2):
            token = model(input_ids=ids[:, :1], past_key_values=prompt.past_key_values).logits
            tokens.append((token, time.perf_counter()))
    assert torch.equal(first, second), "two calls differ: no timing"
    torch.testing.assert_close(prompt.logits, first)
    (token, decoded), (_, next_one) = tokens
    assert bool(token.isfinite().all()), "a token's logits are no numbers: no timing"
    return {
        "import": imported - begin,
        "build": built - imported,
        "first call": answered - built,
        "second call": again - answered,
        "until the first answer": answered - begin,
        "first prompt with a cache": kept - again,
        "first token": decoded - kept,
        "second token": next_one - decoded,
        "until the first token": decoded - begin,
    }


def fresh(who: str, folder: Path) -> dict[str, float]:
    """The same in a process of its own with one thread, which keeps compiled code in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.startup", who],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1])))
