"""How many graphs are compiled, with fast weights and without: forward, generation, new sequences.

python -m bench.compile_counts
"""

from __future__ import annotations

import torch

import ttt_compiler as ttt
from tests import models
from ttt_compiler import compat

PROMPTS = (9, 10, 11)
STEPS, CHUNK = 200, 64


def count_ours() -> list[int]:
    counter = [0]
    original = compat.inductor_compile

    def counting(*args, **kwargs):
        counter[0] += 1
        return original(*args, **kwargs)

    compat.inductor_compile = counting
    model = models.converted(chunk_size=CHUNK)
    model.compile(backend="inplace_ttt", fullgraph=True)
    rows = run(model, counter)
    session = ttt.Session(model, batch_size=2)
    model.generate(models.ids(2, 9), past_key_values=session.cache, max_new_tokens=STEPS, do_sample=False)
    written = {w for row in session.state.chunks_written.values() for w in row}
    print(f"chunks written per sequence: {sorted(written)}")
    return rows


def count_base() -> list[int]:
    from torch._inductor.compile_fx import compile_fx

    counter = [0]

    def backend(gm, inputs):
        counter[0] += 1
        return compile_fx(gm, inputs)

    model = models.tiny()
    model.compile(backend=backend, fullgraph=True)
    return run(model, counter)


def run(model: torch.nn.Module, counter: list[int]) -> list[int]:
    rows = []
    with torch.no_grad():
        for _ in range(2):
            model(models.ids(2, 40), use_cache=False)
        rows.append(counter[0])
        for length in PROMPTS:
            before = counter[0]
            tokens = models.ids(2, length, seed=length)
            model.generate(tokens, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
            rows.append(counter[0] - before)
    return rows


def main() -> None:
    ours = count_ours()
    torch._dynamo.reset()
    base = count_base()
    names = ["forward at one length, twice"]
    names += [f"generate {STEPS} tokens, chunk {CHUNK}, prompt of {n}" for n in PROMPTS]
    print("| new graphs for | fast weights | plain model on Inductor |")
    print("|---|---|---|")
    for row in zip(names, ours, base, strict=True):
        print("| {} | {} | {} |".format(*row))


if __name__ == "__main__":
    main()
