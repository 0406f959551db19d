"""What CI runs, in the environment at hand: ``nox``."""

from __future__ import annotations

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


@nox.session
def gpu(session: nox.Session) -> None:
    """On a machine with a CUDA device: is it right there, and how fast."""
    session.run("python", "-m", "pytest", "tests/gpu", env={"TRITON_INTERPRET": "0"})
    session.run("python", "-m", "bench.gpu", *session.posargs, env={"TRITON_INTERPRET": "0"})
    session.run("python", "-m", "bench.gpu_parts", env={"TRITON_INTERPRET": "0"})
