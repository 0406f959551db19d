"""The private APIs that ``compat.py`` leans on are where it expects them."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import torch
from torch import nn

from ttt_compiler import backend, compat
from ttt_compiler.compat import processor


def test_checked_version():
    assert torch.__version__.startswith(compat.CHECKED_TORCH)


def test_compile_hook_sees_backend_and_options():
    from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule

    assert getattr(OptimizeContext.__call__, "_ttt_hook", False)
    module = nn.Linear(2, 2)
    optimized = torch.compile(module, backend="inplace_ttt", options={"chunk_size": 7})
    assert isinstance(optimized, OptimizedModule)
    compiler_fn, kwargs = compat.compiling_backend(optimized.dynamo_ctx)
    assert compiler_fn is backend.inplace_ttt
    assert kwargs["options"] == {"chunk_size": 7}
    assert module._compiled_call_impl is optimized.forward


def test_other_backends_are_left_alone():
    module = nn.Linear(2, 2)
    torch.compile(module, backend="eager")
    assert module._compiled_call_impl is None
    x = torch.ones(1, 2)
    assert torch.equal(torch.compile(module, backend="eager")(x), module(x))


def test_a_call_of_a_module_that_is_ours_stays_ours():
    """``generate`` compiles ``model.__call__`` by itself for static caches."""
    module = nn.Linear(2, 2)
    assert torch.compile(module.__call__, backend="eager") != module.__call__
    module.compile(backend="inplace_ttt_eager")
    assert torch.compile(module.__call__, backend="eager") == module.__call__
    compat.forget_compiled_call(module)
    assert torch.compile(module.__call__, backend="eager") != module.__call__


def test_own_code_gives_each_function_its_own_code():
    def f(x):
        return x

    a, b = compat.own_code(f), compat.own_code(f)
    assert a.__code__ is not b.__code__
    assert a(3) == b(3) == 3


def test_modes():
    assert {"default", "reduce-overhead", "max-autotune"} <= set(compat.inductor_modes())


def test_fork_leaves_dynamos_graph_alone():
    seen = []

    def record(gm, inputs):
        before = str(gm.graph)
        forked = compat.fork_graph_module(gm)
        for old, new in zip(gm.graph.nodes, forked.graph.nodes, strict=True):
            assert old is not new
            assert getattr(old, "_dynamo_source", None) is getattr(new, "_dynamo_source", None)
        forked.graph.placeholder("extra")
        assert str(gm.graph) == before
        seen.append(gm)
        return gm.forward

    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.compile(model, backend=record)(torch.ones(1, 2))
    assert seen


def run_fresh(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_is_light_and_the_entry_point_needs_no_import():
    run_fresh(
        """
        import sys, torch
        import torch._dynamo
        assert "inplace_ttt" in torch._dynamo.list_backends()
        assert not any(m.startswith("ttt_compiler") for m in sys.modules)
        before = set(sys.modules)
        import ttt_compiler
        new = {m.partition(".")[0] for m in set(sys.modules) - before}
        assert new <= {"ttt_compiler", "importlib"}, new
        assert ttt_compiler.TTTConfig().chunk_size == 1024
        assert set(ttt_compiler.__all__) <= set(dir(ttt_compiler))
        """
    )


def test_nodes_know_the_modules_and_calls_they_come_from():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner(x))

    model, stacks = Twice(), []

    def look(gm, inputs):
        stacks.extend(compat.module_stack(n) for n in gm.graph.nodes if "linear" in n.name)
        return gm.forward

    torch.compile(model, backend=look)(torch.randn(2, 4))
    assert [key for stack in stacks for key, _ in stack[:1]] == [id(model.inner)] * 2
    assert stacks[0] != stacks[1], "the two calls are told apart"


def test_the_wrapper_of_an_inner_tensor_is_found():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, found = nn.Linear(32, 32, bias=False), []
    quantize_(model, Int8WeightOnlyConfig())
    inner = compat.inner_tensor(model.weight)
    assert inner
    assert not compat.inner_tensor(torch.ones(2))

    def look(gm, inputs):
        nodes = gm.graph.find_nodes(op="placeholder")
        found.extend(compat.wrapper_of(n) for n in nodes)
        found.append([n for n in nodes if compat.is_wrapper_tensor(compat.meta_tensor(n))])
        return gm.forward

    def fn(x):
        return model(x) + getattr(model.weight, inner).sum()

    torch.compile(fn, backend=look)(torch.randn(2, 32))
    *wrappers, (wrapper,) = found
    assert [w for w in wrappers if w is not None] == [wrapper]


def test_public_names_exist():
    import ttt_compiler

    for name in ttt_compiler.__all__:
        assert getattr(ttt_compiler, name) is not None
    # A module of the same name must never take a function's place.
    assert callable(ttt_compiler.convert)


def test_rooms_import_downwards_only():
    """config -> passes -> codegen -> runtime: a lower row never imports a higher one."""
    import ast
    from pathlib import Path

    import ttt_compiler

    package = Path(ttt_compiler.__file__).parent
    top = {f"ttt_compiler.{p.stem}" for p in package.glob("*.py")}
    shared = {f"ttt_compiler.{n}" for n in ("config", "spec", "errors", "compat", "stand_in")}
    above = {"ttt_compiler.discovery", "ttt_compiler.architectures"} | (top - shared)
    forbidden = {
        "passes": {"ttt_compiler.codegen", "ttt_compiler.runtime"} | above,
        "codegen": {"ttt_compiler.passes", "ttt_compiler.runtime"} | above,
        "runtime": {"ttt_compiler.passes"} | above,
        "discovery": {"ttt_compiler.codegen", "ttt_compiler.runtime"} | (above - {"ttt_compiler.discovery"}),
    }
    for room, banned in forbidden.items():
        for file in (package / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    inside = f"{node.module}."
                    assert not any(inside.startswith(f"{b}.") for b in banned), (file, node.module)


def test_torch_exports_the_products_of_its_onednn():
    """Where they are missing, writes are torch's own: right, and up to twice as slow."""
    assert processor.onednn_product()
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert all(map(processor.block_product, (torch.float32, torch.bfloat16)))
    assert processor.block_product(torch.float16) is None
    assert processor._symbol("no_such_function") is None
    x = torch.ones(2)
    assert processor.tensor_in_cpp(x) == processor.tensor_in_cpp(x) != processor.tensor_in_cpp(torch.ones(2))


def test_what_the_doctor_asks_inductor(monkeypatch, tmp_path):
    assert processor.cpp_compiler()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert processor.cpp_compiler() is None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert compat.inductor_cache() == str(tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()


def test_below_autograd_nothing_is_recorded():
    x = torch.ones(2, requires_grad=True)
    with compat.below_autograd():
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad
