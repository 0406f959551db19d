"""Tokens in, tokens out, on a session.

A decode loop of our own rather than ``generate``: one item per call of the model, so that requests take
turns call by call, and a random generator per request, so that a request gives the same tokens whatever
runs beside it. May be changed here: when a reply ends. How a token is chosen belongs to ``sampling.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttt_compiler.errors import UnsupportedModelError
from ttt_compiler.runtime.session import Session
from ttt_compiler.serve.errors import ContextLengthError
from ttt_compiler.serve.sampling import Chooser, Sampling
from ttt_compiler.serve.text import TextStream

# Tokens of a prompt per call of the model: other requests wait no longer than for one such call.
BLOCK = 512
# Replies of requests that do not say how long they may be.
MAX_TOKENS = 1024

# Characters that a token may stand for at least: some tokenizers take an unknown word for one token.
LONGEST = 32

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Reply:
    """What was generated.

    Attributes:
        ids: tokens that belong to the conversation; the last one is not in the session's memory if it is
            one token ahead of it.
        text: without stop string and special tokens.
        finish_reason: ``stop`` at an end-of-turn token or stop string, ``length`` at ``max_tokens``.
        sampled: number of tokens sampled, an end-of-turn token included.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    sampled: int


class Engine:
    """A converted and compiled model with its tokenizer.

    Only one thread may run :meth:`steps` of one engine (see ``worker.py``): a converted model holds the
    state of the call that is on its way, and what Dynamo compiles is kept per thread at places.

    Attributes:
        context: tokens a conversation may have; None without a limit.

    Raises:
        UnsupportedModelError: the model has no key/value cache, or a generation config that is not honoured.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, block: int = BLOCK) -> None:
        self.model, self.tokenizer, self.block = model, tokenizer, block
        if self.new_session().cache is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no key/value cache, so no conversation can be kept. Serve a "
                "causal language model of transformers"
            )
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {e for e in (*ends, tokenizer.eos_token_id) if e is not None}
        # Characters of a token, which stand for a byte or more each; more than any sensible text has.
        self._longest = max(LONGEST, *map(len, tokenizer.get_vocab()))
        self._chooser = Chooser(model, self._ends)

    def new_session(self) -> Session:
        """A session that has read nothing."""
        return Session(self.model)

    def warm_up(self) -> None:
        """Make every kind of call once, so that no client waits for the compiler.

        Keys and values are laid out in one way by the first call on a session and in another by later
        ones, so each kind of later call is made on both. The lengths are unlike the model's sizes, such as
        its number of heads: the compiler takes equal sizes for the same size.
        """
        for lengths in ((37, 41, 1, 43), (47, 1)):
            session = self.new_session()
            for length in lengths:
                self._forward(session, [0] * length)

    def max_tokens(self, prompt: int, sampling: Sampling) -> int:
        """How many tokens a reply to a conversation of ``prompt`` tokens may have.

        Raises:
            ContextLengthError: the context has no room for them.
        """
        wanted = sampling.max_tokens
        if self.context is None:
            return MAX_TOKENS if wanted is None else wanted
        room = self.context - prompt
        if room < (1 if wanted is None else wanted):
            reply = "a reply" if wanted is None else f"a reply of {wanted} tokens (max_tokens)"
            raise ContextLengthError(
                f"the conversation has {prompt} tokens and the model's context {self.context}, which leaves "
                f"no room for {reply}. Send less, ask for fewer max_tokens, or start another session"
            )
        return min(room, MAX_TOKENS) if wanted is None else wanted

    def check_size(self, read: int, texts: Sequence[str]) -> None:
        """Refuse new messages that cannot fit behind ``read`` tokens, before time is spent on their tokens.

        Raises:
            ContextLengthError: they cannot.
        """
        if self.context is None:
            return
        room = max(0, self.context - read)
        length = sum(len(text.strip()) for text in texts)
        if len(texts) > room or length > room * self._longest:
            raise ContextLengthError(
                f"{len(texts)} new messages of {length} characters cannot fit into the model's context "
                f"{self.context}, of which {room} tokens are left. Send less, or start another session"
            )

    def steps(
        self,
        session: Session,
        ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        read: Sequence[int] = (),
    ) -> Iterator[str | Reply]:
        """Read ``ids`` and reply; one item per call of the model.

        Args:
            session: to go on with.
            ids: what it has not read.
            sampling: how to reply.
            max_tokens: see :meth:`max_tokens`.
            read: what it has read, for penalties.

        Yields:
            Text to show, often empty, and last of all the :class:`Reply`.
        """
        choose = self._chooser.start(sampling, len(read) + len(ids), max_tokens)
        stream = TextStream(self.tokenizer, sampling.stop)
        for start in range(0, len(ids), self.block):
            if start:
                yield ""
            logits = self._forward(session, ids[start : start + self.block])
        out: list[int] = []
        reason: FinishReason = "stop"
        before = torch.tensor([[*read, *ids]], device=logits.device)
        while (token := choose(logits, before)) not in self._ends:
            out.append(token)
            before = torch.cat([before, before.new_tensor([[token]])], -1)
            yield stream.push(token)
            if stream.stopped or len(out) == max_tokens:
                # The token stays ahead of the session's memory: the next request reads it.
                reason = "stop" if stream.stopped else "length"
                break
            logits = self._forward(session, out[-1:])
        # An end-of-turn token is sampled without being counted among the reply's.
        sampled = len(out) + (token in self._ends)
        yield stream.finish()
        yield Reply(tuple(out), stream.text, "stop" if stream.stopped else reason, sampled)

    def _forward(self, session: Session, ids: Sequence[int]) -> Tensor:
        """Logits ``[1, vocabulary]`` after the last of ``ids``."""
        tokens = torch.tensor([list(ids)], device=getattr(self.model, "device", None))
        out = self.model(input_ids=tokens, past_key_values=session.cache, use_cache=True)
        logits: Tensor = out.logits[:, -1].float()
        if bool(logits.isnan().any()):
            raise FloatingPointError("the model's logits hold NaN")
        return logits
