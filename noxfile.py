"""What CI runs, in the environment at hand: ``nox``."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "bench"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types of the package."""
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The whole suite, slow tests included."""
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, tiny: are they right, and does memory stay what it should be; no time is looked at."""
    session.run("python", "-m", "pytest", "bench/suite", "--ci", "-q", "-r", "f", *session.posargs)


# Neither of the two below is a part of CI. A shorter count under valgrind takes as long: nearly all of its
# five minutes is the start of processes that import torch; perf, which takes seconds, counts on few machines.


@nox.session
def instructions(session: nox.Session) -> None:
    """Instructions of a decode step on the host; says what to install where nothing counts them."""
    session.run("python", "-m", "bench.instructions", *session.posargs)


@nox.session
def page(session: nox.Session) -> None:
    """docs/benchmarks.md and its pictures anew: of the record, with files given here put into it before.

    ``--unclean`` among them: also of trees with changes.
    """
    unclean = [x for x in session.posargs if x == "--unclean"]
    record, pictures = Path("bench/results/cpu"), Path("docs/benchmarks")
    if files := [x for x in session.posargs if x not in unclean]:
        session.run("python", "-m", "bench.report", *files, "--keep", str(record), *unclean)
    for old in pictures.glob("*.svg"):
        old.unlink()
    kept = sorted(map(str, record.glob("*.json")))
    session.run("python", "-m", "bench.plots", *kept, "--out", str(pictures))
    # Behind the pictures, since it links those that are there.
    session.run("python", "-m", "bench.report", *kept, "--markdown", f"{pictures}.md", *unclean)


@nox.session
def gpu(session: nox.Session) -> None:
    """On a machine with a CUDA device: is it right there, and how fast."""
    session.run("python", "-m", "pytest", "tests/gpu", env={"TRITON_INTERPRET": "0"})
    session.run("python", "-m", "bench.gpu", *session.posargs, env={"TRITON_INTERPRET": "0"})
    session.run("python", "-m", "bench.gpu_parts", env={"TRITON_INTERPRET": "0"})
