"""What a session has read, and what of a request is new to it.

A session is append-only: what was read stays read, token by token. It keeps the messages it has read and
given (:class:`Conversation`), so the rule is about messages, never about how a chat template renders them
a second time. May be changed here: the rule (:func:`new_messages`, written out in ``docs/serving.md``), and
how new messages become tokens (:class:`ChatTemplate`).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ttt_compiler.errors import ConfigError
from ttt_compiler.serve.errors import ConversationConflictError, InvalidRequestError

Mode = Literal["auto", "continue", "append"]
# Of messages that a session can have read.
ROLES = ("system", "user", "assistant")

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Message:
    """Who says what."""

    role: str
    content: str

    def same(self, other: Message) -> bool:
        """Whether both say the same; surrounding whitespace is what clients and templates trim."""
        return self.role == other.role and self.content.strip() == other.content.strip()


@dataclass(frozen=True)
class Conversation:
    """What a session has read and given.

    Attributes:
        messages: in order; empty, or the last one is the model's reply.
        ids: its tokens. All are in the session's memory but for the last one when that is a sampled token,
            which is read with the next request. The token by which the model ended a reply is never among
            them: the template's own end of turn is, read with the next request.
    """

    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()


def new_messages(read: Sequence[Message], sent: Sequence[Message], mode: Mode) -> list[Message]:
    """The messages of a request that a session has not read.

    Args:
        read: the session's messages.
        sent: the request's.
        mode: ``continue``: ``sent`` is the whole conversation, so it begins with all of ``read``.
            ``append``: all of ``sent`` is new. ``auto``: ``continue`` if ``sent`` begins with all of
            ``read``; else ``append`` if it can only be new messages, that is: it starts with another
            message than the session did and holds no reply of an assistant.

    Raises:
        ConversationConflictError: neither, so the client believes in another conversation.
    """
    if mode == "append" or not read:
        return list(sent)
    pairs = list(zip(read, sent, strict=False))
    differs = next((i for i, (a, b) in enumerate(pairs) if not a.same(b)), len(pairs))
    if differs == len(read) < len(sent):
        return list(sent[len(read) :])
    if mode == "auto" and differs == 0 and all(m.role != "assistant" for m in sent):
        return list(sent)
    if differs < len(pairs):
        what = f"message {differs} ({sent[differs].role}) is not the {read[differs].role} message it has read"
    else:
        what = f"the request ends with message {len(sent) - 1}, which it has read already"
    raise ConversationConflictError(
        f"the session has read {len(read)} messages, and {what}. A session cannot take back what it has "
        "read. Send all of its messages (GET /v1/sessions/ID shows them) and then new ones, or new ones "
        'alone with "session_mode": "append", or another session, such as a fork'
    )


class ChatTemplate:
    """Messages to tokens.

    Args:
        tokenizer: of transformers.
        template: Jinja text instead of the tokenizer's own.

    Raises:
        ConfigError: neither has a template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the model's tokenizer has no chat template. Pass --chat-template FILE (Jinja), or "
                '--chat-template plain for lines such as "user: ..." (then send "stop": ["\\nuser:"])'
            )
        self._tokenizer, self._template = tokenizer, template

    def first(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation that begins, up to where the reply starts."""
        return self._tokens(self._render(messages))

    def following(self, read: Sequence[Message], new: Sequence[Message]) -> list[int]:
        """Tokens between the last reply that was read and where the next one starts.

        That is all that the rendered conversation shows behind the last reply: the end of its turn and the
        new messages. What the template does to earlier turns the second time (such as dropping their
        thoughts) does not matter: they were read as they were.

        Raises:
            InvalidRequestError: the template does not show them there.
        """
        # Rendered in place of the reply: its text could occur elsewhere, or be trimmed.
        marker = f"reply{uuid.uuid4().hex}"
        text = self._render([*read[:-1], Message("assistant", marker), *new])
        _, *behind = text.split(marker)
        if len(behind) != 1:
            raise InvalidRequestError(
                f"the chat template shows an assistant's message {len(behind)} times, so a session cannot "
                "be continued with it. Start the server with another --chat-template"
            )
        at = 0
        for message in new:
            if message.role == "assistant":
                continue
            at = behind[0].find(message.content.strip(), at)
            if at < 0:
                raise InvalidRequestError(
                    f"the chat template does not show a {message.role} message behind an earlier reply, so "
                    "the session could not read it. Send it first, in a new session",
                    "messages",
                )
        return self._tokens(behind[0])

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [asdict(m) for m in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, TypeError, ValueError) as e:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {e}", "messages"
            ) from e
        return text

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
