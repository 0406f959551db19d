"""One line on real architectures: what is computed, what is refused, what is cached."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import ttt_compiler as ttt
from tests import models, unusual
from tests.tolerances import AUTOCAST, FP64, SEGMENTATION, assert_within_budget, relative_error
from ttt_compiler import backend
from ttt_compiler.architectures.oracle import oracle_call
from ttt_compiler.errors import (
    AlreadyConvertedError,
    CacheError,
    ConfigError,
    GraphRewriteError,
    NotCompiledError,
    NotConvertedError,
)
from ttt_compiler.passes import pipeline

OPTIONS = {"layers": "all", "chunk_size": 4, "lr": 1.0}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_one_line_converts_and_starts_as_the_base_model_bit_for_bit(family):
    """Law 5: zero conv == the base model compiled by Inductor."""
    # Shapes that Dynamo has learned to vary would give the two compilers different loops.
    torch._dynamo.reset()
    tokens = models.ids(2, 23)
    base = torch.compile(models.tiny(family), dynamic=False)
    model = models.tiny(family)
    compiled = torch.compile(model, backend="inplace_ttt", options=OPTIONS, dynamic=False)
    assert not any("ttt" in n for n, _ in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(compiled(tokens).logits, base(tokens).logits)
        assert sum("ttt_conv" in n for n, _ in model.named_parameters()) == 2
        # Prefill and one step; the borders of chunks fall inside of the prompt.
        kept = {
            "max_new_tokens": 2,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        base_model = models.tiny(family)
        base_model.compile(dynamic=False)
        ours, theirs = compiled.generate(tokens, **kept), base_model.generate(tokens, **kept)
        assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_compiled_equals_the_oracle(family, target):
    model = models.converted(family, target=target).double()
    model.compile(backend="inplace_ttt", fullgraph=True)
    tokens = models.ids(2, 23)
    with torch.no_grad():
        expected = models.oracle(model, tokens)
        out = model(tokens, use_cache=False).logits
        # Llama and Qwen3 normalise in fp32 whatever the model's dtype; GPT-2 is fp64 throughout.
        assert relative_error(out, expected) < (FP64 if family == "gpt2" else SEGMENTATION)
        with ttt.disabled(model):
            assert relative_error(model(tokens, use_cache=False).logits, expected) > 1e-3


def test_bfloat16_model_within_budget():
    """Law 7 on a whole model: stateless, streamed, generated."""
    tokens = models.ids(2, 23)
    model = models.converted().bfloat16()
    model.compile(backend="inplace_ttt", dynamic=True, fullgraph=True)
    with torch.no_grad():
        exact = models.oracle(models.converted().double(), tokens)
        plain = models.oracle(model, tokens)
        assert_within_budget(model(tokens, use_cache=False).logits, plain, exact)
        session = ttt.Session(model, batch_size=2)
        parts = [model(x, past_key_values=session.cache).logits for x in tokens.split([9, 1, 13], 1)]
        assert_within_budget(torch.cat(parts, 1), plain, exact)
    assert all(s.w.dtype == torch.float32 for s in session.state.sites.values())


def test_autocast_trains():
    tokens = models.ids(2, 23)
    grads = []
    for autocast in (False, True):
        model = models.converted().train()
        model.compile(backend="inplace_ttt")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grads[1][name].dtype == torch.float32
        assert relative_error(grads[1][name], grad) < AUTOCAST, name


def test_dynamic_shapes_use_one_graph(compiles):
    model = models.converted()
    model.compile(backend="inplace_ttt", dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, length in ((2, 23), (3, 9), (2, 5), (4, 16)):
            tokens = models.ids(batch, length)
            assert (
                relative_error(model(tokens, use_cache=False).logits, models.oracle(model, tokens))
                < SEGMENTATION
            )
    assert compiles.count == 1


@pytest.mark.parametrize("target", ["hidden_states", "input_embed"])
def test_gradients_and_checkpointing(target):
    tokens = models.ids(2, 23)
    grads = {}
    for kind in ("oracle", "compiled", "checkpointed"):
        model = models.converted(target=target).double().train()
        if kind == "oracle":
            grads[kind] = models.oracle_gradients(model, tokens)
            continue
        if kind == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.compile(backend="inplace_ttt")
        logits = model(tokens, use_cache=False).logits
        logits.square().mean().backward()
        grads[kind] = {n: p.grad for n, p in model.named_parameters()}
    for kind in ("compiled", "checkpointed"):
        for name, expected in grads["oracle"].items():
            assert relative_error(grads[kind][name], expected) < SEGMENTATION, (kind, name)
    assert all(g.any() for n, g in grads["compiled"].items() if "ttt" in n)


def test_packed_documents_equal_documents_apart():
    """Law 4, forward."""
    model = models.converted().double()
    model.compile(backend="inplace_ttt", dynamic=True)
    a, b = models.ids(1, 13, seed=3), models.ids(1, 10, seed=4)
    pos = torch.cat([torch.arange(13), torch.arange(10)])[None]
    with torch.no_grad():
        packed = model(torch.cat([a, b], 1), position_ids=pos, use_cache=False).logits
        expected = models.oracle(model, torch.cat([a, b], 1), pos=pos, position_ids=pos)
    assert relative_error(packed, expected) < SEGMENTATION


def test_left_padding_leaves_no_trace():
    """Law 4: a padded row equals the row alone."""
    model = models.converted().double()
    model.compile(backend="inplace_ttt", dynamic=True)
    tokens = models.ids(2, 14)
    mask = torch.ones(2, 14, dtype=torch.int64)
    mask[1, :5] = 0
    pos = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask, position_ids=pos, use_cache=False).logits
        alone = model(tokens[1:, 5:], use_cache=False).logits
    assert relative_error(padded[1:, 5:], alone) < SEGMENTATION


class TestRefusals:
    def test_unknown_option_is_refused_when_torch_compile_is_called(self):
        with pytest.raises(ConfigError, match=r"unknown option 'chunk'.*chunk_size"):
            torch.compile(models.tiny(), backend="inplace_ttt", options={"chunk": 4})

    def test_unknown_mode(self):
        with pytest.raises(ConfigError, match=r"unknown mode 'fast'.*max-autotune"):
            models.tiny().compile(backend="inplace_ttt", mode="fast")

    def test_conflicting_options(self):
        model = models.converted()
        with pytest.raises(AlreadyConvertedError, match="options"):
            model.compile(backend="inplace_ttt", options={"layers": "all", "chunk_size": 8})

    def test_a_function_around_an_unconverted_model(self):
        model = models.tiny()
        fn = torch.compile(lambda x: model(x, use_cache=False).logits, backend="inplace_ttt")
        with pytest.raises(BackendCompilerFailed, match="never converted") as e:
            fn(models.ids(2, 9))
        assert isinstance(e.value.inner_exception, NotConvertedError)

    def test_silent_eager_fallbacks_raise_and_say_why(self):
        model = models.converted()
        model.compile(backend="inplace_ttt")
        with torch.compiler.set_stance("force_eager"), pytest.raises(NotCompiledError) as e:
            model(models.ids(2, 9))
        assert "recompile_limit" in e.value.__notes__[0]

    def test_input_embeds_without_ids(self):
        model = models.converted(target="input_embed")
        model.compile(backend="inplace_ttt")
        with pytest.raises(GraphRewriteError, match="Pass input_ids"):
            model(inputs_embeds=torch.randn(2, 9, 32), use_cache=False)


def test_mode_reaches_inductor(monkeypatch):
    import torch._inductor.compile_fx as inductor

    seen = []
    original = inductor.compile_fx

    def spy(*args, **kwargs):
        if kwargs.get("config_patches"):
            seen.append(kwargs["config_patches"])
        return original(*args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    model = models.converted()
    model.compile(backend="inplace_ttt", mode="reduce-overhead")
    tokens = models.ids(2, 9)
    with torch.no_grad():
        out = model(tokens, use_cache=False).logits
    assert [patches["triton.cudagraphs"] for patches in seen] == [True]
    assert relative_error(out, models.oracle(model, tokens)) < SEGMENTATION


def test_a_function_around_a_converted_model_and_regional_compilation():
    tokens = models.ids(2, 9)
    model = models.converted()
    expected = models.oracle(model, tokens)
    with torch.no_grad():
        fn = torch.compile(lambda x: model(x, use_cache=False).logits, backend="inplace_ttt")
        assert relative_error(fn(tokens), expected) < SEGMENTATION
        for layer in model.model.layers:
            layer.compile(backend="inplace_ttt")
        assert relative_error(model(tokens, use_cache=False).logits, expected) < SEGMENTATION


class Breaking(unusual.Stack):
    """What stands behind the graph break is compiled as a function that all models of this class share."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def test_many_models_with_graph_breaks_in_one_process():
    torch._dynamo.reset()
    for seed in range(10):
        torch.manual_seed(seed)
        model = unusual.converted(Breaking(unusual.MLP()))
        with torch.no_grad():
            y = [model(unusual.inputs(n)) for n in (9, 11)]
        assert relative_error(y[1], oracle_call(model, unusual.inputs(11))) < SEGMENTATION


def test_any_module_streams_with_an_explicit_state():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    x = torch.randn(2, 23, 16)
    net = torch.compile(Net(), backend="inplace_ttt", options=OPTIONS, dynamic=True)
    with torch.no_grad():
        base = net(x)
        models.randomize(net)
        whole = net(x)
        assert relative_error(whole, base) > 1e-3
        session = ttt.Session(net, batch_size=2)
        parts = [net(x[:, a:b], ttt_state=session.state) for a, b in ((0, 7), (7, 8), (8, 23))]
    assert relative_error(torch.cat(parts, 1), whole) < SEGMENTATION
    assert session.tokens_seen == [23, 23]
    assert session.cache is None


class TestCaches:
    def test_changed_options_change_the_graph(self):
        tokens = models.ids(2, 9)
        for lr in (1.0, 2.0):
            model = models.converted(lr=lr)
            model.compile(backend="inplace_ttt")
            with torch.no_grad():
                assert (
                    relative_error(model(tokens, use_cache=False).logits, models.oracle(model, tokens))
                    < SEGMENTATION
                )

    def test_changed_source_misses_the_compile_cache(self, monkeypatch):
        from torch._dynamo.utils import counters

        def misses(uuid):
            monkeypatch.setattr(backend, "pipeline_uuid", lambda: uuid)
            torch._dynamo.reset()
            counters.clear()
            model = models.converted()
            model.compile(backend="inplace_ttt")
            with torch.no_grad():
                model(models.ids(2, 9), use_cache=False)
            hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
            return hits == 0

        with torch._inductor.utils.fresh_cache():
            assert misses("one")
            assert not misses("one"), "an unchanged pipeline should hit"
            assert misses("two"), "a changed source must never reuse a compiled graph"

    def test_uuid_follows_every_source_file(self, monkeypatch, tmp_path):
        import shutil
        from pathlib import Path

        package = Path(ttt.__file__).parent
        copy_ = tmp_path / "ttt_compiler"
        shutil.copytree(package, copy_)
        monkeypatch.setattr(ttt, "__file__", str(copy_ / "__init__.py"))
        fresh = pipeline.pipeline_uuid.__wrapped__
        before = fresh()
        assert fresh() == before
        kernel = copy_ / "codegen" / "cpu" / "scan.py"
        kernel.write_text(kernel.read_text() + "\n# changed\n")
        assert fresh() != before

    def test_match_counts(self, monkeypatch):
        seen = []
        original = backend.run_pipeline
        monkeypatch.setattr(backend, "run_pipeline", lambda gm: seen.append(original(gm)) or seen[-1])
        model = models.converted("gpt2")
        model.compile(backend="inplace_ttt")
        with torch.no_grad():
            model(models.ids(2, 9), use_cache=False)
        assert [r.matched for r in seen] == [
            {"match_markers": 2, "bind_targets": 2, "rewrite": 2, "causal_mask": 2, "verify": 2}
        ]
        names = [str(n.target) for n in seen[0].gm.graph.nodes]
        assert names.count("ttt.chunk_scan.default") == 2
        assert not any("site" in n for n in names)


class TestDoors:
    """Every way to compile a model either runs fast weights or says why not."""

    def test_a_compiled_forward_carries_state(self):
        tokens = models.ids(2, 11)
        for assign in (False, True):
            model = models.tiny()
            call = torch.compile(model.forward, backend="inplace_ttt", options=OPTIONS)
            if assign:
                model.forward = call
                call = model
            with torch.no_grad():
                call(tokens)
                models.randomize(model)
                cache = call(tokens[:, :6], use_cache=True).past_key_values
                out = call(tokens[:, 6:], past_key_values=cache).logits
                assert cache.ttt.tokens_seen == [11, 11]
                assert relative_error(out, models.oracle(model, tokens)[:, 6:]) < SEGMENTATION

    def test_other_methods_are_plain_functions(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = models.converted()

            def step(self, batch):
                return self.model(batch["ids"], use_cache=False).logits

        net, tokens = Net(), models.ids(2, 9)
        with torch.no_grad():
            out = torch.compile(net.step, backend="inplace_ttt")({"ids": tokens})
        assert relative_error(out, models.oracle(net.model, tokens)) < SEGMENTATION

    def test_a_part_called_by_itself_refuses_state(self):
        model = models.converted()
        model.model.compile(backend="inplace_ttt")
        with pytest.raises(CacheError, match="part of a converted model"):
            model.model(models.ids(1, 5), use_cache=True)
        model.model(models.ids(1, 5), use_cache=False)

    def test_blocks_that_were_not_chosen_stay_as_they_are(self):
        model = models.converted(layers=[1])
        names = [n for n, _ in model.named_parameters()]
        for layer in model.model.layers:
            layer.compile(backend="inplace_ttt")
        tokens = models.ids(2, 9)
        with torch.no_grad():
            out = model(tokens, use_cache=False).logits
        assert [n for n, _ in model.named_parameters()] == names
        assert relative_error(out, models.oracle(model, tokens)) < SEGMENTATION

    def test_regional_compilation_carries_state_and_records_no_graph(self):
        model = models.converted()
        for layer in model.model.layers:
            layer.compile(backend="inplace_ttt")
        tokens = models.ids(1, 11)
        session = ttt.Session(model)
        parts = [model(x, past_key_values=session.cache).logits for x in tokens.split([6, 5], 1)]
        assert not parts[0].requires_grad
        assert relative_error(torch.cat(parts, 1), models.oracle(model, tokens)) < SEGMENTATION
        handle = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens, past_key_values=session.cache)
        handle.remove()
        assert model._ttt_root.context.state is None

    def test_a_reverted_model_is_not_converted_again_by_its_wrapper(self):
        model = models.tiny()
        compiled = torch.compile(model, backend="inplace_ttt", options=OPTIONS)
        tokens = models.ids(1, 5)
        compiled(tokens, use_cache=False)
        expected = models.tiny()(tokens).logits
        ttt.revert(model)
        with pytest.raises(NotConvertedError, match="reverted"):
            compiled(tokens)
        assert torch.equal(model(tokens).logits, expected)

    def test_hooks_see_the_arguments_as_they_were_passed(self):
        model = models.converted()
        seen = []
        model.register_forward_pre_hook(lambda m, args: seen.append(len(args)))
        model.compile(backend="inplace_ttt")
        with torch.no_grad():
            model(models.ids(1, 5), use_cache=False)
        assert seen == [1]

    def test_compiling_twice_and_options_on_a_function(self):
        inner = torch.compile(models.converted(), backend="inplace_ttt")
        tokens = models.ids(1, 5)
        with torch.no_grad():
            out = torch.compile(inner, backend="inplace_ttt")(tokens, use_cache=False).logits
        assert relative_error(out, models.oracle(inner._orig_mod, tokens)) < SEGMENTATION
        with pytest.raises(ConfigError, match="unknown option"):
            torch.compile(lambda x: x, backend="inplace_ttt", options={"chunk": 4})


class TestStateBelongsToItsWeights:
    @pytest.fixture(scope="class")
    def model(self):
        model = models.converted()
        model.compile(backend="inplace_ttt", dynamic=True)
        return model

    def test_a_state_of_another_model_of_the_same_shape(self, model):
        session = ttt.Session(model)
        model(models.ids(1, 6), past_key_values=session.cache)
        other = models.converted()
        other.compile(backend="inplace_ttt", dynamic=True)
        with pytest.raises(CacheError, match="belongs to another model"):
            other(models.ids(1, 6), past_key_values=session.cache)
        assert session.tokens_seen == [6]

    def test_weights_trained_under_a_running_session(self, model):
        session = ttt.Session(model)
        model(models.ids(1, 6), past_key_values=session.cache)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
        with pytest.raises(CacheError, match="trained or loaded since"):
            model(models.ids(1, 6), past_key_values=session.cache)
        session.reset()
        tokens = models.ids(1, 6)
        out = model(tokens, past_key_values=session.cache).logits
        assert relative_error(out, models.oracle(model, tokens)) < SEGMENTATION

    def test_autocast_sessions(self, model):
        tokens = models.ids(1, 14)
        session = ttt.Session(model)
        with torch.autocast("cpu", torch.bfloat16):
            parts = [model(x, past_key_values=session.cache).logits for x in tokens.split([6, 1, 7], 1)]
        assert session.tokens_seen == [14]
        assert relative_error(torch.cat(parts, 1).float(), models.oracle(model, tokens)) < AUTOCAST

    def test_an_explicit_state_is_checked(self, model):
        with pytest.raises(CacheError, match="3 sequences, but the call has 2"):
            model(models.ids(2, 5), use_cache=False, ttt_state=ttt.Session(model, 3).state)
