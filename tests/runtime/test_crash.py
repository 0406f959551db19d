"""Saving is killed, runs out of space, or leaves damage behind: the old session loads, or the new one.

Writers are forked from a small process of their own and killed by SIGKILL: at every call of Python or C
that a save makes, and at random moments.
"""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

import ttt_compiler as ttt
from tests import models
from ttt_compiler.errors import SnapshotError
from ttt_compiler.runtime.files import read_tensors, write_tensors

# Every content is told by its number: the tensors are full of it, and so is the header.
PRELUDE = """
    import errno, os, random, resource, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from ttt_compiler.errors import SnapshotError
    from ttt_compiler.runtime.files import read_tensors, write_tensors
    folder = Path(sys.argv[1])
    path = folder / "book.ttt"
    SIZE = int(sys.argv[2])

    def save(i):
        tensors = {f"x{k}": torch.full((SIZE,), i + k) for k in range(3)}
        write_tensors(path, tensors, {"i": i}, SnapshotError, private=True)

    def load():
        tensors, header = read_tensors(path, SnapshotError)
        i = header["i"]
        assert sorted(tensors) == ["x0", "x1", "x2"]
        assert all(bool((x == i + int(k[1])).all()) for k, x in tensors.items())
        return i

    def child(work):
        # Forked: the imports take seconds, and nothing here starts threads.
        pid = os.fork()
        if not pid:
            try:
                work()
            except BaseException as e:
                print(repr(e), flush=True)
                os._exit(3)
            os._exit(0)
        return pid

    def temporaries():
        return [p.name for p in folder.iterdir() if p.name != path.name]
"""


def run(tmp_path, code, size=100):
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(size)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_at_every_call(tmp_path):
    """SIGKILL at the k-th call or return of any function, of Python or of C, for every k of a save
    (for every third where a killed writer's temporary is in the way)."""
    out = run(
        tmp_path,
        """
        def killed_at(k):
            left = k
            def profile(frame, event, arg):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            tensors = {f"x{n}": torch.full((SIZE,), k + n) for n in range(3)}
            def work():
                sys.setprofile(profile)
                write_tensors(path, tensors, {"i": k}, SnapshotError, private=True)
                sys.setprofile(None)
            return work

        for left_behind in (False, True):
            old = -1
            save(old)
            k = kept = replaced = 0
            while True:
                for name in temporaries():
                    (folder / name).unlink()
                if left_behind:
                    (folder / ".book.ttt.0123456789abcdef.tmp").write_text("of a killed writer")
                _, status = os.waitpid(child(killed_at(k)), 0)
                now = load()
                assert now in (old, k), (now, old, k)
                assert len(temporaries()) <= 1, "a save begins by removing what was left"
                kept, replaced = kept + (now == old), replaced + (now == k)
                old = now
                if os.WIFEXITED(status):
                    assert os.WEXITSTATUS(status) == 0
                    break
                assert os.WTERMSIG(status) == signal.SIGKILL
                k += 3 if left_behind else 1
            assert now == k and temporaries() == [], temporaries()
            print(k, kept, replaced)
        """,
    )
    for line in out.splitlines():
        points, kept, replaced = map(int, line.split())
        assert points > 200
        assert kept > 50
        assert replaced > 2, "some kills come after the rename"


def test_killed_at_random_moments(tmp_path):
    out = run(
        tmp_path,
        """
        save(0)
        start = time.perf_counter(); save(0); took = time.perf_counter() - start
        rng, old, seen = random.Random(0), 0, set()
        for i in range(1, 121):
            pid = child(lambda: save(i))
            time.sleep(rng.random() * took * 3)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            now = load()
            assert now in (old, i)
            seen.add(now == i)
            old = now
            assert len(temporaries()) <= 1
        save(7)
        assert temporaries() == [] and load() == 7
        print(len(seen))
        """,
        size=200_000,
    )
    assert out.split() == ["2"], "both outcomes were seen"


def test_a_temporary_of_a_writer_that_lives_is_left_alone(tmp_path):
    run(
        tmp_path,
        """
        save(1)
        go, told = os.pipe()
        def slow():
            def fsync(fd):
                os.write(told, b"x")
                time.sleep(20)
            os.fsync = fsync
            save(2)
        pid = child(slow)
        os.read(go, 1)
        mine = temporaries()
        assert len(mine) == 1
        # Others that are like it but not of this name stay too.
        others = [".book.ttt.2.0123456789abcdef.tmp", ".other.0123456789abcdef.tmp", ".book.ttt.012.tmp"]
        for name in others:
            (folder / name).write_text("")
        save(3)
        assert load() == 3 and set(temporaries()) == set(mine) | set(others)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        save(4)
        assert load() == 4 and set(temporaries()) == set(others)
        """,
    )


def test_a_temporary_is_no_session_before_its_last_byte(tmp_path):
    """Everything is written but for the checksum: still no session."""
    run(
        tmp_path,
        """
        import hashlib
        from ttt_compiler.runtime import files
        class Dying:
            def __init__(self): self.real = hashlib.sha256()
            def update(self, data): self.real.update(data)
            def hexdigest(self): os.kill(os.getpid(), signal.SIGKILL)
        class Library: sha256 = Dying
        def work():
            files.hashlib = Library
            save(5)
        _, status = os.waitpid(child(work), 0)
        assert os.WIFSIGNALED(status) and not path.exists()
        (name,) = temporaries()
        try:
            read_tensors(folder / name, SnapshotError)
            raise SystemExit("a temporary was taken for a session")
        except SnapshotError:
            pass
        """,
    )


def test_a_full_disk_at_every_size(tmp_path):
    """A limit on the size of files stands for it: writes are cut short, then fail."""
    out = run(
        tmp_path,
        """
        save(1)
        before, size = path.read_bytes(), path.stat().st_size
        def work(limit):
            def inner():
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    save(2)
                except SnapshotError as e:
                    text = str(e)
                    assert text.startswith(f"{path}: cannot be written (File too large); free space"), text
                    assert text.endswith("nothing was changed"), text
                    os._exit(7)
            return inner
        limits = [0, 1, 7, 8, 9, 100, size - 900, size - 65, size - 1, *range(0, size, size // 40)]
        for limit in limits:
            _, status = os.waitpid(child(work(limit)), 0)
            assert os.WEXITSTATUS(status) == 7, (limit, status)
            assert path.read_bytes() == before and temporaries() == []
        _, status = os.waitpid(child(work(size)), 0)
        assert os.WEXITSTATUS(status) == 0 and load() == 2
        print(len(limits))
        """,
        size=3000,
    )
    assert int(out) > 40


@pytest.mark.parametrize("name", ["open", "fsync", "replace", "rename"])
@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS"])
def test_every_error_of_the_disk_is_ours_and_changes_nothing(tmp_path, monkeypatch, name, code):
    import errno
    import os

    path = tmp_path / "s.ttt"
    write_tensors(path, {"x": torch.ones(3)}, {"i": 1}, SnapshotError)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        if name in ("replace", "rename"):
            patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(SnapshotError) as e:
            write_tensors(path, {"x": torch.zeros(3)}, {"i": 2}, SnapshotError)
    assert os.strerror(getattr(errno, code)) in str(e.value)
    assert str(e.value).endswith("; nothing was changed")
    assert ("free space" in str(e.value)) == (code in ("ENOSPC", "EDQUOT"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.ttt"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "s", tmp_path / ("x" * 300), "/proc/s.ttt"):
        with pytest.raises(SnapshotError, match="cannot be written"):
            write_tensors(path, {}, {}, SnapshotError)
    longest = tmp_path / ("x" * 255)
    write_tensors(longest, {}, {"i": 1}, SnapshotError)
    assert read_tensors(longest, SnapshotError)[1] == {"i": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x" * 255]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    path = tmp_path / "s.ttt"
    write_tensors(path, {}, {"i": 1}, SnapshotError)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_tensors(path, {}, {"i": 2}, SnapshotError)
    assert read_tensors(path, SnapshotError)[1] == {"i": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["s.ttt"]


class TestSessions:
    """The same through sessions of a model."""

    @pytest.fixture(scope="class")
    def model(self):
        model = models.converted()
        model.compile(backend="inplace_ttt_eager", dynamic=True)
        return model

    @pytest.fixture(scope="class")
    def saved(self, model, tmp_path_factory):
        session = ttt.Session(model)
        model(models.ids(1, 10), past_key_values=session.cache)
        path = tmp_path_factory.mktemp("sessions") / "s.ttt"
        session.save(path)
        return path.read_bytes()

    def test_flipped_bits(self, model, saved, tmp_path):
        rng, path = random.Random(0), tmp_path / "s.ttt"
        header = int.from_bytes(saved[:8], "little") + 8
        # As many in the header as in the data, which is longer.
        places = [rng.randrange(header) for _ in range(150)] + [
            rng.randrange(header, len(saved)) for _ in range(150)
        ]
        for place in places:
            flipped = saved[place] ^ (1 << rng.randrange(8))
            path.write_bytes(saved[:place] + bytes([flipped]) + saved[place + 1 :])
            with pytest.raises(SnapshotError, match="nothing was changed"):
                ttt.Session.load(model, path)
        path.write_bytes(saved)
        assert ttt.Session.load(model, path).tokens_seen == [10]

    def test_truncations(self, model, saved, tmp_path):
        path = tmp_path / "s.ttt"
        header = int.from_bytes(saved[:8], "little") + 8
        pages = range(0, len(saved), 4096)
        for length in (
            0,
            1,
            7,
            8,
            9,
            header - 1,
            header,
            header + 1,
            len(saved) - 1,
            len(saved) // 2,
            *pages,
        ):
            path.write_bytes(saved[:length])
            with pytest.raises(SnapshotError, match="nothing was changed"):
                ttt.Session.load(model, path)
            # A block that never reached the disk reads as zeros.
            path.write_bytes(saved[:length] + b"\0" * (len(saved) - length))
            with pytest.raises(SnapshotError, match="nothing was changed"):
                ttt.Session.load(model, path)

    def test_pickles_and_archives_are_never_opened(self, model, tmp_path):
        class Evil:
            def __reduce__(self):
                return (exec, ("raise SystemExit('executed')",))

        path = tmp_path / "s.ttt"
        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(SnapshotError, match="cannot be read"):
            ttt.Session.load(model, path)
        torch.save({"a": Evil()}, path)
        with pytest.raises(SnapshotError, match="cannot be read"):
            ttt.Session.load(model, path)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("archive/data.pkl", b"\0" * 2**26)
        with pytest.raises(SnapshotError, match="cannot be read"):
            ttt.Session.load(model, path)

    def test_a_failed_load_changes_nothing(self, model, saved, tmp_path):
        path = tmp_path / "s.ttt"
        before = {n: p.clone() for n, p in model.state_dict().items()}
        path.write_bytes(saved[:-1] + bytes([saved[-1] ^ 1]))
        with pytest.raises(SnapshotError):
            ttt.Session.load(model, path)
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
