"""``ttt-compiler serve`` as a process, killed and started again."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest
import torch
from typer.testing import CliRunner

import ttt_compiler as ttt
from tests import models
from tests.serve.loopback import Direct, assistant, make_model, make_tokenizer, user
from tests.serve.test_server import TEXTS
from ttt_compiler.cli import app
from ttt_compiler.serve.launch import ServeOptions, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its adapter on disk."""
    folder = tmp_path_factory.mktemp("served")
    models.tiny().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    ttt.save_adapter(make_model(), folder / "adapter")
    return folder


class Process:
    def __init__(self, folder) -> None:
        options = ["--eager", "--port", "0", "--adapter", folder / "adapter", "--sessions", folder / "kept"]
        options += ["--max-body", "50000"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ttt_compiler", "serve", folder / "tiny", *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        while not (found := re.search(r"running on (http://\S+)", self.log)):
            line = self._process.stderr.readline()
            assert line, self.log
            self.log += line
        self.client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0)

    def chat(self, *messages, **kwargs):
        return self.client.chat.completions.create(
            model="tiny",
            messages=list(messages),
            temperature=0,
            extra_body={"session": "book"},
            **{"max_tokens": 8, **kwargs},
        )

    def end(self, how: int) -> int:
        self._process.send_signal(how)
        self._process.communicate(timeout=30)
        return self._process.returncode


def test_a_killed_server_continues(folder):
    direct = Direct(make_model())
    conversation = [user(TEXTS[0])]
    server = Process(folder)
    assert "adapter" not in server.log, "no warning about a missing one"
    reply = server.chat(*conversation).choices[0].message.content
    assert reply == direct.say(TEXTS[0])
    with pytest.raises(openai.APIStatusError, match="more than 50000 bytes") as caught:
        server.chat(user("w" * 50_000))
    assert caught.value.status_code == 413
    conversation += [assistant(reply), user(TEXTS[1])]
    running = iter(server.chat(*conversation, max_tokens=400, stream=True))
    for _ in range(3):
        next(running)
    server.end(signal.SIGKILL)

    server = Process(folder)
    started = time.monotonic()
    reply = server.chat(*conversation).choices[0].message.content
    assert reply == direct.say(TEXTS[1]), "the request in flight is lost, nothing else"
    server.chat(user("w1"), max_tokens=400, stream=True)
    assert server.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    assert time.monotonic() - started < 60
    assert sorted(os.listdir(folder / "kept" / "book"))[-1] == "session.json"


def test_without_an_adapter_sessions_belong_to_the_same_model_after_a_restart(tmp_path):
    options = ServeOptions("tiny", ttt.TTTConfig(layers="all", chunk_size=4), eager=True)
    said = []
    for seed in (1, 2):
        model = models.tiny()
        torch.manual_seed(seed)
        prepare(model, options, say=said.append)
        if seed == 1:
            ttt.Session(model).save(tmp_path / "s.ttt")
    assert ttt.Session.load(model, tmp_path / "s.ttt").tokens_seen == [0]
    assert "no --adapter" in said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no-such-folder"], "no such folder"),
        (["smollm2", "--max-sessions", "0"], "max_sessions"),
        (["smollm2", "--port", "99999"], "port=99999 must lie between 0"),
        (["smollm2", "--host", "192.0.2.1"], "cannot listen on --host 192.0.2.1"),
        (["smollm2", "--max-body", "0"], "max_body=0"),
        (["smollm2", "--chunk-size", "0"], "chunk_size"),
        (["smollm2", "--chat-template", "no-such.jinja"], "no-such.jinja"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_refused_before_the_model_is_loaded(monkeypatch, host):
    monkeypatch.setattr("ttt_compiler.serve.launch.load_pretrained", lambda _: pytest.fail("loaded"))
    with socket.create_server((host, 0)) as other:
        port = str(other.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "smollm2", "--host", host, "--port", port])
    assert result.exit_code == 2
    assert f"cannot listen on --host {host} --port {port}" in result.stderr


def test_a_model_without_a_chat_template_is_refused_before_it_is_converted(folder, tmp_path):
    models.tiny().save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "--chat-template plain" in result.stderr


def test_missing_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["serve", "smollm2"])
    assert result.exit_code == 2
    assert "pip install 'ttt_compiler[serve]'" in result.stderr
