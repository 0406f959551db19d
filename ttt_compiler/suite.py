"""The benchmark suite, its report and its pictures by one command: ``ttt-compiler bench``.

They lie in ``bench/`` of a source checkout, no part of the wheel, and run there as processes of their own.
May be changed here: what is run; what it measures and how that is shown belongs to ``bench/``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ttt_compiler.errors import TTTError

ROOT = Path(__file__).resolve().parent.parent
# What pytest ends with when all passed, when some failed, and when nothing was chosen.
_PASSED, _FAILED, _NOTHING = 0, 1, 5
# Standard output is the report alone.
_STDERR = 2


@dataclass(frozen=True)
class SuiteOptions:
    """What is run, and where results go.

    Attributes:
        quick: few sizes, few rounds.
        full: the dear cases too.
        threads: of torch.
        rounds: of every comparison; None is each one's own.
        only: pytest's expression that chooses by name.
        json: where figures are kept; None keeps none.
        markdown: where the report goes instead of being said.
        plots: folder for pictures; None draws none.
        tuned_allocator: whether malloc keeps large blocks.
    """

    quick: bool = False
    full: bool = False
    threads: int = 1
    rounds: int | None = None
    only: str | None = None
    json: Path | None = None
    markdown: Path | None = None
    plots: Path | None = None
    tuned_allocator: bool = False


def run_suite(options: SuiteOptions, say: Callable[[str], None]) -> None:
    """Run the suite, then say its report.

    Raises:
        TTTError: this is no source checkout, a file cannot be written, or a benchmark failed: those that did
            not are reported before.
    """
    if not (ROOT / "bench" / "suite").is_dir():
        raise TTTError(
            f"{ROOT} has no bench/suite: measurements run from a source checkout, not from an installed "
            "wheel. Type there: pip install -e '.[bench]', then ttt-compiler bench"
        )
    for path in (options.json, options.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise TTTError(f"{path} cannot be written. Type: mkdir -p {path.parent}")
    with tempfile.TemporaryDirectory() as folder:
        record = (options.json or Path(folder) / "suite.json").absolute()
        code = _python(*_suite_command(options, record), out=_STDERR).returncode
        if code not in (_PASSED, _FAILED, _NOTHING):
            raise TTTError(f"the suite ended with pytest's exit code {code}: see above")
        if not record.exists() or not record.stat().st_size:
            raise TTTError("no figures: benchmarks failed (see above), or --quick and --only leave none")
        page = ("--markdown", str(options.markdown.absolute()), "--unclean") if options.markdown else ()
        say(_checked("bench.report", str(record), *page))
        if options.plots is not None:
            _checked("bench.plots", str(record), "--out", str(options.plots.absolute()), out=_STDERR)
    if code == _FAILED:
        raise TTTError("some benchmarks failed, see above: their figures are missing")


def _suite_command(options: SuiteOptions, record: Path) -> list[str]:
    command = ["pytest", "bench/suite", "-q", "-r", "f", "--benchmark-quiet", f"--benchmark-json={record}"]
    command += ["--threads", str(options.threads)]
    command += [f"--{name}" for name in ("quick", "full") if getattr(options, name)]
    if options.rounds is not None:
        command += ["--rounds", str(options.rounds)]
    if options.only is not None:
        command += ["-k", options.only]
    # malloc reads its settings when a process starts.
    tuned = ["bench.environment", sys.executable, "-m"] if options.tuned_allocator else []
    return [*tuned, *command]


def _checked(*command: str, out: int = subprocess.PIPE) -> str:
    done = _python(*command, out=out, err=subprocess.PIPE)
    if done.returncode:
        raise TTTError(done.stderr.strip().removeprefix("error: "))
    return done.stdout or ""


def _python(*command: str, out: int, err: int | None = None) -> subprocess.CompletedProcess[str]:
    """A module, run in the checkout."""
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=out, stderr=err, text=True, check=False
    )
