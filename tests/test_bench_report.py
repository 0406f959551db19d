"""What becomes of a suite's figures: report, pictures, and the command in front of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bench import environment, plots, report, results
from bench.measured import lines
from bench.page import Block, markdown, text
from tests.bench_records import (
    BORDER,
    GROWTH,
    INSTRUCTIONS,
    LAYERS,
    MEMORY,
    PREFILL,
    SHAPE,
    STARTUP,
    WHOLE_CHUNK,
    timed,
    write,
)
from ttt_compiler import suite
from ttt_compiler.cli import app
from ttt_compiler.codegen.cpu import native
from ttt_compiler.errors import TTTError


@pytest.fixture
def record(tmp_path):
    """A function that writes a file as pytest-benchmark does."""
    return lambda *infos, name="run.json", **environment: write(tmp_path / name, *infos, **environment)


def rows(block: Block) -> dict[str, dict[str, str]]:
    return {row[1]: dict(zip(block.head, row, strict=True)) for row in block.rows}


def test_figures_of_a_layer(record):
    cases = results.load([record(PREFILL)])
    blocks = {b.title: b for b in report.report(cases)}
    assert blocks["Environment"].lines == ["cpu: a processor", "threads: 1", "isa: avx2, avx512f"]
    assert blocks["Prefill"].lines == ["Measured at commit not recorded."]
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
    blocks = {b.title: b for b in report.report(results.load(files))}
    assert rows(blocks["Prefill (cpu: a processor)"])["ours"]["of peak"] == "80%"
    assert "Prefill (cpu: a faster one)" in blocks


def test_a_table_says_by_which_commit_it_was_measured(record):
    """One for all, or a number at each case; what differs besides is said there, what does not once."""
    shape = {**SHAPE, "chunk": 64}
    old = record(PREFILL, name="old.json", commit="a" * 40, date="2026-01-02T03:04:05+00:00", torch="2.13")
    again = {**PREFILL, "shape": shape}
    new = record(again, name="new.json", commit="b" * 40 + "+changes", date="2026-02-03T", torch="2.14")
    blocks = {b.title: b for b in report.report(results.load([old]))}
    assert blocks["Prefill"].lines == ["Measured at commit aaaaaaaaaa, 2026-01-02."]
    assert not any("aaa" in line or "2026" in line for line in blocks["Environment"].lines)
    blocks = {b.title: b for b in report.report(results.load([old, new]))}
    assert blocks["Environment"].lines == ["cpu: a processor", "threads: 1", "isa: avx2, avx512f"]
    assert blocks["Prefill"].lines == [
        "[1] measured at commit aaaaaaaaaa, 2026-01-02, torch: 2.13.",
        "[2] measured at commit bbbbbbbbbb+changes, 2026-02-03, torch: 2.14.",
    ]
    labels = list(dict.fromkeys(row[0] for row in blocks["Prefill"].rows))
    assert [label[-12:] for label in labels] == [" float32 [1]", " float32 [2]"]


def test_tables_of_another_allocator_are_others(record):
    files = [record(PREFILL, allocator="default"), record(PREFILL, name="t.json", allocator="tuned")]
    titles = [b.title for b in report.report(results.load(files))]
    assert {"Prefill", "Prefill (allocator: tuned)"} < set(titles)


def test_a_label_names_its_numbers():
    shape = {"name": "a model", "tokens": 8, "dtype": "float32", "lr": 0.3, "past": 256}
    assert results.Case("x", {"shape": shape}).label == "a model T=8 float32 eta=0.3 N=256"
    swept = {"variable": "D·F", "shape": {"d": 8, "f": 16, "tokens": 4, "variable": "D·F"}}
    assert results.Case("x", swept).label == "T=4"


def test_steps_of_a_whole_chunk_and_instructions(record):
    blocks = {b.title: b for b in report.report(results.load([record(WHOLE_CHUNK, INSTRUCTIONS)]))}
    steps = blocks["Mean and median step of a whole chunk"]
    assert steps.rows[1] == ("D=1024 B=1 C=512 N=1024 float32", "ours", "0.3", "0.25")
    counts = blocks["Instructions of a step on the host"]
    assert "D=8 F=8; counted by valgrind." in counts.lines[0]
    assert counts.rows == [["B=1", "38,814"], ["B=4", "47,266"]]


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
    assert start.lines == ["ours / static, first answer, cold: 1.14", "Measured at commit not recorded."]
    assert start.rows[1] == ["ours, cold", "1.50", "7.25", "9.00"]


@pytest.mark.parametrize(
    "info",
    [PREFILL, GROWTH, LAYERS, BORDER, MEMORY, STARTUP, WHOLE_CHUNK, INSTRUCTIONS],
    ids=lambda i: i["kind"],
)
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
    start = lines.index("## Prefill") + 4
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
    place = {**WHOLE_CHUNK, "kind": "decode"}
    cases = results.load([record(PREFILL, GROWTH, GROWTH, LAYERS, BORDER, MEMORY, place)])
    first, second = (plots.plots(cases, tmp_path / name) for name in ("a", "b"))
    names = ["ratios-prefill", "growth-T", "growth-T-again1", "growth-layers", "border", "memory-training-T"]
    assert [path.stem for path in first] == [*names, "decode"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    drawn = first[1].read_text()
    assert "ours: T^1.02, R² 0.990" in drawn
    assert "<dc:date>" not in drawn


def test_nothing_to_draw(record, tmp_path):
    with pytest.raises(TTTError, match="nothing to draw"):
        plots.plots(results.load([record({"kind": "decode"})]), tmp_path)


def test_an_environment_says_what_is_fast_there(monkeypatch):
    """A run without our loops in C++ is right and slow, and its record says why."""
    fast = environment.environment()
    assert "/" not in str(fast["compiler"])
    assert fast["C++ loops"] is bool(fast["compiler"])
    with native.unused():
        slow = environment.environment()
        assert (slow["C++ loops"], slow["products by oneDNN"], slow["products of blocks"]) == (False, [], [])
    monkeypatch.setattr(environment, "cpp_compiler", lambda: None)
    assert environment.environment()["compiler"] is None
    said = lines({"C++ loops": False, "products by oneDNN": [], "compiler": None})
    assert said == ["C++ loops: no", "products by oneDNN: none", "compiler: none"]


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
    for path in (*(suite.ROOT / "bench").glob("*.py"), *(suite.ROOT / "bench/suite").glob("[_c]*.py")):
        (folder / path.relative_to(suite.ROOT)).write_text(path.read_text())
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
    assert (drawn / "ratios-forward-tuned.svg").exists()


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
