"""Text in pieces, room in memory, turns of the worker, a folder for one server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from ttt_compiler.errors import TTTError
from ttt_compiler.serve.errors import BusyError, CancelledError
from ttt_compiler.serve.residents import Residents
from ttt_compiler.serve.store import Store
from ttt_compiler.serve.text import TextStream
from ttt_compiler.serve.worker import Worker


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


class TestText:
    @settings(max_examples=60, deadline=None)
    @given(st.text(alphabet="ab é漢🙂\n", max_size=20), st.lists(st.text("ab é🙂", min_size=1, max_size=4)))
    def test_pieces_are_the_text_up_to_a_stop_string(self, text, stop):
        stream, out = TextStream(BYTES, stop), []
        for token in BYTES(text)["input_ids"]:
            out.append(stream.push(token))
            if stream.stopped:
                break
        out.append(stream.finish())
        assert all("\ufffd" not in piece for piece in out)
        # The first stop string that is complete ends it; of those complete by then, the earliest.
        ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
        seen = text[: ends[0]] if ends else text
        cuts = [at for at in (seen.find(s) for s in stop) if at >= 0]
        assert "".join(out) == stream.text == (text[: min(cuts)] if cuts else text)
        assert stream.stopped == bool(cuts)

    def test_what_may_become_a_stop_string_is_held_back(self):
        stream = TextStream(BYTES, ["\nuser:"])
        pieces = [stream.push(t) for t in BYTES("a\nus\nuser:b")["input_ids"]]
        assert "".join(pieces) == "a\nus"
        assert pieces[:4] == ["a", "", "", ""]
        assert stream.stopped

    def test_incomplete_characters_are_shown_at_the_end(self):
        stream = TextStream(BYTES)
        half = BYTES("🙂")["input_ids"][:2]
        assert [stream.push(t) for t in half] == ["", ""]
        assert stream.finish() == "\ufffd"


class TestResidents:
    def test_the_longest_unused_goes(self):
        room = Residents(2, evictable=True)
        assert room.admit("a") is room.admit("b") is None
        room.rest("a"), room.rest("b")
        assert room.admit("a") is None
        assert room.admit("c") == "b"
        with pytest.raises(BusyError, match="are busy"):
            room.admit("b")
        room.rest("a")
        assert room.admit("b") == "a"
        assert len(room) == 2

    def test_what_cannot_be_read_again_stays(self):
        room = Residents(1, evictable=False)
        room.admit("a"), room.rest("a")
        with pytest.raises(BusyError, match="--sessions DIR"):
            room.admit("b")
        room.remove("a")
        assert room.admit("b") is None


class TestWorker:
    def test_turns_errors_and_cancelling(self):
        def counted(name, end):
            for i in range(end):
                yield (name, i)
            raise_at_end = {}
            if name == "bad":
                raise_at_end["missing"]

        async def main():
            worker, seen, never, now = Worker(), [], threading.Event(), threading.Event()
            now.set()
            gate = threading.Event()

            def gated():
                gate.wait(10)
                yield ("gate", 0)

            jobs = [asyncio.create_task(worker.run(gated(), seen.append, never))]
            for name, end, cancelled in (("a", 3, never), ("bad", 2, never), ("gone", 9, now)):
                jobs.append(asyncio.create_task(worker.run(counted(name, end), seen.append, cancelled)))
            await asyncio.sleep(0.05)
            gate.set()
            results = await asyncio.gather(*jobs, return_exceptions=True)
            assert [type(r) for r in results] == [type(None), type(None), KeyError, CancelledError]
            assert seen == [("gate", 0), ("a", 0), ("bad", 0), ("a", 1), ("bad", 1), ("a", 2)]
            assert worker.alive
            worker.stop()
            await asyncio.to_thread(worker._thread.join, 10)
            assert not worker.alive

        asyncio.run(main())


def test_a_folder_is_for_one_server_at_a_time(model, tmp_path):
    store = Store(tmp_path / "s", model)
    with pytest.raises(TTTError, match="another server"):
        Store(tmp_path / "s", model)
    store.close()
    Store(tmp_path / "s", model).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(TTTError, match="cannot be kept there"):
        Store(tmp_path / "file", model)


def test_deleting_leaves_files_of_others(model, tmp_path):
    store = Store(tmp_path, model)
    (tmp_path / "s").mkdir()
    for name in ("session.json", "1.ttt", ".2.ttt.abc", "notes.txt"):
        (tmp_path / "s" / name).write_text("{}")
    store.delete("s")
    store.close()
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["notes.txt"]
    assert store.names() == []


def test_the_package_does_not_import_the_server():
    code = "import sys, ttt_compiler, ttt_compiler.cli; sys.exit('fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
