"""The command ``ttt-compiler``.

May be changed here: commands and their options. A command only parses, calls, and prints: what it
does lives elsewhere. A :class:`TTTError` becomes one red line and exit code 2, never a traceback.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import ttt_compiler
from ttt_compiler.config import Layers, TTTConfig
from ttt_compiler.errors import TTTError

_MISSING = "the command line needs the package {}. Type: pip install 'ttt_compiler[{}]'"

try:
    import typer
except ImportError as missing:
    print(_MISSING.format(missing.name, "demo"), file=sys.stderr)
    raise SystemExit(2) from None

app = typer.Typer(
    name="ttt-compiler",
    help='In-Place Test-Time Training by torch.compile(model, backend="inplace_ttt").',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_LAYERS = "all, every:K, every:K+OFFSET, block indices (0,6,12), or glob patterns over weight names."
_MODEL = "smollm2 (the packaged SmolLM2-135M), a folder, a .gguf file, or a name on the hub."
_PLANNED = "A folder with a config.json, a .gguf file, smollm2, or a known name such as Qwen3-4B."

# Options of ``bench`` that only predictions read, and only measurements.
_PREDICTED = ("model", "device", "layers", "chunk_size")
_MEASURED = ("quick", "full", "threads", "rounds", "only", "plots", "tuned_allocator")

LayersOption = Annotated[str, typer.Option(help=_LAYERS)]
ChunkOption = Annotated[int, typer.Option(help="Tokens per write.")]
RateOption = Annotated[float, typer.Option(help="eta in W += eta * v^T h.")]
TargetOption = Annotated[str, typer.Option(help="hidden_states or input_embed.")]


def main() -> None:
    """Entry point of the console script."""
    if not sys.stderr.isatty():
        # Loading bars of other libraries would fill a log file.
        os.environ.setdefault("TQDM_DISABLE", "1")
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"ttt_compiler {ttt_compiler.__version__}")
        raise typer.Exit


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    layers: LayersOption = "every:6",
    chunk_size: ChunkOption = 1024,
    lr: RateOption = 0.3,
    target: TargetOption = "hidden_states",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with the blocks and their dataflow drawn.")
    ] = None,
) -> None:
    """Say which MLPs of MODEL would become fast weights, why not the others, and the cost."""
    with _friendly():
        config = TTTConfig(layers=parse_layers(layers), chunk_size=chunk_size, lr=lr, target=target)
        from ttt_compiler.pretrained import load_pretrained
        from ttt_compiler.report import explain as explain_model
        from ttt_compiler.report_html import check_path

        if html is not None:
            check_path(html)  # before a model is loaded for nothing
        loaded, _ = load_pretrained(model)
        report = explain_model(loaded, config)
        typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else str(report))
        if html is not None:
            # Standard output is the report alone, so that --json can be read by a program.
            typer.echo(f"written: {report.save_html(html)}", err=True)


@app.command()
def memory(
    model: Annotated[str, typer.Argument(help=_PLANNED)],
    batch: Annotated[int, typer.Option(help="Sequences that run side by side.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 32768,
    layers: LayersOption = "every:6",
    chunk_size: ChunkOption = 1024,
    target: TargetOption = "hidden_states",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or float64. Default: the model's own.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Of a static cache that reserves the context.")
    ] = False,
    revocable: Annotated[int, typer.Option(help="How many of the last tokens can be taken back.")] = 0,
    device: Annotated[str, typer.Option(help="Where it will run: cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Say what memory a running batch of MODEL needs; nothing is loaded or allocated."""
    with _friendly():
        config = TTTConfig(layers=parse_layers(layers), chunk_size=chunk_size, target=target)
        from ttt_compiler.memory import memory_plan

        cache = "static" if static else "dynamic"
        plan = memory_plan(
            model, batch, context, config, dtype=dtype, cache=cache, revocable=revocable, device=device
        )
        typer.echo(json.dumps(plan.to_dict(), indent=1) if as_json else str(plan))


@app.command()
def bench(
    context: typer.Context,
    plan: Annotated[bool, typer.Option("--plan", help="Predict from shapes; nothing runs.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"Of a plan. {_PLANNED} May be repeated. Default: the published ones."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a plan. A100, H100, H200, B200, MI300X, H800, cpu. May be repeated. Default: all GPUs."
        ),
    ] = None,
    layers: LayersOption = "every:6",
    chunk_size: ChunkOption = 1024,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, few rounds: under 3 minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The dear cases too: hours.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of every comparison.")] = None,
    only: Annotated[str | None, typer.Option(help="By name: 'prefill and float32'.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures (SVG).")] = None,
    tuned_allocator: Annotated[
        bool, typer.Option("--tuned-allocator", help="Let malloc keep large blocks (glibc).")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page here instead of printing it.")] = None,
) -> None:
    """Measure fast weights on this machine (from a source checkout), or predict what they cost (--plan)."""
    with _friendly():
        _refuse(context, _MEASURED if plan else _PREDICTED, "leave out" if plan else "type")
        if not plan:
            _require("pytest", "pytest_benchmark", "transformers", "matplotlib", extra="bench")
            from ttt_compiler.suite import SuiteOptions, run_suite

            options = SuiteOptions(
                quick=quick,
                full=full,
                threads=threads,
                rounds=rounds,
                only=only,
                json=json_file,
                markdown=markdown,
                plots=plots,
                tuned_allocator=tuned_allocator,
            )
            run_suite(options, say=lambda text: typer.echo(text, nl=False))
            for path in filter(None, (json_file, markdown)):
                typer.echo(f"written: {path}", err=True)
            return
        _require("transformers")
        from ttt_compiler.architectures.presets import PRESETS
        from ttt_compiler.codegen.devices import DEVICES, device_named
        from ttt_compiler.roofline import roofline

        found = roofline(
            tuple(model or PRESETS),
            [device_named(name) for name in device] if device else DEVICES,
            TTTConfig(layers=parse_layers(layers), chunk_size=chunk_size),
        )
        if json_file is not None:
            _write(json_file, json.dumps(found.to_dict(), indent=1) + "\n")
        if markdown is not None:
            _write(markdown, str(found))
        else:
            typer.echo(str(found), nl=False)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=_MODEL)] = "smollm2",
    document: Annotated[
        Path | None, typer.Option(help="A UTF-8 text. Default: Python's language reference.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for plot, numbers and session.")] = Path("demo-output"),
    tokens: Annotated[int, typer.Option(help="How much of the document is read.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens that attention sees at most.")] = 1024,
    block: Annotated[int, typer.Option(help="Tokens per call.")] = 512,
    sink: Annotated[int, typer.Option(help="First tokens that stay in the window.")] = 4,
    continuation: Annotated[int, typer.Option(help="Tokens to generate at the end.")] = 32,
    layers: LayersOption = "every:6",
    chunk_size: ChunkOption = 512,
    lr: RateOption = 0.3,
    target: TargetOption = "hidden_states",
    adapter: Annotated[
        Path | None,
        typer.Option(help="A trained adapter; it brings its own layers, chunk size, lr, target."),
    ] = None,
    random_adapter: Annotated[
        bool, typer.Option("--random-adapter", help="A random adapter, to see state move.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random adapter.")] = 0,
) -> None:
    """Read a document longer than the model's window with static and with fast weights."""
    with _friendly():
        _require("rich", "matplotlib")
        from rich.console import Console

        from ttt_compiler.demo import DemoOptions, run_demo
        from ttt_compiler.demo_view import View, write_files

        options = DemoOptions(
            model=model,
            document=document,
            out=out,
            tokens=tokens,
            window=window,
            block=block,
            sink=sink,
            continuation=continuation,
            layers=parse_layers(layers),
            chunk_size=chunk_size,
            lr=lr,
            target=target,
            adapter=adapter,
            random_adapter=random_adapter,
            seed=seed,
        )
        view = View(Console())
        result = run_demo(options, say=view.say, track=view.track)
        view.show(options, result)
        typer.echo(f"written: {', '.join(str(path) for path in write_files(options, result))}")


@app.command()
def doctor(
    architectures: Annotated[
        bool, typer.Option("--architectures", help="Try every architecture that transformers knows.")
    ] = False,
    types: Annotated[str | None, typer.Option(help="Only these, as llama,gpt2. Default: all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many processes try them.")] = 1,
    write: Annotated[
        Path | None, typer.Option(help="Write the rows of these types into this page, made if missing.")
    ] = None,
) -> None:
    """Say what this machine offers, and what is missing; exit code 1 when something required is."""
    with _friendly():
        if not architectures:
            if types is not None or write is not None:
                raise TTTError("--types and --write belong to --architectures: type that too")
            from ttt_compiler.doctor import diagnose

            diagnosis = diagnose()
            typer.echo(str(diagnosis))
            raise typer.Exit(1 if diagnosis.missing else 0)
        _require("rich", "transformers")
        from rich.console import Console

        from ttt_compiler.architectures.refresh import chosen_types, refresh

        refresh(chosen_types(types), jobs=jobs, write=write, console=Console())
        if write is not None:
            typer.echo(f"written: {write}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    host: Annotated[str, typer.Option(help="Address to listen on; there is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    sessions: Annotated[
        Path | None, typer.Option(help="Folder that keeps sessions over restarts. Default: in memory alone.")
    ] = None,
    max_sessions: Annotated[int, typer.Option(help="Sessions in memory at a time.")] = 16,
    max_body: Annotated[int, typer.Option(help="Bytes of a request at most.")] = 8 * 2**20,
    layers: LayersOption = "every:6",
    chunk_size: ChunkOption = 1024,
    lr: RateOption = 0.3,
    target: TargetOption = "hidden_states",
    adapter: Annotated[
        Path | None,
        typer.Option(help="A trained adapter; it brings its own layers, chunk size, lr, target."),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, or plain. Default: the tokenizer's own.")
    ] = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Run op by op, without compiling: slow, starts at once.")
    ] = False,
) -> None:
    """Serve MODEL by OpenAI's chat API; the field "session" keeps a conversation's fast weights."""
    with _friendly():
        _require("fastapi", "uvicorn", "transformers", extra="serve")
        from ttt_compiler.serve.launch import ServeOptions
        from ttt_compiler.serve.launch import serve as run_server

        options = ServeOptions(
            model=model,
            config=TTTConfig(layers=parse_layers(layers), chunk_size=chunk_size, lr=lr, target=target),
            adapter=adapter,
            chat_template=chat_template,
            sessions=sessions,
            max_sessions=max_sessions,
            max_body=max_body,
            host=host,
            port=port,
            eager=eager,
        )
        run_server(options, say=lambda text: typer.echo(text, err=True))


def parse_layers(text: str) -> Layers:
    """``layers=`` from its command-line form."""
    # A plain word is no pattern: let the configuration say what it should have been.
    if not set(text) & set(",.*?[") and not text.isdecimal():
        return text
    parts = tuple(part.strip() for part in text.split(","))
    return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else parts


@contextlib.contextmanager
def _friendly() -> Iterator[None]:
    try:
        yield
    except TTTError as e:
        first, _, rest = str(e).partition("\n")
        typer.secho(f"error: {first}", fg=typer.colors.RED, err=True)
        if rest:
            typer.echo(rest, err=True)
        raise typer.Exit(2) from e


def _refuse(context: typer.Context, names: tuple[str, ...], verb: str) -> None:
    """Options that would be ignored, by what has to be done about --plan."""
    typed = [n for n in names if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"]
    if typed:
        options = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise TTTError(f"{options}: nothing reads this here, {verb} --plan")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as e:
        raise TTTError(f"{path} cannot be written: {e.strerror}") from e
    typer.echo(f"written: {path}", err=True)


def _require(*packages: str, extra: str = "demo") -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise TTTError(_MISSING.format(package, extra))
