"""A server on a free port of this machine, a tiny model, and what it should say."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import openai
import torch
import uvicorn
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import ttt_compiler as ttt
from tests import models
from ttt_compiler.serve.app import build_app
from ttt_compiler.serve.conversation import ChatTemplate
from ttt_compiler.serve.engine import Engine
from ttt_compiler.serve.sessions import Sessions
from ttt_compiler.serve.store import Store

SPECIAL = ["<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = SPECIAL + [f"w{i}" for i in range(models.VOCAB - len(SPECIAL))]
END, USER, ASSISTANT = (WORDS.index(f"<|{name}|>") for name in ("end", "user", "assistant"))
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model():
    model = models.converted()
    model.compile(backend="inplace_ttt_eager")
    return model


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ids(text: str) -> list[int]:
    return [WORDS.index(w) for w in text.split()]


def words(tokens: list[int]) -> str:
    """What a reply shows of its tokens."""
    return " ".join(WORDS[i] for i in tokens if i >= len(SPECIAL))


def turn(text: str) -> list[int]:
    """Tokens of a user's message and of where the reply starts."""
    return [USER, *ids(text), END, ASSISTANT]


class Direct:
    """One uninterrupted session, by ``generate``: what the server has to say."""

    def __init__(self, model) -> None:
        self.model, self.session, self.ids = model, ttt.Session(model), []

    def say(self, text: str, tokens: int = 8) -> str:
        self.ids += [END] * bool(self.ids) + turn(text)
        prompt = torch.tensor([self.ids])
        out = self.model.generate(
            prompt,
            # Without it, sampled tokens that are equal to the padding token would be masked.
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.session.cache,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )
        new = [i for i in out[0, len(self.ids) :].tolist() if i != END]
        self.ids += new
        return words(new)


class Server:
    """The application in a thread."""

    def __init__(self, model, tokenizer, folder=None, limit=8, block=512, grace=5, **options) -> None:
        self.engine = Engine(model, tokenizer, block=block)
        store = None if folder is None else Store(folder, model)
        self.sessions = None

        def make() -> Sessions:
            self.sessions = Sessions(self.engine, ChatTemplate(tokenizer), store, limit)
            return self.sessions

        config = uvicorn.Config(
            build_app("tiny", make, **options),
            log_level="error",
            timeout_graceful_shutdown=grace,
            lifespan="on",
        )
        self._server = uvicorn.Server(config)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Server:
        self._thread.start()
        until(lambda: self._server.started)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        return self

    def __exit__(self, *_) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def chat(self, *messages, session=None, mode=None, tokens=8, **more):
        fields = {"session": session, "session_mode": mode}
        sampling = {"temperature": 0, **more}
        return self.client.chat.completions.create(
            model="tiny",
            messages=list(messages),
            max_tokens=tokens,
            extra_body={k: v for k, v in fields.items() if v is not None},
            **sampling,
        )

    def say(self, *args, **kwargs) -> str:
        return self.chat(*args, **kwargs).choices[0].message.content

    def get(self, path: str):
        return self.client.get(path, cast_to=object)

    def slow(self, monkeypatch, seconds: float = 0.03) -> list[float]:
        """Every call of the model takes longer; gives the times at which one began."""
        calls, forward = [], self.engine._forward

        def slowly(*args):
            calls.append(time.monotonic())
            time.sleep(seconds)
            return forward(*args)

        monkeypatch.setattr(self.engine, "_forward", slowly)
        return calls


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def refused(status: int, code: str):
    """The openai client raises for this status, with an error in OpenAI's format that explains itself."""
    caught: list[openai.APIStatusError] = []
    try:
        yield caught
    except openai.APIStatusError as e:
        caught.append(e)
    assert caught, "not refused"
    assert (caught[0].status_code, caught[0].code) == (status, code), caught[0].message
    assert "Traceback" not in caught[0].response.text
