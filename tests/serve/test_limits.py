"""What a server takes from its model and from strangers: defaults, sizes, edited files, odd requests."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
import torch
from transformers import GenerationConfig

from tests.serve.loopback import Server, user
from ttt_compiler.errors import ConfigError, TTTError, UnsupportedModelError
from ttt_compiler.serve import body_limit
from ttt_compiler.serve.launch import ServeOptions, listen
from ttt_compiler.serve.sampling import check_defaults, chooser

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with Server(model, tokenizer) as running:
        yield running


def post(server, **body):
    whole = {"model": "tiny", "messages": [user("w1 w2")], "max_tokens": 2, **body}
    return httpx.post(
        f"{server.url}/v1/chat/completions", content=json.dumps(whole), headers=JSON, timeout=60
    )


def drawn(defaults, count=64, *, logits=None, tokens=(), **asked):
    logits = torch.tensor([[1.0, 1.1, 0.9, -3.0]]) if logits is None else logits
    given = {"temperature": None, "top_p": None, "seed": 0, "device": "cpu", **asked}
    choose = chooser(defaults, **given)
    return {choose(list(tokens), logits) for _ in range(count)}


def test_settings_of_the_model_are_honoured():
    assert len(drawn(None)) > 1
    assert drawn(GenerationConfig(do_sample=False)) == {1}
    assert len(drawn(GenerationConfig(do_sample=False), temperature=1.0)) > 1
    assert drawn(GenerationConfig(), temperature=0.0) == {1}
    assert drawn(GenerationConfig(top_k=1)) == {1}
    assert drawn(GenerationConfig(min_p=0.95)) == {1}
    penal = GenerationConfig(do_sample=False, repetition_penalty=2.0)
    assert drawn(penal, tokens=[1]) == {0}
    assert drawn(penal, tokens=[1, 0]) == {2}


def test_settings_that_are_not_honoured_are_refused():
    check_defaults(GenerationConfig())
    check_defaults(None)
    with pytest.raises(UnsupportedModelError, match="bad_words_ids, no_repeat_ngram_size"):
        check_defaults(GenerationConfig(no_repeat_ngram_size=3, bad_words_ids=[[5]]))


def test_a_body_beyond_the_limit(server):
    out = post(server, messages=[user("w" * (body_limit.MOST_BODY + 1))])
    assert out.status_code == 413
    assert out.json()["error"]["code"] == "too_large"
    assert post(server).status_code == 200


def test_odd_requests(server):
    out = post(server, stop=[f"s{i}" for i in range(5)])
    assert (out.status_code, out.json()["error"]["param"]) == (400, None)
    assert "at most 4" in out.json()["error"]["message"]
    for stream in (False, True):
        out = post(server, messages=[user("\ud800")], stream=stream)
        assert out.status_code == 400, out.text
    out = post(server, stop=7)
    assert out.json()["error"]["param"] == "stop"
    out = post(server, messages=[{"role": "user", "content": 7}])
    assert out.json()["error"]["param"] == "messages.0.content"
    out = httpx.post(f"{server.url}/v1/chat/completions", content="{", headers=JSON, timeout=60)
    assert (out.status_code, out.json()["error"]["param"]) == (400, None)
    out = httpx.get(f"{server.url}/v1/sessions/", timeout=60)
    assert out.status_code == 404
    assert "error" in out.json()


def test_one_model(server):
    assert httpx.get(f"{server.url}/v1/models/tiny", timeout=60).json()["id"] == "tiny"
    assert httpx.get(f"{server.url}/v1/models/other", timeout=60).status_code == 404


@pytest.mark.parametrize(
    "edit",
    [
        {"messages": []},
        {"ids": [1.5]},
        {"session": 5},
        {"session": {"id": "evil", "in_memory": True}},
        {"record_sha256": "0" * 64},
    ],
)
def test_an_edited_record_is_not_continued(start, tmp_path, edit):
    with start(saved=True) as first:
        first.say(user("w1 w2 w3"), session="s")
    path = tmp_path / "sessions" / "s" / "session.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with start(saved=True) as second:
        for out in (httpx.get(f"{second.url}/v1/sessions/s", timeout=60), post(second, session="s")):
            assert out.json()["error"]["code"] == "session_unreadable", out.text


def test_ports():
    with pytest.raises(ConfigError, match="between 0"):
        ServeOptions("m", None, port=99999)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TTTError, match="cannot listen on"):
            listen("127.0.0.1", taken.getsockname()[1])
    listen("127.0.0.1", 0).close()
