"""``doctor``: what is missing is said with what to type, and the sweep's page is kept up to date."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ttt_compiler import compat, doctor
from ttt_compiler.architectures import refresh, table
from ttt_compiler.architectures.audit import Audit
from ttt_compiler.cli import app
from ttt_compiler.compat import processor

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def line(output: str, name: str) -> str:
    return next(x for x in output.splitlines() if x[9:].startswith(name))


@pytest.fixture
def swept(monkeypatch):
    """The types that were swept, without auditing one."""
    seen: list[str] = []

    def sweep(types, *, jobs):
        seen.extend(types)
        return (Audit(t, "yes", 1, "2 dense", expected="2 dense", converted=2, base="yes") for t in types)

    monkeypatch.setattr(refresh, "sweep", sweep)
    return seen


def test_a_machine_that_passes_tests_is_healthy():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "everything that is required is there" in result.output
    for name in ("Python", "torch", "transformers", "C++ compiler", "cache folder"):
        assert line(result.output, name).startswith("ok "), result.output
    assert torch.__version__ in line(result.output, "torch")
    assert torch.backends.cpu.get_cpu_capability() in line(result.output, "CPU")
    assert "run on the CPU only" in line(result.output, "GPU")


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(processor, "cpp_compiler", lambda: None)
    result = run("doctor")
    assert result.exit_code == 1
    assert line(result.output, "C++ compiler").startswith("MISSING ")
    assert "apt-get install g++" in result.output
    assert result.output.splitlines()[-1] == "missing: C++ compiler"


def test_no_cache_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = run("doctor")
    assert result.exit_code == 1
    assert "set TORCHINDUCTOR_CACHE_DIR" in line(result.output, "cache folder")


@pytest.mark.parametrize(
    ("version", "bounds", "status", "typed"),
    [
        ("2.13.0+cpu", doctor.TORCH, "ok", ""),
        ("2.13.1", doctor.TORCH, "ok", ""),
        ("2.12.1", doctor.TORCH, "missing", "pip install 'it>=2.13,<2.14'"),
        ("2.14.0a0+git", doctor.TORCH, "missing", "pip install 'it>=2.13,<2.14'"),
        ("6.0", doctor.TRANSFORMERS, "ok", ""),
        ("5.9.2", doctor.TRANSFORMERS, "missing", "pip install 'it>=5.23'"),
    ],
)
def test_versions(version, bounds, status, typed):
    check = doctor._ranged("it", version, bounds)
    assert check.status == status
    assert check.found.endswith(f"Type: {typed}" if typed else ")")


def test_supported_versions_are_those_of_the_package():
    def text(name: str, bounds) -> str:
        least, before = (None if b is None else ".".join(map(str, b)) for b in bounds)
        return f"{name}>={least}" + (f",<{before}" if before else "")

    assert text("", doctor.PYTHON) == PROJECT["requires-python"]
    assert text("torch", doctor.TORCH) in PROJECT["dependencies"]
    assert text("transformers", doctor.TRANSFORMERS) in PROJECT["optional-dependencies"]["hf"]
    assert text("", doctor.TORCH).startswith(f">={compat.CHECKED_TORCH}")


def test_without_transformers_it_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    result = run("doctor")
    assert result.exit_code == 0
    assert "pip install 'ttt_compiler[hf]'" in line(result.output, "transformers")


def test_a_check_that_raises_is_a_line(monkeypatch):
    def broken():
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "_gpu", broken)
    assert "cannot be looked at: OSError: no such thing" in run("doctor").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "llama"], "belong to --architectures"),
        (["--write", "x.md"], "belong to --architectures"),
        (["--architectures", "--types", "lama"], "Type one of: llama"),
        (["--architectures", "--types", ","], "nothing is no"),
        (
            ["--architectures", "--types", "llama", "--write", "no-such-folder/x.md"],
            "mkdir -p no-such-folder",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    result = run("doctor", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_architectures_end_to_end(tmp_path):
    page = tmp_path / "page.md"
    arguments = ["--types", "gpt2,gemma3n", "--jobs", 2, "--write", page]
    result = run("doctor", "--architectures", *arguments)
    assert result.exit_code == 0, result.output
    assert "right: 1 of 1 captured types (100.0 %)" in result.output
    rows, written_on = table.parse(page.read_text(encoding="utf-8"))
    assert written_on == refresh.versions()
    assert rows["gpt2"].line == "| `gpt2` | 1 | 2 dense | 2 dense | - | - | 2 | - | yes | yes | yes |"
    assert not rows["gemma3n"].built


def test_rows_of_other_types_stay(swept, tmp_path):
    page = tmp_path / "page.md"
    missing = Audit("bert", "yes", 1, "1 dense", expected="2 dense", missing=("x: not seen",))
    gone = Audit("no-longer-known", "yes", 1)
    page.write_text(table.render([missing, gone, Audit("llama", "not captured: ?")], refresh.versions()))
    assert run("doctor", "--architectures", "--types", "llama,gpt2", "--write", page).exit_code == 0
    assert swept == ["llama", "gpt2"]
    rows, _ = table.parse(page.read_text(encoding="utf-8"))
    assert list(rows) == ["bert", "gpt2", "llama"]
    assert rows["bert"] == table.row(missing)
    assert rows["llama"].right


def test_a_page_of_other_versions_is_written_whole_or_not_at_all(swept, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(table.render([Audit("llama", "yes", 1)], table.Versions("2.12", "5.0")))
    result = run("doctor", "--architectures", "--types", "llama", "--write", page)
    assert result.exit_code == 2
    assert "leave --types out" in result.stderr
    assert swept == []
    assert run("doctor", "--architectures", "--write", page).exit_code == 0
    assert len(table.parse(page.read_text(encoding="utf-8"))[0]) == len(swept) > 100


def test_another_file_is_not_overwritten(swept, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("my notes")
    assert run("doctor", "--architectures", "--write", page).exit_code == 2
    assert page.read_text() == "my notes"


def test_what_is_wrong_is_printed(monkeypatch):
    wrong = Audit("llama", "yes", 1, "1 dense", expected="2 dense", missing=("[x]: not seen",))
    monkeypatch.setattr(refresh, "sweep", lambda types, *, jobs: iter([wrong]))
    result = run("doctor", "--architectures", "--types", "llama")
    assert "  llama: MLPs that are not found: [x]: not seen" in result.output
