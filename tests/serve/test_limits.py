"""Requests that are too large are refused before they cost much."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from pydantic import ValidationError

from tests.serve.loopback import Server, refused, user
from tests.serve.test_parts import BYTES
from ttt_compiler.serve.body_limit import MAX_BODY
from ttt_compiler.serve.launch import ServeOptions
from ttt_compiler.serve.schemas import ChatRequest
from ttt_compiler.serve.text import TextStream

MOST = 64 * 2**10
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with Server(model, tokenizer, max_body=MOST) as running:
        yield running


def body(size):
    text = json.dumps({"model": "tiny", "messages": [user("w1")], "max_tokens": 1})
    return (text + " " * (size - len(text))).encode()


def send(server, path, content):
    headers = {"content-type": "application/json"}
    # The first call of the model compiles it.
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60)


def pieces(content):
    for start in range(0, len(content), 4096):
        yield content[start : start + 4096]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/sessions/s/fork", "/nope"])
def test_a_body_that_is_too_long(server, path, declared):
    content = body(MOST + 1)
    answer = send(server, path, content if declared else pieces(content))
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("too_large", None)
    assert str(MOST) in error["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_just_fits(server, declared):
    content = body(MOST)
    answer = send(server, CHAT, content if declared else pieces(content))
    assert answer.status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_far_too_long_is_answered_while_it_is_sent(start, declared):
    content = body(4 * MAX_BODY)
    with start() as server:
        answer = send(server, CHAT, content if declared else pieces(content))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert send(server, CHAT, body(200)).status_code == 200


def test_the_limit_of_the_command():
    assert ServeOptions("tiny", None).max_body == MAX_BODY
    with pytest.raises(ValueError, match="max_body=0"):
        ServeOptions("tiny", None, max_body=0)


def test_four_stop_strings(server):
    assert server.say(user("w1"), stop=["a", "b", "c", "d"])
    with refused(400, "invalid_request") as caught:
        server.chat(user("w1"), stop=["a", "b", "c", "d", "e"])
    assert caught[0].param == "stop"
    assert "at most 4 strings" in caught[0].message


def test_too_many_messages():
    with pytest.raises(ValidationError, match="at most 8192"):
        ChatRequest(model="tiny", messages=[user("w1")] * 8193)


@pytest.mark.parametrize("session", [None, "s"])
@pytest.mark.parametrize("messages", [[user("w1 " * 9000)], [user("")] * 600], ids=["text", "messages"])
def test_what_cannot_fit_is_not_tokenised(server, monkeypatch, messages, session):
    def fails(*_):
        raise AssertionError

    monkeypatch.setattr("ttt_compiler.serve.conversation.ChatTemplate._render", fails)
    with refused(400, "context_length_exceeded") as caught:
        server.chat(*messages, session=session)
    assert "cannot fit" in caught[0].message


def test_room_is_what_the_session_has_left(server):
    server.say(user("w1 " * 400), session="long")
    with refused(400, "context_length_exceeded") as caught:
        server.chat(user("w1 " * 2000), session="long", mode="append")
    assert "cannot fit" in caught[0].message


def test_spaces_around_a_text_do_not_count(server):
    assert server.say(user(" " * 60_000 + "w1"))


@pytest.mark.parametrize("stop", ["a" * 10**6, "a" * 2000 + "b"])
def test_long_stop_strings_cost_no_more_than_short_ones(stop):
    (token,) = BYTES("a")["input_ids"]
    stream = TextStream(BYTES, [stop] * 4)
    started = time.monotonic()
    shown = sum(len(stream.push(token)) for _ in range(4000))
    assert time.monotonic() - started < 5
    assert shown == max(0, 4000 - len(stop) + 1)
    assert shown + len(stream.finish()) == 4000
