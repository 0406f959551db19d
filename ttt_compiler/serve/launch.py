"""From a model's name to a running server.

May be changed here: the order of the steps, and what is checked before a model is loaded for nothing.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ttt_compiler.adapter import load_adapter
from ttt_compiler.config import TTTConfig
from ttt_compiler.conversion import convert
from ttt_compiler.errors import ConfigError, TTTError
from ttt_compiler.pretrained import load_pretrained
from ttt_compiler.serve.app import build_app
from ttt_compiler.serve.body_limit import MAX_BODY
from ttt_compiler.serve.conversation import PLAIN, ChatTemplate
from ttt_compiler.serve.engine import Engine
from ttt_compiler.serve.sessions import Sessions
from ttt_compiler.serve.store import Store

# Seconds that replies have to end when the server is told to stop; then they are cancelled.
GRACE = 10


@dataclass(frozen=True)
class ServeOptions:
    """What is served, and how.

    Attributes:
        model: see :func:`load_pretrained`.
        config: how it is converted; an adapter brings its own.
        adapter: folder of a trained adapter.
        chat_template: a Jinja file, or ``plain``; None for the tokenizer's own.
        sessions: folder of named sessions; None keeps them in memory.
        max_sessions: in memory at a time.
        max_body: bytes of a request at most.
        host: address to listen on, bound before the model is loaded.
        port: 0 for any free one.
        eager: run op by op, without compiling.
    """

    model: str
    config: TTTConfig
    adapter: Path | None = None
    chat_template: str | None = None
    sessions: Path | None = None
    max_sessions: int = 16
    max_body: int = MAX_BODY
    host: str = "127.0.0.1"
    port: int = 8000
    eager: bool = False

    def __post_init__(self) -> None:
        if self.max_sessions < 1:
            raise ConfigError(f"max_sessions={self.max_sessions} must be at least 1")
        if self.max_body < 1:
            raise ConfigError(f"max_body={self.max_body} must be at least 1")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} must lie between 0, for any free one, and 65535")


def serve(options: ServeOptions, *, say: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Raises:
        TTTError: with what to change.
    """
    import uvicorn

    template = read_template(options.chat_template)
    with _bound(options.host, options.port) as listener:
        say("loading the model")
        model, tokenizer = load_pretrained(options.model)
        chat = ChatTemplate(tokenizer, template)
        store = None if options.sessions is None else Store(options.sessions, model)
        prepare(model, options, say=say)
        engine = Engine(model, tokenizer)
        say(
            "warming up"
            if options.eager
            else "compiling five kinds of calls: takes minutes, less when it was done before"
        )
        engine.warm_up()
        name = model_name(options.model)
        app = build_app(
            name,
            lambda: Sessions(engine, chat, store, options.max_sessions),
            max_body=options.max_body,
        )
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
        # Not before: who connects while the model is loaded shall be refused, not kept waiting.
        with _in_words(options.host, options.port):
            listener.listen(config.backlog)
        say(f'serving "{name}", running on {_url(listener)} (stop with Ctrl-C)')
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket of this address, which is taken before the model is loaded for nothing.

    Raises:
        TTTError: it cannot be had.
    """
    with _in_words(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    with listener:
        with _in_words(host, port):
            if sys.platform != "win32":  # There it would let two servers share a port.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        yield listener


@contextlib.contextmanager
def _in_words(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as e:
        why = getattr(e, "strerror", None) or e
        raise TTTError(
            f"cannot listen on --host {host} --port {port} ({why}). Pass an address of this machine and a "
            "port that nobody uses, or --port 0 for any free one"
        ) from e


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def prepare(model: nn.Module, options: ServeOptions, *, say: Callable[[str], None]) -> None:
    """Convert, load the adapter, compile."""
    if options.adapter is None:
        say("no --adapter: fast weights change nothing until they are trained; sessions keep keys and values")
        # What conversion draws for the untrained P is part of the model that saved sessions belong to.
        torch.manual_seed(0)
        convert(model, options.config)
    else:
        load_adapter(model, options.adapter)
    # Conversations have all lengths: no code for a single one is worth its compilation.
    model.compile(backend="inplace_ttt_eager" if options.eager else "inplace_ttt", dynamic=True)


def read_template(chosen: str | None) -> str | None:
    """Jinja text of ``--chat-template``.

    Raises:
        TTTError: the file cannot be read.
    """
    if chosen is None or chosen == "plain":
        return None if chosen is None else PLAIN
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TTTError(
            f'--chat-template {chosen}: cannot be read ({e}). Pass a Jinja file, or "plain"'
        ) from e


def model_name(model: str) -> str:
    """What requests call the model: where it lies on this machine is nobody's business."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model
