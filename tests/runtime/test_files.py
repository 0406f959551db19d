"""Stored files: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
import os
import random
import struct
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.runtime import hostile
from ttt_compiler.errors import AdapterError, SnapshotError
from ttt_compiler.runtime import files
from ttt_compiler.runtime.files import (
    DTYPES,
    read_header,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)


def every_dtype():
    g = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (3, 16), generator=g, dtype=torch.uint8)
    out = {name: raw.view(dtype).clone() for name, dtype in DTYPES.items()}
    return out | {
        "empty": torch.zeros(3, 0, 2),
        "scalar": torch.tensor(7),
        "view": torch.randn(4, 5).t()[::2],
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "s.ttt"
    tensors = {"a": torch.randn(5, 7), "b.c": torch.arange(9), "d": torch.randn(3).bfloat16()}
    write_tensors(path, tensors, {"version": 3, "sites": ["x"]}, SnapshotError)
    return path


def refused(path, match=None):
    for read in (read_tensors, read_header):
        with pytest.raises(SnapshotError, match=match) as e:
            read(path, SnapshotError)
        assert str(e.value).startswith(f"{path}: ")
        assert str(e.value).endswith("; nothing was changed")


def test_every_dtype_and_shape_comes_back(tmp_path):
    tensors, header = every_dtype(), {"a": [1, None, "é"], "b": {"c": 0.1}}
    write_tensors(tmp_path / "f", tensors, header, SnapshotError)
    read, said = read_tensors(tmp_path / "f", SnapshotError)
    assert same(read, {k: v.contiguous() for k, v in tensors.items()})
    assert said == header
    said, shapes = read_header(tmp_path / "f", SnapshotError)
    assert said == header
    assert shapes == {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()}


def test_safetensors_reads_what_we_write_and_we_what_it_writes(tmp_path):
    tensors = {k: v.contiguous() for k, v in every_dtype().items()}
    write_tensors(tmp_path / "ours", tensors, {}, SnapshotError)
    with safe_open(tmp_path / "ours", framework="pt") as f:
        assert same({k: f.get_tensor(k) for k in f.keys()}, tensors)  # noqa: SIM118
        assert f.metadata()["format"] == "pt", "which transformers asks for"
    save_file(tensors, tmp_path / "theirs", metadata={"ttt": json.dumps({"version": 1})})
    read, header = read_tensors(tmp_path / "theirs", SnapshotError)
    assert same(read, tensors)
    assert header == {"version": 1}, "files of earlier versions carry no checksum"
    save_file(tensors, tmp_path / "bare")
    assert read_tensors(tmp_path / "bare", SnapshotError)[1] == {}


def test_a_large_tensor_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 100)
    x = {"a": torch.randn(1234), "b": torch.randn(77).bfloat16()}
    write_tensors(tmp_path / "f", x, {}, SnapshotError)
    assert same(read_tensors(tmp_path / "f", SnapshotError)[0], x)


def test_what_is_read_is_ours_and_aligned(path):
    tensors, _ = read_tensors(path, SnapshotError)
    before = tensors["a"].clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensors["a"], before)
    assert all(x.data_ptr() % 16 == 0 for x in tensors.values())


def test_unstorable_dtypes_are_named(tmp_path):
    with pytest.raises(SnapshotError, match=r"q is of torch\.complex128"):
        write_tensors(tmp_path / "f", {"q": torch.zeros(1, dtype=torch.complex128)}, {}, SnapshotError)
    assert list(tmp_path.iterdir()) == []


class TestDamage:
    def test_every_flipped_bit_is_found(self, path):
        """All of a small file, not a sample: 8 bytes of length, header, padding, data."""
        raw = path.read_bytes()
        for place in range(len(raw)):
            for bit in random.Random(place).sample(range(8), 2):
                path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
                with pytest.raises(SnapshotError, match="nothing was changed"):
                    read_tensors(path, SnapshotError)

    def test_every_length_is_found(self, path):
        raw = path.read_bytes()
        for length in range(len(raw)):
            path.write_bytes(raw[:length])
            refused(path, "cannot be read")
        for more in (b"\0", b" " * 8, raw):
            path.write_bytes(raw + more)
            refused(path)

    def test_swapped_pieces_are_found(self, path):
        _, data = hostile.parts(path)
        raw = path.read_bytes()
        start = len(raw) - len(data)
        for a, b in ((0, 32), (64, 80), (1, 2)):
            swapped = bytearray(data)
            swapped[a : a + 8], swapped[b : b + 8] = data[b : b + 8], data[a : a + 8]
            path.write_bytes(raw[:start] + bytes(swapped))
            with pytest.raises(SnapshotError, match="checksum"):
                read_tensors(path, SnapshotError)

    def test_neither_mark_of_a_checksum_can_be_lost(self, path):
        header, data = hostile.parts(path)
        metadata = header["__metadata__"]
        for change in (
            lambda m: m.pop("ttt_checksum"),
            lambda m: m.pop("ttt"),
            lambda m: m.update(ttt=m["ttt"].replace('"checksum"', '"checksun"')),
            lambda m: m.update(ttt_checksum=m["ttt_checksum"].upper()),
            lambda m: m.update(ttt_checksum="sha256:"),
            lambda m: m.update(ttt_checksum="", ttt=m["ttt"]),
        ):
            changed = dict(metadata)
            change(changed)
            path.write_bytes(struct.pack("<Q", 0))
            text = json.dumps({**header, "__metadata__": changed}).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
            refused(path, "checksum does not match")

    def test_a_checksum_of_a_later_version(self, path):
        def change(header):
            header["__metadata__"]["ttt_checksum"] = "blake9:" + "0" * 64
            ours = json.loads(header["__metadata__"]["ttt"]) | {"checksum": "blake9"}
            header["__metadata__"]["ttt"] = json.dumps(ours)

        hostile.edit(path, change)
        refused(path, "this version does not know: blake9")


FAR = 10**15


class TestHostile:
    """Files with a checksum that fits, or with none: nothing that they say is believed."""

    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda h: h["a"].update(shape=[2**62, 2**62]), "impossible shape"),
            (lambda h: h["a"].update(shape=[0, 2**62]), "impossible shape"),
            (lambda h: h["a"].update(shape=[10**4000]), "impossible shape"),
            (lambda h: h["a"].update(shape=[1] * 40), "impossible shape"),
            (lambda h: h["a"].update(shape=[-5, -7]), "no list of sizes"),
            (lambda h: h["a"].update(shape=[5.0, 7.0]), "no list of sizes"),
            (lambda h: h["a"].update(shape=[True, 35]), "no list of sizes"),
            (lambda h: h["a"].update(shape="57"), "no list of sizes"),
            (lambda h: h["a"].update(shape=[5, 8]), "does not match its bytes"),
            (lambda h: h["a"].update(dtype="I64"), "does not match its bytes"),
            (lambda h: h["a"].update(dtype="F33"), "unknown dtype"),
            (lambda h: h["a"].update(dtype=["F32"]), "unknown dtype"),
            (lambda h: h["a"].update(dtype="os.system"), "unknown dtype"),
            (lambda h: h["a"].update(data_offsets=[140, 0]), "does not match its bytes"),
            (lambda h: h["a"].update(data_offsets=[0, 140, 280]), "does not match its bytes"),
            (lambda h: h["a"].update(data_offsets=[4, 144]), "overlaps"),
            (lambda h: h["a"].update(data_offsets=[10**12, 10**12 + 140]), "overlaps"),
            (lambda h: h.update(z=dict(h["a"])), "overlaps"),
            (lambda h: h.update(z={"dtype": "U8", "shape": [FAR], "data_offsets": [218, 218 + FAR]}), "take"),
            (lambda h: h.pop("d"), "take|overlaps"),
            (lambda h: h["a"].update(more=1), "no description"),
            (lambda h: h.update(a=7), "no description"),
            (lambda h: h.update({"\x1b[2J": h.pop("a")}), r"x1b"),
            (lambda h: h.update({"\ud800": h.pop("a")}), r"ud800"),
            (lambda h: h["__metadata__"].update(x=[1]), "no mapping of text"),
            (lambda h: h["__metadata__"].update(ttt="[]"), "no JSON object"),
            (lambda h: h["__metadata__"].update(ttt="{"), "no JSON"),
            (lambda h: h["__metadata__"].update(ttt='{"a": 1, "a": 2}'), "twice"),
            (lambda h: h["__metadata__"].update(ttt="[" * 100000), "recursion|no JSON"),
            (lambda h: h["__metadata__"].update(ttt='{"a": ' + "9" * 10000 + "}"), "no JSON"),
        ],
    )  # fmt: skip
    def test_headers(self, path, change, match, signed):
        header, data = hostile.parts(path)
        if not signed:
            header["__metadata__"] = {"ttt": "{}"}
        change(header)
        hostile.put(path, header, data)
        refused(path, match)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (b"[" * 200000, "recursion|Expecting"),
            (b'{"a":' * 200000, "recursion|Expecting"),
            (b"[]", "no JSON object"),
            (b"null", "no JSON object"),
            (b"", "Expecting"),
            (b"\xff\xfe{}", "utf-8"),
            (b'{"__metadata__":{},"__metadata__":{}}', "twice"),
            (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"dtype":"U8"}}', "twice"),
            (b'{"__metadata__":[]}', "no mapping"),
            (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', "no list of sizes"),
        ],
        ids=lambda x: str(x[:30]),
    )
    def test_raw_headers(self, tmp_path, text, match):
        path = tmp_path / "f"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        refused(path, match)

    @pytest.mark.parametrize("size", [9, 10**8, 2**63 - 1, 2**63, 2**64 - 1])
    def test_headers_longer_than_the_file_cost_nothing(self, tmp_path, size):
        (tmp_path / "f").write_bytes(struct.pack("<Q", size) + b"{}")
        refused(tmp_path / "f", "does not fit")

    def test_a_header_beyond_the_limit_is_not_read(self, tmp_path):
        path = tmp_path / "f"
        with path.open("wb") as f:
            f.write(struct.pack("<Q", files.MAX_HEADER + 8))
            f.truncate(files.MAX_HEADER + 16)
        refused(path, "too long")
        with pytest.raises(SnapshotError, match="would take"):
            write_tensors(tmp_path / "g", {}, {"x": "y" * files.MAX_HEADER}, SnapshotError)

    def test_more_than_there_is_memory(self, tmp_path):
        """A sparse file: it is as long as it says."""
        size, path = 2**43, tmp_path / "f"
        head = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        with path.open("wb") as f:
            f.write(struct.pack("<Q", len(head)) + head)
            try:
                f.truncate(8 + len(head) + size)
            except OSError:
                pytest.skip("this file system has no files that long")
        with pytest.raises(SnapshotError, match="more than there is memory"):
            read_tensors(path, SnapshotError)
        assert read_header(path, SnapshotError)[1]["a"][0] == (size,), "whose shape can be looked at before"

    def test_truth_values_are_true_or_false(self, tmp_path):
        path = tmp_path / "f"
        hostile.put(path, {"a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2")
        with pytest.raises(SnapshotError, match="neither true nor false"):
            read_tensors(path, SnapshotError)

    def test_what_is_no_file(self, tmp_path):
        refused(tmp_path, "directory|regular")
        refused(tmp_path / "missing", "No such file")
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "no regular file")
        refused("/dev/zero", "no regular file")

    def test_a_file_that_changes_while_it_is_read(self, path, monkeypatch):
        # More than Python reads ahead.
        write_tensors(path, {"a": torch.randn(2**20)}, {}, SnapshotError)
        original = files._read_header
        for change, match in ((lambda n: n - 8, "shrank"), (lambda n: n + 8, "grew")):
            raw = path.read_bytes()

            def then(f, change=change):
                out = original(f)
                os.truncate(path, change(path.stat().st_size))
                return out

            monkeypatch.setattr(files, "_read_header", then)
            with pytest.raises(SnapshotError, match=match):
                read_tensors(path, SnapshotError)
            path.write_bytes(raw)

    def test_json(self, tmp_path):
        path = tmp_path / "c.json"
        write_json(path, {"b": 1, "a": [float("inf")]}, AdapterError)
        assert read_json(path, AdapterError) == {"b": 1, "a": [float("inf")]}
        for text, match in (("[]", "no JSON object"), ('{"a":1,"a":1}', "twice"), ("[" * 10**6, "no JSON")):
            path.write_text(text)
            with pytest.raises(AdapterError, match=match):
                read_json(path, AdapterError)
        with path.open("wb") as f:
            f.truncate(10**12)
        with pytest.raises(AdapterError, match="longer than"):
            read_json(path, AdapterError)


class TestPermissions:
    @pytest.fixture(autouse=True)
    def usual_umask(self):
        before = os.umask(0o022)
        yield
        os.umask(before)

    @staticmethod
    def mode(path):
        return path.stat().st_mode & 0o777

    @pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000])
    def test_new_files(self, tmp_path, umask):
        os.umask(umask)
        write_tensors(tmp_path / "adapter", {}, {}, AdapterError)
        write_json(tmp_path / "config", {}, AdapterError)
        write_tensors(tmp_path / "session", {}, {}, SnapshotError, private=True)
        assert self.mode(tmp_path / "adapter") == self.mode(tmp_path / "config") == 0o666 & ~umask
        assert self.mode(tmp_path / "session") == 0o600, "it may hold private text"

    @pytest.mark.parametrize("mode", [0o640, 0o600, 0o444, 0o666])
    def test_an_existing_file_keeps_its_own(self, tmp_path, mode):
        path = tmp_path / "session"
        for private in (True, False):
            write_tensors(path, {}, {}, SnapshotError)
            path.chmod(mode)
            write_tensors(path, {}, {"new": private}, SnapshotError, private=private)
            assert self.mode(path) == mode
            assert read_tensors(path, SnapshotError)[1] == {"new": private}

    def test_a_link_is_replaced_not_followed(self, tmp_path):
        target = tmp_path / "target"
        target.write_text("mine")
        (tmp_path / "link").symlink_to(target)
        write_tensors(tmp_path / "link", {}, {}, SnapshotError)
        assert target.read_text() == "mine"
        assert not (tmp_path / "link").is_symlink()

    def test_threads_that_save_to_one_name(self, tmp_path):
        failures = []

        def save(i):
            try:
                for _ in range(10):
                    write_tensors(tmp_path / "s", {"x": torch.full((1000,), i)}, {"i": i}, SnapshotError)
                    x, header = read_tensors(tmp_path / "s", SnapshotError)
                    assert (x["x"] == header["i"]).all()
            except Exception as e:
                failures.append(e)

        threads = [threading.Thread(target=save, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert failures == []
        assert [p.name for p in tmp_path.iterdir()] == ["s"]
