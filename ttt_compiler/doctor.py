"""``doctor``: what this machine offers, and what is missing before a model can be compiled.

Everything is looked at, nothing is changed, and nothing here raises. May be changed here: checks, and the
supported versions together with ``pyproject.toml``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

import ttt_compiler
from ttt_compiler import compat
from ttt_compiler.compat import processor

Status = Literal["ok", "note", "missing"]
Version = tuple[int, int]

# From, and before; None is no bound.
PYTHON: tuple[Version, Version | None] = ((3, 11), None)
TORCH: tuple[Version, Version | None] = ((2, 13), (2, 14))
TRANSFORMERS: tuple[Version, Version | None] = ((5, 23), None)

_GIBIBYTE = 2**30
_COMPILER = "apt-get install g++ (macOS: xcode-select --install), or set CXX to one"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: ``"missing"`` when something required is not there; ``"note"`` when it is worth knowing.
        found: in words, with what to type when it is missing.
    """

    name: str
    status: Status
    found: str


@dataclass(frozen=True)
class Diagnosis:
    """All checks; ``print`` it."""

    checks: tuple[Check, ...]

    @property
    def missing(self) -> tuple[Check, ...]:
        """What is required and not there."""
        return tuple(c for c in self.checks if c.status == "missing")

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.checks)
        lines = [
            f"{c.status.upper() if c in self.missing else c.status:<8} {c.name:<{width}}  {c.found}"
            for c in self.checks
        ]
        names = ", ".join(c.name for c in self.missing)
        verdict = f"missing: {names}" if names else "everything that is required is there"
        return "\n".join([f"ttt_compiler {ttt_compiler.__version__}", "", *lines, "", verdict])


def diagnose() -> Diagnosis:
    """Look at the machine."""
    checks: tuple[Callable[[], Check], ...] = (
        _python,
        _torch,
        _transformers,
        _triton,
        _compiler,
        _processor,
        _libraries,
        _gpu,
        _cache,
    )
    return Diagnosis(tuple(_looked_at(check) for check in checks))


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def major_minor(version: str) -> str:
    """``"2.13"`` of ``"2.13.0+cpu"``."""
    return ".".join(re.findall(r"\d+", version)[:2])


def _looked_at(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as e:
        name = check.__name__.strip("_").replace("_", " ")
        return Check(name, "note", f"cannot be looked at: {type(e).__name__}: {e}")


def _python() -> Check:
    return _ranged("Python", platform.python_version(), PYTHON)


def _torch() -> Check:
    return _ranged("torch", torch.__version__, TORCH)


def _transformers() -> Check:
    version = installed("transformers")
    if version is None:
        return Check(
            "transformers",
            "note",
            "not installed: models of your own work; for pretrained ones type pip install 'ttt_compiler[hf]'",
        )
    return _ranged("transformers", version, TRANSFORMERS)


def _triton() -> Check:
    version = installed("triton")
    return Check("triton", "ok" if version else "note", f"{version or 'not installed'} (used on GPUs only)")


def _compiler() -> Check:
    name = "C++ compiler"
    command = processor.cpp_compiler()
    if command is None:
        return Check(name, "missing", f"none, and Inductor needs one. Type: {_COMPILER}")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return Check(name, "missing", f"{command} does not run. Type: {_COMPILER}")
    return Check(name, "ok", f"{command}: {(done.stdout.splitlines() or ['?'])[0]}")


def _processor() -> Check:
    capability = torch.backends.cpu.get_cpu_capability()
    slow = " (no vector instructions: slow)" if capability == "DEFAULT" else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = f"threads: {torch.get_num_threads()} on {cores} cores"
    return Check("CPU", "note" if slow else "ok", f"{capability}{slow}, {platform.machine()}, {threads}")


def _libraries() -> Check:
    there = {"oneDNN": torch.backends.mkldnn.is_available(), "MKL": torch.backends.mkl.is_available()}
    words = ", ".join(f"{name} {'yes' if yes else 'no'}" for name, yes in there.items())
    return Check("CPU libraries", "ok" if any(there.values()) else "note", words)


def _gpu() -> Check:
    only = "fast-weight kernels run on the CPU only today"
    if not torch.cuda.is_available():
        return Check("GPU", "note", f"none; {only}")
    return Check("GPU", "note", f"{torch.cuda.get_device_name()}, not used: {only}")


def _cache() -> Check:
    name = "cache folder"
    setting = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
    try:
        folder = compat.inductor_cache()
    except OSError as e:
        return Check(name, "missing", f"{e}. Type: {setting}")
    if not os.access(folder, os.W_OK):
        return Check(name, "missing", f"{folder} cannot be written. Type: {setting}")
    free = shutil.disk_usage(folder).free / _GIBIBYTE
    return Check(name, "ok" if free >= 1 else "note", f"{folder}, {free:.0f} GiB free")


def _ranged(name: str, version: str, bounds: tuple[Version, Version | None]) -> Check:
    least, before = bounds
    have = tuple(int(x) for x in major_minor(version).split("."))
    inside = least <= have and (before is None or have < before)
    first = ".".join(map(str, least))
    supported = (
        f"{first} or newer" if before is None else f"{first} up to, not with, {'.'.join(map(str, before))}"
    )
    if inside:
        return Check(name, "ok", f"{version} (supported: {supported})")
    limit = "" if before is None else f",<{'.'.join(map(str, before))}"
    how = f"pip install '{name}>={first}{limit}'" if name != "Python" else f"python{first} -m venv .venv"
    return Check(name, "missing", f"{version} is not supported ({supported}). Type: {how}")
