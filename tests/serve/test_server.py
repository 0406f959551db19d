"""The server over loopback, by the real openai client."""

from __future__ import annotations

import concurrent.futures
import errno

import httpx
import openai
import pytest
import torch

import ttt_compiler as ttt
from tests.runtime.test_session import same
from tests.serve.loopback import (
    END,
    WORDS,
    Direct,
    Server,
    assistant,
    ids,
    refused,
    turn,
    until,
    user,
    words,
)

TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8 w7", "w30 w31 w32 w33 w34 w35 w36 w37 w38 w39 w40", "w2"]


def saved_session(model, folder, name):
    (file,) = (folder / "sessions" / name).glob("*.ttt")
    return ttt.Session.load(model, file)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with Server(model, tokenizer, limit=64) as running:
        yield running


class TestOneRequest:
    def test_greedy_is_the_oracles(self, server, model):
        from tests.models import oracle

        expected = torch.tensor([turn(TEXTS[0])])
        for _ in range(8):
            expected = torch.cat([expected, oracle(model, expected)[:, -1].argmax(-1, keepdim=True)], 1)
        assert server.say(user(TEXTS[0])) == words(expected[0, -8:].tolist())

    def test_without_a_session_nothing_is_kept(self, server, model):
        first = server.say(user(TEXTS[0]))
        assert first == server.say(user(TEXTS[0])) == Direct(model).say(TEXTS[0])
        assert server.get("/sessions")["data"] == []
        assert len(server.sessions._residents) == 0

    def test_usage_and_finish_reason(self, server):
        out = server.chat(user(TEXTS[1]), tokens=5)
        assert out.choices[0].finish_reason == "length"
        assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (len(turn(TEXTS[1])), 5)
        assert out.usage.prompt_tokens_details.cached_tokens == 0
        assert (out.object, out.model) == ("chat.completion", "tiny")

    def test_streaming_says_the_same(self, server):
        whole = server.chat(user(TEXTS[2]), tokens=12, temperature=1.0, seed=3)
        stream = server.chat(
            user(TEXTS[2]),
            tokens=12,
            temperature=1.0,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 3, "not in pieces"
        assert chunks[0].choices[0].delta.role == "assistant"
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
        assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
        assert chunks[-1].usage == whole.usage
        assert len({c.id for c in chunks}) == 1

    def test_seeds(self, server):
        texts = [server.say(user("w1"), temperature=1.5, top_p=0.9, seed=s) for s in (5, 5, 6)]
        assert texts[0] == texts[1] != texts[2]
        assert server.say(user("w1"), temperature=1.5) != server.say(user("w1"), temperature=1.5)

    def test_stop_strings(self, server, model):
        spoken = Direct(model).say(TEXTS[0], 12).split()
        at = next(i for i in range(2, 12) if spoken[i] not in spoken[:i])
        out = server.chat(user(TEXTS[0]), tokens=12, stop=["nowhere", f" {spoken[at]}"])
        assert out.choices[0].finish_reason == "stop"
        assert out.choices[0].message.content == " ".join(spoken[:at])
        stream = server.chat(user(TEXTS[0]), tokens=12, stop=spoken[at], stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in stream)
        assert text == " ".join(spoken[:at]) + " "

    def test_a_system_message_and_text_parts(self, server):
        parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
        system = {"role": "developer", "content": "w5"}
        out = server.chat(system, {"role": "user", "content": parts})
        assert out.usage.prompt_tokens == len([*turn("w5"), *turn("w1 w2")]) - 1

    def test_models_and_health(self, server):
        assert [m.id for m in server.client.models.list()] == ["tiny"]
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}

    def test_long_prompts_are_read_in_blocks(self, start, server):
        text = " ".join(WORDS[5 + i % 90] for i in range(100))
        with start(block=16) as other:
            assert other.say(user(text)) == server.say(user(text))


class TestSessions:
    def test_whole_conversations_and_new_messages_alone(self, server, model):
        direct = Direct(model)
        conversation = []
        for text in TEXTS[:2]:
            conversation.append(user(text))
            out = server.chat(*conversation, session="whole")
            conversation.append(assistant(out.choices[0].message.content))
            assert conversation[-1]["content"] == direct.say(text)
        assert out.session == "whole"
        assert (
            out.usage.prompt_tokens_details.cached_tokens == len(direct.ids) - 8 - 1 - len(turn(TEXTS[1])) - 1
        )
        assert server.say(user(TEXTS[2]), session="whole") == direct.say(TEXTS[2])
        info = server.get("/sessions/whole")
        assert info["conversation_tokens"] == len(direct.ids)
        assert info["tokens_seen"] == direct.session.tokens_seen == [len(direct.ids) - 1]
        assert [m["content"] for m in info["messages"][::2]] == TEXTS[:3]
        assert same(server.sessions._entries["whole"].live.session, direct.session), "bit for bit"

    def test_sessions_remember_beyond_what_stateless_requests_do(self, server):
        server.say(user(TEXTS[2]), session="memory")
        assert server.say(user("w1"), session="memory") != server.say(user("w1"))

    def test_restart(self, start, model, tmp_path):
        direct = Direct(model)
        for text in TEXTS:
            with start(saved=True) as server:
                assert server.say(user(text), session="book") == direct.say(text)
                assert server.get("/sessions")["data"] == [{"id": "book", "object": "session"}]
        assert same(saved_session(model, tmp_path, "book"), direct.session)
        names = sorted(p.name for p in (tmp_path / "sessions" / "book").iterdir())
        assert names == ["4.ttt", "session.json"]

    def test_sessions_that_leave_memory_come_back(self, start, model):
        names = ["a", "b", "c"]
        direct = {name: Direct(model) for name in names}
        with start(saved=True, limit=1) as server:
            for text in TEXTS[:3]:
                for name in names:
                    assert server.say(user(text), session=name) == direct[name].say(text), (text, name)
                    assert len(server.sessions._residents) == 1
            infos = [server.get(f"/sessions/{name}") for name in names]
        assert [i["in_memory"] for i in infos] == [False, False, True]
        assert [i["tokens_seen"] for i in infos] == [direct[n].session.tokens_seen for n in names]

    def test_fork_and_delete(self, start, model):
        direct = Direct(model)
        direct.say(TEXTS[0])
        with start(saved=True, limit=2) as server:
            server.say(user(TEXTS[0]), session="trunk")
            for target in ("left", "right"):
                info = server.client.post("/sessions/trunk/fork", body={"session": target}, cast_to=object)
                assert (info["id"], info["tokens_seen"]) == (target, direct.session.tokens_seen)
            one = server.say(user(TEXTS[1]), session="left")
            assert one == direct.say(TEXTS[1]) == server.say(user(TEXTS[1]), session="right")
            with refused(409, "session_exists"):
                server.client.post("/sessions/trunk/fork", body={"session": "left"}, cast_to=object)
            assert server.client.delete("/sessions/left", cast_to=object)["deleted"]
            for path in ("/sessions/left", "/sessions/never"):
                with refused(404, "session_not_found"):
                    server.get(path)
                with refused(404, "session_not_found"):
                    server.client.delete(path, cast_to=object)
            assert server.say(user(TEXTS[0]), session="left") == Direct(model).say(TEXTS[0]), "new again"
            assert [d["id"] for d in server.get("/sessions")["data"]] == ["left", "right", "trunk"]

    def test_contradictions(self, server, model):
        direct = Direct(model)
        first = server.say(user(TEXTS[0]), session="strict")
        direct.say(TEXTS[0])
        before = server.get("/sessions/strict")
        for messages, mode in (
            ([user(TEXTS[0])], None),
            ([user(TEXTS[0]), assistant("w1"), user("w2")], None),
            ([user("w3"), assistant(first), user("w2")], None),
            ([user(TEXTS[0]), assistant(first + " w1"), user("w2")], "continue"),
            ([user("w2")], "continue"),
        ):
            with refused(409, "session_conflict") as caught:
                server.chat(*messages, session="strict", mode=mode)
            assert "session_mode" in caught[0].message
        assert server.get("/sessions/strict") == before
        again = server.say(user(TEXTS[0]), session="strict", mode="append")
        assert again == direct.say(TEXTS[0])
        whole = [user(TEXTS[0]), assistant(first), user(TEXTS[0]), assistant(f" {again}\n"), user("w2")]
        assert server.say(*whole, session="strict", mode="continue") == direct.say("w2")

    def test_a_reply_that_the_model_ends(self, model, tokenizer, monkeypatch):
        """The end-of-turn token that was sampled is not read twice, and never twice written."""
        direct = Direct(model)
        spoken = direct.say(TEXTS[0], 12).split()
        at = next(i for i in range(2, 12) if spoken[i] not in spoken[:i])
        monkeypatch.setattr(model.generation_config, "eos_token_id", [ids(spoken[at])[0], END])
        with Server(model, tokenizer) as server:
            out = server.chat(user(TEXTS[0]), session="s", tokens=12)
            assert out.choices[0].finish_reason == "stop"
            assert out.choices[0].message.content == " ".join(spoken[:at])
            assert out.usage.completion_tokens == at + 1
            direct.ids = [*turn(TEXTS[0]), *ids(" ".join(spoken[:at]))]
            assert server.get("/sessions/s")["tokens_seen"] == [len(direct.ids)]
            follow = server.say(user("w3"), session="s", tokens=2)
        direct.session = ttt.Session(model)
        assert follow.split() == direct.say("w3", 2).split()[: len(follow.split())]


class TestConcurrency:
    def test_different_sessions_are_as_if_alone(self, start, model, tmp_path):
        def run(server, prefix):
            def one(k):
                name, settings = f"{prefix}{k}", {"temperature": 1.2, "seed": k}
                texts = [server.say(user(t), session=name, tokens=20, **settings) for t in TEXTS[k:]]
                return [*texts, server.say(user("w1"), tokens=20, **settings)]

            return one

        with start(saved=True) as server:
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                together = list(pool.map(run(server, "t"), range(4)))
            alone = [run(server, "a")(k) for k in range(4)]
        assert together == alone
        for k in range(4):
            assert same(*(saved_session(model, tmp_path, f"{p}{k}") for p in "ta")), k

    def test_one_session_is_served_in_order(self, server, model, monkeypatch):
        calls = server.slow(monkeypatch)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            waiting = []
            for k, text in enumerate(TEXTS):
                waiting.append(pool.submit(server.say, user(text), session="queue", mode="append"))
                until(lambda k=k: server.sessions._entries.get("queue") is not None)
                until(lambda k=k: server.sessions._entries["queue"].users == k + 1)
            assert len(calls) < 8, "the first one is still on its way"
            replies = [w.result() for w in waiting]
        direct = Direct(model)
        assert replies == [direct.say(text) for text in TEXTS]

    def test_streams_of_different_sessions_take_turns(self, server, monkeypatch):
        server.slow(monkeypatch, 0.01)
        long = iter(server.chat(user("w1"), session="long", tokens=200, stream=True))
        next(long)
        short = list(server.chat(user("w1"), session="short", tokens=5, stream=True))
        assert short[-1].choices[0].finish_reason == "length"
        assert not server.get("/sessions")["data"] or "long" not in str(server.get("/sessions"))
        assert sum(1 for _ in long) > 100


class TestWhatGoesWrong:
    @pytest.mark.parametrize("saved", [False, True])
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves(self, start, model, monkeypatch, saved, stream):
        direct = Direct(model)
        with start(saved=saved) as server:
            assert server.say(user(TEXTS[0]), session="s") == direct.say(TEXTS[0])
            before = server.get("/sessions/s")
            with monkeypatch.context() as patch:
                calls = server.slow(patch)
                if stream:
                    with server.chat(user("w1"), session="s", tokens=400, stream=True) as running:
                        for _ in range(3):
                            next(iter(running))
                else:
                    with pytest.raises(openai.APITimeoutError):
                        server.chat(user("w1"), session="s", tokens=400, timeout=0.3)
                until(lambda: not server.sessions._turns)
                assert 1 <= len(calls) < 100
            assert server.get("/sessions/s") == before
            assert server.say(user(TEXTS[1]), session="s") == direct.say(TEXTS[1])

    def test_a_server_that_stops(self, start, model, monkeypatch):
        direct = Direct(model)
        with start(saved=True, grace=1) as server:
            server.say(user(TEXTS[0]), session="s")
            direct.say(TEXTS[0])
            server.slow(monkeypatch)
            running = server.chat(user("w1"), session="s", tokens=400, stream=True)
            next(iter(running))
        assert not server.sessions.healthy
        running.close()
        with start(saved=True) as server:
            assert server.say(user(TEXTS[1]), session="s") == direct.say(TEXTS[1])

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_error_while_generating(self, server, model, monkeypatch, stream):
        name, direct = f"error{stream}", Direct(model)
        direct.say(TEXTS[0])
        server.say(user(TEXTS[0]), session=name)
        forward, calls = server.engine._forward, []

        def fails(*args):
            calls.append(1)
            if len(calls) == 6:
                raise RuntimeError("secret detail")
            return forward(*args)

        with monkeypatch.context() as patch:
            patch.setattr(server.engine, "_forward", fails)
            with pytest.raises(openai.APIError, match="changed nothing") as caught:
                list(server.chat(user("w1"), session=name, stream=stream))
        assert "secret" not in str(caught.value)
        assert server.say(user(TEXTS[1]), session=name) == direct.say(TEXTS[1])

    def test_a_first_request_that_fails_leaves_no_session(self, server, monkeypatch):
        monkeypatch.setattr(server.engine, "_forward", lambda *_: 1 / 0)
        with refused(500, "internal_error"):
            server.chat(user("w1"), session="stillborn")
        with refused(404, "session_not_found"):
            server.get("/sessions/stillborn")
        assert "stillborn" not in server.sessions._entries

    def test_a_disk_that_is_full(self, start, model, monkeypatch):
        direct = Direct(model)
        with start(saved=True) as server:
            server.say(user(TEXTS[0]), session="s")
            direct.say(TEXTS[0])
            with monkeypatch.context() as patch:
                full = OSError(errno.ENOSPC, "No space left on device")
                patch.setattr("ttt_compiler.runtime.atomic.os.fsync", lambda _: (_ for _ in ()).throw(full))
                with refused(500, "internal_error"):
                    server.chat(user("w1"), session="s")
            assert server.say(user(TEXTS[1]), session="s") == direct.say(TEXTS[1])
        with start(saved=True) as server:
            assert server.say(user(TEXTS[2]), session="s") == direct.say(TEXTS[2])

    @pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "ü", "x" * 65, "a\n"])
    def test_names_that_are_none(self, start, tmp_path, name):
        with start(saved=True) as server:
            with refused(400, "invalid_request"):
                server.chat(user("w1"), session=name)
            with refused(400, "invalid_request"):
                server.client.post("/sessions/x/fork", body={"session": name}, cast_to=object)
            raw = httpx.get(f"{server.url}/v1/sessions/..%2F..%2Fsecret")
            assert raw.status_code in (400, 404)
            assert "error" in raw.json()
        assert [p.name for p in (tmp_path / "sessions").iterdir()] == [".lock"]

    def test_a_session_that_is_full(self, server):
        server.say(user("w1 " * 400), session="full")
        server.say(user("w1 " * 70), session="full", mode="append")
        before = server.get("/sessions/full")
        with refused(400, "context_length_exceeded"):
            server.chat(user("w1 " * 30), session="full", mode="append")
        assert server.get("/sessions/full") == before

    def test_no_room_in_memory(self, start, monkeypatch):
        with start(saved=True, limit=1) as server:
            server.slow(monkeypatch)
            running = iter(server.chat(user("w1"), session="busy", tokens=60, stream=True))
            next(running)
            for session in ("other", None):
                with refused(503, "sessions_full") as caught:
                    server.chat(user("w1"), session=session)
                assert "--max-sessions" in caught[0].message
            list(running)
            assert server.say(user("w1"), session="other", tokens=1)
        with start(limit=1) as server:
            server.say(user("w1"), session="kept")
            with refused(503, "sessions_full") as caught:
                server.chat(user("w1"), session="other")
            assert "--sessions DIR" in caught[0].message
            assert server.say(user("w2"), session="kept")
