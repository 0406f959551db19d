"""What the repository keeps of the benchmarks: the record, and the page and pictures that it gives."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re

import matplotlib
import pytest

from bench import page, plots, record, report, results
from tests.bench_records import BORDER, INSTRUCTIONS, PREFILL, WHOLE_CHUNK, write
from ttt_compiler import suite
from ttt_compiler.errors import TTTError

KEPT = suite.ROOT / "bench/results/cpu"
PAGE = suite.ROOT / "docs/benchmarks.md"
COMMAND = "Type: nox -s page"


def test_the_page_is_what_the_record_gives():
    cases = results.load(sorted(KEPT.glob("*.json")))
    said = page.markdown(report.report(cases), PAGE.with_suffix(""))
    there = PAGE.read_text()
    diff = "\n".join(
        difflib.unified_diff(there.splitlines(), said.splitlines(), "docs", "record", lineterm="")
    )
    assert there == said, f"{diff}\n{COMMAND}"


def test_the_pictures_are_what_the_record_gives(tmp_path):
    """By another matplotlib they are laid out otherwise, and say the same."""
    drawn = {p.name: p.read_text() for p in plots.plots(results.load(sorted(KEPT.glob("*.json"))), tmp_path)}
    there = {path.name: path.read_text() for path in PAGE.with_suffix("").glob("*.svg")}
    assert there.keys() == drawn.keys(), COMMAND
    for name, content in drawn.items():
        same = f"Matplotlib v{matplotlib.__version__}" in there[name]
        assert there[name] == content if same else words(there[name]) == words(content), f"{name}. {COMMAND}"


def words(svg: str) -> list[str]:
    return sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_every_picture_is_linked():
    page = PAGE.read_text()
    for path in PAGE.with_suffix("").glob("*.svg"):
        assert f"]({PAGE.stem}/{path.name})" in page


def test_the_record_is_small():
    assert sum(path.stat().st_size for path in KEPT.glob("*.json")) < 400_000


def test_a_page_of_the_record_is_the_page_of_its_files(tmp_path):
    """Nothing that a page or a picture shows is left out, and no time of a single round stays."""
    long = {**BORDER, "steps": {"ours": [1 / 3000] * 200}}
    ours = write(tmp_path / "a.json", PREFILL, {**WHOLE_CHUNK, "steps": {"ours": [1.0]}}, commit="a" * 40)
    cases = results.load([ours, write(tmp_path / "b.json", long, INSTRUCTIONS, allocator="tuned")])
    written = record.keep(cases, tmp_path / "kept")
    assert [path.name for path in written] == [
        "border.json",
        "instructions.json",
        "prefill.json",
        "step-whole-chunk.json",
    ]
    kept = results.load(written)
    assert page.markdown(report.report(kept)) == page.markdown(report.report(cases))
    assert [p.name for p in plots.plots(kept, tmp_path / "x")] == ["border-tuned.svg", "ratios-prefill.svg"]
    assert "0.00033333," in written[0].read_text()
    assert "steps" not in written[-1].read_text()


def test_a_later_measurement_replaces_the_same_case_alone(tmp_path):
    def case(name: str, seconds: float, **environment: object) -> results.Case:
        info = {**PREFILL, "times": {"ours": {"seconds": seconds, "ratio": 1.0}}}
        return results.Case(name, info, {"cpu": "a processor", **environment})

    first = [case("test[C=512]", 1.0), case("test[C=1024]", 2.0), case("test[C=512]", 3.0, allocator="tuned")]
    record.keep(first, tmp_path)
    record.keep([case("test[C=512]", 4.0, commit="b")], tmp_path)
    kept = results.load([tmp_path / "prefill.json"])
    # In the order of their sizes, whichever came first.
    found = [(c.name, c.tuned, c.seconds("ours"), c.commit) for c in kept]
    assert found == [
        ("test[C=512]", False, 4.0, "b"),
        ("test[C=512]", True, 3.0, "not recorded"),
        ("test[C=1024]", False, 2.0, "not recorded"),
    ]


@pytest.mark.parametrize("option", ["--markdown", "--keep"])
def test_nothing_is_published_of_a_tree_with_changes(tmp_path, monkeypatch, option):
    path = write(tmp_path / "dirty.json", PREFILL, commit="a" * 40 + "+changes")
    clean = write(tmp_path / "clean.json", PREFILL, commit="a" * 40)
    target = tmp_path / "target"

    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
        page.command("", report.report, keeps=True)

    with pytest.raises(SystemExit, match=r"dirty\.json: test_0 .*aaaaaaaaaa\+changes.* --unclean"):
        run(clean, path, option, target)
    assert not target.exists()
    run(clean, path, option, target, "--unclean")
    assert target.exists()
    # A report that is only said says the commit, and is refused to nobody.
    run(path)


def test_a_page_links_the_pictures_beside_it(tmp_path):
    blocks = report.report(results.load([write(tmp_path / "a.json", PREFILL, BORDER)]))
    (tmp_path / "there").mkdir()
    (tmp_path / "there/ratios-prefill.svg").touch()
    said = page.markdown(blocks, tmp_path / "there")
    assert "![ratios-prefill](there/ratios-prefill.svg)" in said
    assert "border.svg" not in said


def test_counted_instructions_are_a_case(tmp_path):
    path = tmp_path / "counts.json"
    said = {name: value for name, value in INSTRUCTIONS.items() if name != "shape"}
    path.write_text(json.dumps({**said, "d": 8, "f": 8, "environment": {"threads": 2, "commit": "c"}}))
    (case,) = results.load([path])
    assert (case.kind, case.label, case.commit) == ("instructions", "D=8 F=8", "c")
    assert case.environment["threads"] == 1
    (again,) = results.load(record.keep([case], tmp_path / "kept"))
    assert dataclasses.replace(again, source=path) == case


def test_a_record_of_nothing(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"environments": [], "benchmarks": []}')
    with pytest.raises(TTTError, match="holds no benchmarks"):
        results.load([path])
