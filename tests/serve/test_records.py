"""``session.json``: what was edited is refused, and what was forged is checked before it is believed."""

from __future__ import annotations

import json

import pytest

from tests import models
from tests.serve.loopback import Server, refused, user
from ttt_compiler.errors import SnapshotError
from ttt_compiler.serve.store import Store, _checksum


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def server(model, tokenizer, folder):
    """Keeps one session in memory, so ``s`` goes when another request comes."""
    with Server(model, tokenizer, folder, limit=1) as running:
        running.say(user("w1 w2"), session="s")
        running.say(user("w1"))
        yield running


@pytest.fixture
def record(server, folder):
    path = folder / "s" / "session.json"
    good = path.read_bytes()
    yield path
    path.write_bytes(good)
    server.say(user("w1"))


def refuses(server):
    with refused(500, "session_unreadable") as caught:
        server.get("/sessions/s")
    with refused(500, "session_unreadable"):
        server.chat(user("w1"), session="s", mode="append")
    return caught[0].message


FORGED = {
    "messages": [
        [],
        {"a": 1},
        5,
        [user("w9")],
        [{"role": "tool", "content": "w9"}] * 2,
        [user("w9"), {"role": "assistant", "content": 5}],
        [user("w9"), {"role": "assistant", "content": "\ud800"}],
        [user("w9"), {"role": ["assistant"], "content": "w1"}],
    ],
    "ids": [[], 5, "1", [1.5] * 8, [True] * 8, [-1] * 8, [10**30] * 8, [models.VOCAB] * 8],
    "session": [5, [1], None],
    "file": [5, None, "../other/1.ttt", "1.ttt/../1.ttt", ""],
    "sha256": [None, 5],
    "version": [1, None],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in FORGED.items() for v in values])
def test_records_that_say_something_else(server, record, field, value):
    data = json.loads(record.read_text())
    data[field] = value
    record.write_text(json.dumps(data))
    refuses(server)
    del data["checksum"]
    record.write_text(json.dumps({**data, "checksum": _checksum(data)}))
    refuses(server)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("w1 w2", "w1 w3"),
        lambda text: text.replace('"session": {', '"session": {"id": "evil", "in_memory": true, '),
        lambda text: text.replace("sha256:", "sha256:0"),
        lambda text: text.replace('"checksum"', '"checksums"'),
        lambda text: text[:-1] + ', "more": 1}',
        lambda text: '{"a":' * 100_000,
    ],
    ids=[
        "empty",
        "no field",
        "cut",
        "another message",
        "another description",
        "another checksum",
        "no checksum",
        "more",
        "deep",
    ],
)
def test_records_that_were_edited(server, record, folder, edit):
    record.write_text(edit(record.read_text()))
    assert str(folder) not in refuses(server)


def test_files_that_do_not_belong_together(start, tmp_path):
    folder = tmp_path / "sessions"
    with start(saved=True) as server:
        for name in ("a", "b", "c"):
            server.say(user("w1 w2 w3 w4 w5 w6 w7"), session=name)
    (folder / "a" / "1.ttt").write_bytes((folder / "b" / "1.ttt").read_bytes() + b" ")
    for name in ("b", "c"):
        record = json.loads((folder / name / "session.json").read_text())
        signed = record.pop("checksum")
        record["ids"] = record["ids"][:-2]
        record["checksum"] = signed if name == "b" else _checksum(record)
        (folder / name / "session.json").write_text(json.dumps(record))
    reasons = {"a": "not the file", "b": "its checksum does not fit", "c": "its record 16"}
    with start(saved=True) as server:
        for name, why in reasons.items():
            with refused(500, "session_unreadable") as caught:
                server.chat(user("w1"), session=name)
            assert why in caught[0].message
            assert str(tmp_path) not in caught[0].message
            server.client.delete(f"/sessions/{name}", cast_to=object)
            assert server.say(user("w1"), session=name)


def test_nothing_in_a_record_is_shown_as_something_else(server, record):
    data = json.loads(record.read_text())
    del data["checksum"]
    data["session"] |= {"id": "evil", "in_memory": True, "object": "x", "conversation_tokens": -1}
    record.write_text(json.dumps({**data, "checksum": _checksum(data)}))
    shown = server.get("/sessions/s")
    assert (shown["id"], shown["in_memory"], shown["object"]) == ("s", False, "session")
    assert shown["conversation_tokens"] == len(data["ids"])


def test_how_a_record_is_laid_out_does_not_matter(server, record):
    data = json.loads(record.read_text())
    record.write_text(json.dumps(dict(reversed(data.items())), indent=1))
    assert server.get("/sessions/s")["id"] == "s"


def test_what_could_not_be_read_again_is_not_saved(model, tmp_path, monkeypatch):
    from ttt_compiler.runtime.session import Session
    from ttt_compiler.serve.store import Live

    store = Store(tmp_path, model)
    monkeypatch.setattr("ttt_compiler.serve.store.MAX_HEADER", 10)
    with pytest.raises(SnapshotError, match="can be saved"):
        store.save("s", Live(Session(model)))
    assert store.names() == []
    assert not list((tmp_path / "s").iterdir())
    store.close()
