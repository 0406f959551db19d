"""What becomes of a suite's figures: report, pictures, and the command in front of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import goals, plots, report, results
from bench.page import Block, markdown, text
from ttt_compiler import suite
from ttt_compiler.cli import app
from ttt_compiler.errors import TTTError

SHAPE = {"d": 64, "f": 128, "tokens": 256, "chunk": 32, "batch": 1, "dtype": "float32"}
ENVIRONMENT = {"cpu": "a processor", "threads": 1, "isa": ["avx2", "avx512f"]}


def timed(seconds: float, ratio: float) -> dict[str, float]:
    return {"seconds": seconds, "ratio": ratio, "low": ratio - 0.25, "high": ratio + 0.25}


PREFILL = {
    "kind": "prefill",
    "shape": SHAPE,
    "flops": 2e9,
    "static_flops": 1e9,
    "times": {
        "static": timed(0.011, 1.0),
        "torch.mm": timed(0.010, 0.9),
        "ours": timed(0.025, 2.25),
        "official inference loop": timed(0.040, 3.6),
    },
    "ours_over": {"official inference loop": {"ratio": 0.62, "low": 0.6, "high": 0.65}},
}
GROWTH = {
    "kind": "growth",
    "shape": {**SHAPE, "variable": "T"},
    "variable": "T",
    "values": [256, 512],
    "times": {
        "static @ 256": timed(0.001, 1.0),
        "ours @ 256": timed(0.002, 2.0),
        "static @ 512": timed(0.002, 1.0),
        "ours @ 512": timed(0.004, 2.0),
    },
    "bytes": {"ours": [2**20, 3 * 2**20]},
    "fit": {"static": {"exponent": 1.0, "r2": 1.0}, "ours": {"exponent": 1.02, "r2": 0.99}},
    "fit_bytes": {"ours": {"exponent": 1.58, "r2": 1.0}},
}
LAYERS = {
    **GROWTH,
    "variable": "layers",
    "shape": {"model": "Llama", "variable": "layers"},
    "fit": {"ours": {"slope": 0.0015, "intercept": 0.1, "r2": 0.9}},
    "fit_bytes": {"ours": {"slope": 2.0**19, "intercept": 2.0**20, "r2": 1.0}},
}
BORDER = {"kind": "border", "shape": SHAPE, "steps": {"ours": [0.001, 0.001, 0.009], "static": [0.001] * 3}}
MEMORY = {
    "kind": "memory, training",
    "shape": {**SHAPE, "variable": "T"},
    "variable": "T",
    "values": [256, 512],
    "bytes": {"static": [2**20, 2**21], "ours": [2**21, 2**22], "official": [2**22, 2**24]},
    "extra_bytes": {"ours": [2**20, 2**21], "official": [3 * 2**20, 14 * 2**20]},
    "extra_ratio": [1 / 3, 1 / 7],
    "fit_bytes": {"ours": {"exponent": 1.0, "r2": 1.0}},
    "fit_extra": {"ours": {"exponent": 1.0, "r2": 1.0}, "official": {"exponent": 2.22, "r2": 1.0}},
}
PHASES = {"import": 1.5, "first call": 6.0, "until the first answer": 9.0}
STARTUP = {
    "kind": "startup",
    "shape": {"model": "Llama"},
    "seconds": {"static, cold": PHASES, "ours, cold": {**PHASES, "first call": 7.25}},
    "ratio": {"cold": 1.14},
}


@pytest.fixture
def record(tmp_path):
    """A function that writes a file as pytest-benchmark does."""

    def write(*infos: dict, name: str = "run.json", **environment: object) -> Path:
        benchmarks = [{"name": f"test_{i}", "extra_info": info} for i, info in enumerate(infos)]
        path = tmp_path / name
        machine = {"ttt": {**ENVIRONMENT, **environment}}
        path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": machine}))
        return path

    return write


def rows(block: Block) -> dict[str, dict[str, str]]:
    return {row[1]: dict(zip(block.head, row, strict=True)) for row in block.rows}


def test_figures_of_a_layer(record):
    cases = results.load([record(PREFILL)])
    blocks = {b.title: b for b in report.report(cases)}
    assert blocks["Environment"].lines == ["cpu: a processor", "threads: 1", "isa: avx2, avx512f"]
    assert "Missing in the file" not in blocks
    found = rows(blocks["Prefill"])
    # Twice the FLOPs of a product that the faster library does in 10 ms.
    assert cases[0].floor() == pytest.approx(0.020)
    assert found["ours"] == {
        "case": "D=64 F=128 T=256 C=32 B=1 float32",
        "competitor": "ours",
        "ms": "25",
        "/ base": "2.25 [2.00, 2.50]",
        "ours / it": "-",
        "GFLOP/s": "80",
        "of peak": "80%",
        "/ floor": "1.25",
    }
    assert found["official inference loop"]["ours / it"] == "0.62 [0.60, 0.65]"
    assert (found["torch.mm"]["of peak"], found["torch.mm"]["/ floor"]) == ("100%", "-")


def test_peak_is_of_the_same_machine_and_dtype(record):
    faster = {**PREFILL, "times": {"torch.mm": timed(0.001, 1.0)}}
    half = {**faster, "shape": {**SHAPE, "dtype": "bfloat16"}}
    files = [record(PREFILL, half), record(faster, name="other.json", cpu="a faster one")]
    blocks = [b for b in report.report(results.load(files)) if b.title == "Prefill"]
    assert len(blocks) == 2
    assert rows(blocks[0])["ours"]["of peak"] == "80%"


def test_growth_border_and_layers(record):
    page = text(report.report(results.load([record(GROWTH, LAYERS, BORDER)])))
    assert "Growth with T, D=64 F=128 C=32 B=1 float32: ms" in page
    assert "T^1.02, R² 0.990" in page
    assert "T^1.58, R² 1.000" in page
    assert "1.5 ms each, R² 0.900" in page
    assert "0.5 MiB each, R² 1.000" in page
    (line,) = (x for x in page.splitlines() if x.split()[-4:] == ["3", "1", "9", "2"])
    assert "ours" in line


def test_memory_and_starts(record):
    blocks = {b.title: b for b in report.report(results.load([record(MEMORY, STARTUP)]))}
    memory = next(b for title, b in blocks.items() if title.startswith("Memory, training"))
    assert memory.rows[1] == ["512", "2", "4", "16", "2", "14", "0.14"]
    assert memory.rows[2][5] == "T^2.22, R² 1.000"
    start = blocks["Seconds of a start"]
    assert start.lines == ["ours / static, cold: 1.14"]
    assert start.rows[1] == ["ours, cold", "1.50", "7.25", "9.00"]


def test_goals(record):
    """The worst case counts; what no case is about is not measured."""
    slow = {**PREFILL, "times": {**PREFILL["times"], "ours": timed(0.0209, 1.9)}}
    ours = {"official training form": {"ratio": 0.5, "low": 0.4, "high": 0.625}}
    shape = {"d": 1024, "f": 3072, "tokens": 4096, "chunk": 512, "batch": 1, "dtype": "float32"}
    forward = {**slow, "kind": "forward", "shape": shape, "ours_over": ours}
    slower = {**forward, "ours_over": {"official inference loop": {"ratio": 1.25, "low": 1.2, "high": 1.3}}}
    host = {"kind": "host", "shape": {}, "times": {"static": timed(2e-6, 1.0), "ours": timed(19e-6, 9.5)}}
    border = {**BORDER, "shape": {"d": 1024}, "worst": 9.0}
    files = [record(forward, slower, host, border), record(forward, name="tuned.json", allocator="tuned")]
    table = goals.table(results.load(files))
    limits = {row[0]: row[3] for row in table.rows}
    rows = {row[0]: (row[1], row[2], row[4]) for row in table.rows}
    assert rows["forward float32, T=4096 C=512: / FLOP floor"] == ("<= 1.05", "1.04 [0.907, 1.18]", "yes")
    assert rows["fp32 C=512: official training form / ours"] == (">= 1.85", "2 [1.6, 2.5]", "yes")
    tuned = "fp32 C=512, tuned allocator: official training form / ours"
    assert rows[tuned] == (">= 1.3", "2 [1.6, 2.5]", "yes")
    # The loop's 40 ms by the floor's 20.
    assert limits["fp32 C=512: official inference loop / ours"] == "2"
    grid = "forward, whole grid, default allocator: ours / either official form"
    assert rows[grid] == ("<= 1", "1.25 [1.2, 1.3]", "NO")
    assert rows["decode, a step's host time in microseconds"] == ("<= 15", "17", "NO")
    assert rows["decode, one layer: longest step / median, C<=512"] == ("<= 3", "9", "NO")
    assert rows["decode, B=1, before the first write: / static"][1:] == ("-", "not measured")


def test_goals_of_memory(record):
    by_tokens = {**MEMORY, "shape": {"d": 1024}, "values": [4096, 8192]}
    by_chunks = {**by_tokens, "variable": "C", "fit_extra": {"ours": {"exponent": -0.02, "r2": 0.5}}}
    table = goals.table(results.load([record(by_tokens, by_chunks)]), all_of_them=False)
    assert [(row[2], row[4]) for row in table.rows] == [("0.143", "yes"), ("0.02", "yes")]


@pytest.mark.parametrize("info", [PREFILL, GROWTH, LAYERS, BORDER, MEMORY, STARTUP], ids=lambda i: i["kind"])
def test_any_field_may_be_missing(record, tmp_path, info):
    for gone in info:
        left = {name: value for name, value in info.items() if name != gone}
        cases = results.load([record(left, PREFILL)])
        blocks = report.report(cases)
        said = {b.title: b.lines for b in blocks}.get("Missing in the file", [])
        assert any(gone in line for line in said), f"{gone}: {said}"
        assert markdown(blocks)
        assert text(blocks)
        assert plots.plots(cases, tmp_path / "plots")


def test_a_case_of_nothing(record):
    page = text(report.report(results.load([record({})])))
    assert "test_0: kind, shape, times" in page


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no benchmarks"), ("[]", "holds no benchmarks"), ("{", "cannot be read")],
)
def test_what_is_no_record(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(TTTError, match=says):
        results.load([path])
    with pytest.raises(TTTError, match="cannot be read"):
        results.load([tmp_path / "none.json"])


def test_markdown_is_a_table(record, tmp_path):
    page = tmp_path / "page.md"
    done = script("bench.report", record(PREFILL), "--markdown", page)
    assert (done.returncode, done.stdout) == (0, "")
    lines = page.read_text().splitlines()
    assert lines[0] == "# Benchmarks"
    start = lines.index("## Prefill") + 2
    assert len({line.count("|") for line in lines[start : start + 6]}) == 1


def test_scripts_say_what_is_wrong_in_one_line(tmp_path):
    for module, more in (("bench.report", ()), ("bench.plots", ("--out", tmp_path))):
        done = script(module, tmp_path / "none.json", *more)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def script(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=suite.ROOT, capture_output=True, text=True, check=False)


def test_pictures_are_the_same_every_time(record, tmp_path):
    cases = results.load([record(PREFILL, GROWTH, GROWTH, LAYERS, BORDER)])
    first, second = (plots.plots(cases, tmp_path / name) for name in ("a", "b"))
    names = ["growth-T.svg", "growth-T-2.svg", "growth-layers.svg", "ratios-prefill.svg", "border.svg"]
    assert [path.name for path in first] == names
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    drawn = first[0].read_text()
    assert "ours: T^1.02, R² 0.990" in drawn
    assert "<dc:date>" not in drawn


def test_nothing_to_draw(record, tmp_path):
    with pytest.raises(TTTError, match="nothing to draw"):
        plots.plots(results.load([record({"kind": "decode"})]), tmp_path)


def bench(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--plan", "--quick", "--only", "x"), "--quick, --only: nothing reads this here, leave out --plan"),
        (("--layers", "all"), "--layers: nothing reads this here, type --plan"),
        (("--json", "no-such-folder/x.json"), "mkdir -p no-such-folder"),
        (("--only", "no-such-benchmark"), "no figures"),
        (("--only", "and"), "exit code 4"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_a_wheel_has_no_suite(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    result = bench("--quick")
    assert result.exit_code == 2
    assert "source checkout" in result.stderr


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder whose suite is one benchmark that passes and, if asked, one that fails."""
    folder = tmp_path / "checkout"
    (folder / "bench" / "suite").mkdir(parents=True)
    for name in (
        "__init__",
        "environment",
        "goals",
        "measure",
        "page",
        "report",
        "results",
        "plots",
        "suite/__init__",
        "suite/conftest",
    ):
        (folder / "bench" / f"{name}.py").write_text((suite.ROOT / "bench" / f"{name}.py").read_text())
    (folder / "bench" / "suite" / "test_two.py").write_text(
        "def test_right(compare):\n"
        "    compare({'static': int, 'ours': int}, kind='forward', shape={'d': 8}, flops=2, static_flops=1)\n"
        "def test_wrong():\n"
        "    assert False, 'error 1.0: no timing'\n"
    )
    monkeypatch.setattr(suite, "ROOT", folder)
    # A suite that believes it shares the machine with other workers times nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return folder


def test_the_command_runs_reports_and_draws(checkout, tmp_path):
    kept, drawn = tmp_path / "kept.json", tmp_path / "drawn"
    given = ("--rounds", 2, "--threads", 1, "--tuned-allocator", "--json", kept, "--plots", drawn)
    result = bench("--only", "right", *given)
    assert result.exit_code == 0, result.output
    assert "allocator: tuned" in result.stdout
    assert "Forward" in result.stdout
    assert "D=8" in result.stdout
    assert f"written: {kept}" in result.stderr
    (run,) = json.loads(kept.read_text())["benchmarks"]
    assert run["stats"]["rounds"] == 2
    assert run["extra_info"]["ours_over"]["static"].keys() >= {"ratio", "low", "high"}
    assert (drawn / "ratios-forward.svg").exists()


def test_what_passed_is_reported_when_another_failed(checkout):
    result = bench("--rounds", 1)
    assert result.exit_code == 2
    assert "Forward" in result.stdout
    assert "some benchmarks failed" in result.stderr


def test_the_page_is_written_instead(checkout, tmp_path):
    page = tmp_path / "page.md"
    result = bench("--only", "right", "--rounds", 1, "--markdown", page)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "## Forward" in page.read_text()
