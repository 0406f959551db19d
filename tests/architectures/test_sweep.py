"""The committed page of architectures says what a fresh audit says, and the sweep survives its types."""

from __future__ import annotations

import datetime
import difflib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ttt_compiler.architectures import causal_lm_types, sweep, table, unbuildable_types
from ttt_compiler.architectures.audit import Audit, audit
from ttt_compiler.architectures.refresh import versions

PAGE = Path(__file__).parents[2] / table.PAGE
TYPES = causal_lm_types()
BUILDABLE = [t for t in TYPES if t not in unbuildable_types()]
# All of them take a third of CI's time. A third of them, in turn by day; TTT_SWEEP=all for all.
SHARE = 1 if os.environ.get("TTT_SWEEP") == "all" else 3
TODAY = [t for i, t in enumerate(BUILDABLE) if i % SHARE == datetime.date.today().toordinal() % SHARE]
WRITTEN_ON = table.Versions("2.13", "5.23")

LLAMA = Audit(
    "llama", "yes", 1, "2 dense", expected="2 dense", converted=2, base="yes", oracle="yes", decode="yes"
)
EXAMPLES = [
    LLAMA,
    Audit("mixtral", "yes", 1, "2 moe", expected="2 moe"),
    Audit("mamba", "yes", 1, "none", expected="none"),
    Audit("reformer", "yes", 21, "2 dense", expected="2 dense", refused=("not a <row>\n per token",)),
    Audit("a", "yes", 1, "1 dense", expected="1 dense, 1 moe", missing=("x.weight: not seen",), converted=1),
    Audit("b", "yes", 2, "2 dense", expected="2 dense", false_positives=("y", "z"), converted=4),
    Audit("c", "yes", 1, "1 dense", expected="1 shared", wrong_kind=("w: dense, not shared",), converted=1),
    Audit("d", "yes", 1, "1 dense", expected="1 dense", converted=1, base="differs by 1.0e-03"),
    Audit(
        "e",
        *("yes", 1, "1 dense"),
        expected="1 dense",
        converted=1,
        base="yes",
        oracle="yes",
        decode="the base model's own does not: it returns no cache",
    ),
    Audit("f", "not captured: Unsupported: | data-dependent"),
    Audit("g", "not searched: KeyError: 1"),
    Audit("h", "not audited: took more than 300 s"),
    Audit("i", "not built: no package"),
]


def read() -> dict[str, table.Row]:
    assert PAGE.exists(), f"{table.PAGE} is missing. Type: {table.REFRESH}"
    return table.parse(PAGE.read_text(encoding="utf-8"))[0]


def test_a_page_can_be_read_back():
    rows = {a.model_type: table.row(a) for a in EXAMPLES}
    text = table.render(EXAMPLES, WRITTEN_ON)
    assert table.parse(text) == (rows, WRITTEN_ON)
    assert table.page(rows.values(), WRITTEN_ON) == text


def test_what_counts_as_right():
    rows = {a.model_type: table.row(a) for a in EXAMPLES}
    assert {n for n, r in rows.items() if r.right} == {"llama", "mixtral", "mamba", "reformer", "e"}
    assert all(rows[a.model_type].right == a.right for a in EXAMPLES)
    assert {n for n, r in rows.items() if r.refused} == {"reformer"}
    assert {n for n, r in rows.items() if r.wrong} == {*"abcdgh"}
    assert {n for n, r in rows.items() if not r.traced} == {*"fi"}
    # An audit that failed may not make the rest look better.
    assert table.share(rows.values()) == 5 / 11


def test_totals_are_counted_from_rows():
    lines = table.totals([table.row(a) for a in EXAMPLES])
    assert lines[0].startswith("types: 13, of which 12 can be built; torch.compile captures 11 of these, 7 ")
    assert lines[1] == "MLPs found: 9 of 9 dense, 0 of 1 shared, 2 of 3 moe. False positives: 2."
    assert lines[2].startswith("right: 5 of 11 captured types (45.5 %); the target is at least 97 %.")
    assert lines[3].startswith("converted and right: 2 of 11 captured types (18.2 %).")
    assert lines[3].endswith("alone): 2.")
    assert lines[4].endswith("1. Wrong: 6.")


def test_only_digits_of_measured_errors_may_differ():
    bad = Audit("d", "yes", 1, "1 dense", expected="1 dense", converted=1, base="differs by 1.0e-03")
    other = Audit("d", "yes", 1, "1 dense", expected="1 dense", converted=1, base="differs by 2.5e-07")
    raised = Audit("d", "yes", 1, "1 dense", expected="1 dense", converted=1, base="KeyError: 1")
    assert table.row(bad).same(table.row(other))
    assert not table.row(bad).same(table.row(raised))


def test_what_is_no_page_says_what_to_type():
    with pytest.raises(ValueError, match="--architectures --write"):
        table.parse("# Something else")


def test_the_page_lists_exactly_the_installed_types():
    there, installed = set(read()), set(TYPES)
    new, gone = sorted(installed - there), sorted(there - installed)
    assert there == installed, f"not in {table.PAGE}: {new}; gone: {gone}. Type: {table.REFRESH}"


def test_the_page_is_of_these_versions():
    assert PAGE.exists(), f"{table.PAGE} is missing. Type: {table.REFRESH}"
    assert table.parse(PAGE.read_text(encoding="utf-8"))[1] == versions(), f"Type: {table.REFRESH}"


def test_the_page_is_what_its_rows_add_up_to():
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert text == table.page(read().values(), versions()), f"edited by hand? Type: {table.REFRESH}"


def test_the_target_is_met():
    rows = list(read().values())
    assert sum(row.right for row in rows) >= 75
    assert table.share(rows) >= table.TARGET, "\n".join(table.wrongs(rows))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TODAY)
def test_a_fresh_audit_says_what_the_page_says(model_type):
    page = read()
    assert model_type in page, f"Type: {table.REFRESH}"
    committed, fresh = page[model_type], table.row(audit(model_type))
    diff = difflib.unified_diff(
        committed.comparable(), fresh.comparable(), f"{table.PAGE}", "a fresh audit", lineterm=""
    )
    command = table.REFRESH.replace("--write", f"--types {model_type} --write")
    assert committed.same(fresh), "\n".join(["", *diff, "", f"If that is right, type: {command}"])


def fake_child(monkeypatch, audit_of: str) -> None:
    """A child whose audit is the given function body; torch alone takes seconds to import."""
    code = "\n".join(
        [
            "import sys, types",
            "sys.modules['transformers'] = types.ModuleType('transformers')",
            "from ttt_compiler.architectures import sweep",
            "from ttt_compiler.architectures.audit import Audit",
            "def audit(name):",
            *(f"    {line}" for line in audit_of.splitlines()),
            "    return Audit(name, 'yes')",
            "sweep.audit = audit",
            "sweep.child({gibibytes})",
        ]
    )
    monkeypatch.setattr(sweep, "_CHILD", code)


def test_one_type_cannot_take_the_others_with_it(monkeypatch):
    fake_child(
        monkeypatch,
        "print('what a model prints is no answer')\n"
        "if name == 'crash': import os; os.abort()\n"
        "if name == 'exit': raise SystemExit(3)\n"
        "if name == 'hang': import time; time.sleep(1000)\n"
        "if name == 'memory': bytearray(2**40)",
    )
    types = ["one", "crash", "two", "exit", "hang", "three", "memory", "four"]
    found = {a.model_type: a.traced for a in sweep.sweep(types, jobs=2, seconds=2, gibibytes=4)}
    assert found == {
        **dict.fromkeys(["one", "two", "three", "four"], "yes"),
        "crash": "not audited: its process was ended by SIGABRT",
        "exit": "not audited: its process ended with exit code 3",
        "hang": "not audited: took more than 2 s",
        "memory": "not audited: its process ended with exit code 1",
    }


def test_leaving_early_ends_the_children(monkeypatch):
    fake_child(monkeypatch, "import time\nif name == 'hang': time.sleep(1000)")
    started = time.monotonic()
    running = sweep.sweep(["one", "hang", "hang"], jobs=1, seconds=500)
    assert next(running).model_type == "one"
    running.close()
    assert time.monotonic() - started < 100


def test_a_child_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sweep, "_CHILD", "raise SystemExit(7)")
    with pytest.raises(RuntimeError, match="does not start: its process ended with exit code 7"):
        list(sweep.sweep(["llama"]))


@pytest.mark.slow
def test_a_child_audits_as_this_process_does():
    assert list(sweep.sweep(["llama"])) == [audit("llama")] == [LLAMA]


def test_children_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    threads = [
        int(subprocess.check_output([sys.executable, "-c", code], env=sweep._environment(jobs), text=True))
        for jobs in (1, 10_000)
    ]
    assert threads == [os.cpu_count(), 1]
