"""A converted model compiled by Inductor for a CUDA device that is not there; run it as a program.

    python -m ttt_compiler.offline.whole_graphs --target sm_90

The graphs that AOTAutograd makes of the model on CPU are moved to a fake device, Inductor generates their
code, and every Triton kernel in it is compiled to machine code. Must not be interpreted. May be changed here:
which models and graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from ttt_compiler.compat import assembler
from ttt_compiler.compat.fake_cuda import compile_generated, fake_cuda, generated_kernels, generating
from ttt_compiler.offline.targets import Target, target
from ttt_compiler.stand_in import stands_for_gpu


@dataclass(frozen=True)
class Generated:
    """One Triton kernel of a generated graph.

    Attributes:
        graph: ``"forward"`` or ``"backward"``.
        name: of the kernel.
        ours: whether it is our template.
        registers: of a thread.
        spilled: bytes.
        shared: bytes of shared memory.
        matrix: instructions of matrix units.
    """

    graph: str
    name: str
    ours: bool
    registers: int
    spilled: int
    shared: int
    matrix: int


def llama(dtype: torch.dtype) -> torch.nn.Module:
    """A small converted Llama whose sites are large enough for real tiles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import ttt_compiler as ttt

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype)
    return ttt.convert(model, ttt.TTTConfig(layers="all", chunk_size=64, lr=0.3))


def generated(model: torch.nn.Module, to: Target, *, train: bool) -> list[tuple[str, str]]:
    """Generated modules of one call of ``model``, with their graphs' names."""
    from torch._inductor.compile_fx import compile_fx

    import ttt_compiler.codegen.lowering  # noqa: F401
    from ttt_compiler import compat

    sink: list[tuple[str, str]] = []
    assert isinstance(to.arch, int)

    def compile_there(gm: Any, inputs: Any, *, mode: Any, uuid: str) -> Any:
        assert isinstance(to.arch, int)
        with fake_cuda(to.arch, to.device, to.processors, to.shared_memory, to.l2):
            return compile_fx(gm, list(inputs), inner_compile=generating(sink))

    ids = torch.randint(0, 500, (2, 192))
    before = compat.inductor_compile
    compat.inductor_compile = compile_there
    try:
        torch._dynamo.reset()
        with (
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            torch._inductor.config.patch(force_disable_caches=True),
            torch.set_grad_enabled(train),
            stands_for_gpu(),
        ):
            model.train(train)
            torch.compile(model, backend="inplace_ttt")(input_ids=ids, use_cache=False)
    finally:
        compat.inductor_compile = before
    return sink


def compiled_kernels(model: torch.nn.Module, to: Target, *, train: bool) -> list[Generated]:
    """Every Triton kernel of the graphs, compiled."""
    found = []
    for graph, code in generated(model, to, train=train):
        if calls := re.findall(r"extern_kernels\.(ttt_\w+)|ops\.ttt\.(chunk_values\w*)", code):
            raise RuntimeError(f"the {graph} graph of a GPU calls what runs on a CPU: {calls}")
        for name, source in generated_kernels(code).items():
            assert isinstance(to.arch, int)
            with fake_cuda(to.arch, to.device, to.processors, to.shared_memory, to.l2):
                machine = compile_generated(name, source)
            used = assembler.instructions(machine, to.matrix_units)
            found.append(
                Generated(
                    graph=graph,
                    name=name,
                    ours="tl.dot(tl.trans(u), x, w" in source,
                    matrix=sum(used.values()),
                    **assembler.resources(machine),
                )
            )
    return found


def main() -> None:
    """Print every kernel, and fail when one of ours spills or none is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="sm_90", help="a CUDA architecture")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--inference", action="store_true", help="the forward graph alone")
    a = parser.parse_args()
    model = llama(getattr(torch, a.dtype))
    kernels = compiled_kernels(model, target(a.target), train=not a.inference)
    print(json.dumps([dataclasses.asdict(k) for k in kernels], indent=1))
    ours = [k for k in kernels if k.ours]
    if not ours or any(k.spilled for k in ours):
        raise SystemExit("no kernel of ours is there, or one spills")


if __name__ == "__main__":
    main()
