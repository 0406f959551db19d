"""Requests as bytes: what is refused, how, and which field is to blame."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.serve.loopback import Server, assistant, user


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with Server(model, tokenizer, limit=64) as running:
        yield running


def post(server, body, path="/v1/chat/completions"):
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=60)


def chat(**fields):
    return {"model": "tiny", "messages": [user("w1 w2")], "max_tokens": 3, **fields}


def refusal(answer, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [user("w1 \ud800")]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]}, "messages"),
        ({"messages": [{**user("w1"), "\ud800": 1}]}, "messages"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"model": "\ud800"}, "model"),
        ({"session": "\ud800"}, "session"),
        ({"\ud800": 1}, "?"),
    ],
    ids=["content", "part", "key of a message", "stop", "model", "session", "key"],
)
def test_half_a_character(server, fields, param, stream):
    error = refusal(post(server, chat(**fields, stream=stream)))
    assert "surrogate" in error["message"]
    assert error["param"] == param
    assert refusal(post(server, {"session": "\ud800"}, "/v1/sessions/s/fork"))["param"] == "session"


def test_whole_characters_may_be_escaped(server):
    assert post(server, chat(messages=[user("w1 \U0001f642")])).status_code == 200


@pytest.mark.parametrize(
    "body", ['{"a":', "", "[1]", '"x"', "null", "[" * 100_000, '{"seed":' + "9" * 9999 + "}"]
)
def test_what_is_no_object_blames_no_field(server, body):
    assert refusal(post(server, body))["param"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": 5}, "stop"),
        ({"stop": [None]}, "stop"),
        ({"stop": {"a": 5}}, "stop"),
        ({"stop": ""}, "stop"),
        ({"temperature": 3}, "temperature"),
        ({"session": 5}, "session"),
        ({"session_mode": "append"}, "session_mode"),
        ({"tools": [{}], "best_of": 2}, "best_of"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [user("w1"), {"role": "tool", "content": "w1"}]}, "messages.1.role"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "messages"),
    ],
    ids=str,
)
def test_which_field_is_to_blame(server, fields, param):
    error = refusal(post(server, chat(**fields)))
    assert error["param"] == param
    assert "str" not in error["message"].split(":")[0].split(".")


def test_a_field_that_is_missing(server):
    assert refusal(post(server, {"messages": [user("w1")]}))["param"] == "model"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "'tiny' is"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [assistant("w1")]}, 400, "nothing to reply to"),
        ({"messages": [{"role": "tool", "content": "w1"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "content"),
        ({"messages": [{"role": "user", "content": "w", "name": "x"}]}, 400, "name"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 2}, 400, "leave out: n"),
        ({"tools": [{}], "best_of": 2}, 400, "leave out: best_of, tools"),
        ({"stop": [""]}, 400, "stop"),
        ({"session_mode": "append"}, 400, "needs a session"),
        ({"session": "s", "session_mode": "replace"}, 400, "session_mode"),
        ({"max_tokens": 600}, 400, "context 512"),
        ({"messages": [user("w1 " * 600)]}, 400, "leaves no room"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_requests(server, body, status, message):
    given = {"model": "tiny", "messages": [user("w1")], **body}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=given)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_asks_for_nothing_is_accepted(server):
    more = {"n": 1, "user": "me", "frequency_penalty": 0, "logprobs": False, "tools": []}
    assert server.say(user("w1"), extra_headers={"x-test": "1"}, **more)


def test_no_json_and_no_such_path(server):
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content="{", headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]
    answer = httpx.get(f"{server.url}/v1/embeddings")
    assert answer.status_code == 404
    assert "/v1/embeddings" in answer.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/sessions/", "/health/", "/nope"])
def test_paths_that_are_none(server, method, path):
    assert path in refusal(httpx.request(method, f"{server.url}{path}"), 404)["message"]


def test_one_model(server):
    (listed,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert httpx.get(f"{server.url}/v1/models/tiny").json() == listed
    error = refusal(httpx.get(f"{server.url}/v1/models/org/other"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
