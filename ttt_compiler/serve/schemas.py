"""What comes in as JSON and what goes out: OpenAI's chat completions, and ``session``.

May be changed here: which fields are understood. A field that would change the reply is either honoured or
refused, never ignored.
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ttt_compiler.serve.conversation import Message, Mode
from ttt_compiler.serve.errors import InvalidRequestError
from ttt_compiler.serve.sampling import Sampling
from ttt_compiler.serve.sessions import Finished, Request

MAX_STOPS = 4  # as OpenAI
# Checking a message takes tens of microseconds, in which no other request is answered.
MAX_MESSAGES = 8192

# Fields that do not change the reply.
_INERT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields of OpenAI's that are not understood, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


class _Body(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _only_characters(cls, body: Any) -> Any:
        """JSON can escape half a character, which neither a tokenizer nor an answer can be given."""
        for name, value in body.items() if isinstance(body, dict) else ():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError as e:
                shown = name.encode(errors="replace").decode()
                raise InvalidRequestError(
                    f"{shown}: holds a lone surrogate, half of a character", shown
                ) from e
            except RecursionError as e:
                raise InvalidRequestError(f"{name}: nested too deeply", name) from e
        return body


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message. Other fields may be there when they are empty, as in a reply that is sent back."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="after")
    def _nothing_else(self) -> Self:
        extra = sorted(k for k, v in (self.model_extra or {}).items() if v not in (None, []))
        if extra:
            raise ValueError(f"not understood in a message: {', '.join(extra)}")
        return self

    def to_message(self) -> Message:
        """Text alone. Templates know the role ``developer`` by its older name."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(BaseModel):
    """Of a streamed reply."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Body):
    """Body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    session: str | None = None
    session_mode: Mode = "auto"

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        wrong = []
        for name, value in (self.model_extra or {}).items():
            if name not in _INERT and value is not None and value not in _NEUTRAL.get(name, ()):
                wrong.append(name)
        if wrong:
            wrong.sort()
            raise InvalidRequestError(f"not understood here, so leave out: {', '.join(wrong)}", wrong[0])
        if self.messages[-1].role == "assistant":
            raise InvalidRequestError(
                "messages: the last one is an assistant's, so there is nothing to reply to", "messages"
            )
        if len(self.stops) > MAX_STOPS:
            raise InvalidRequestError(f"stop: at most {MAX_STOPS} strings, not {len(self.stops)}", "stop")
        if any(not s for s in self.stops):
            raise InvalidRequestError("stop: an empty string ends nothing", "stop")
        if self.session is None and self.session_mode != "auto":
            raise InvalidRequestError("session_mode needs a session", "session_mode")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether the last chunk shall count tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def to_request(self) -> Request:
        """What the sessions are asked for."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        sampling = Sampling(limit, self.temperature, self.top_p, self.seed, self.stops)
        messages = tuple(m.to_message() for m in self.messages)
        return Request(messages, self.session, self.session_mode, sampling)


class ForkRequest(_Body):
    """Body of ``POST /v1/sessions/{id}/fork``."""

    model_config = ConfigDict(extra="forbid")
    session: str


class Answer:
    """The JSON of one chat completion, whole or in chunks."""

    def __init__(self, completion_id: str, request: ChatRequest) -> None:
        self._head = {"id": completion_id, "created": int(time.time()), "model": request.model}
        if request.session is not None:
            self._head["session"] = request.session

    def whole(self, finished: Finished) -> dict[str, Any]:
        """Of a request without ``stream``."""
        reply = finished.reply
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "finish_reason": reply.finish_reason,
            "logprobs": None,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(finished),
        }

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of the reply."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage(self, finished: Finished) -> dict[str, Any]:
        """The chunk after the last one, for those who ask for it."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(finished)}


def _usage(finished: Finished) -> dict[str, Any]:
    sampled = finished.reply.sampled
    return {
        "prompt_tokens": finished.prompt,
        "completion_tokens": sampled,
        "total_tokens": finished.prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": finished.cached},
    }
