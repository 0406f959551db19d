"""What of a request is new to a session, and how new messages become tokens."""

from __future__ import annotations

import pytest

from tests.serve.loopback import TEMPLATE, WORDS, make_tokenizer
from ttt_compiler.errors import ConfigError
from ttt_compiler.serve.conversation import PLAIN, ChatTemplate, Message, new_messages
from ttt_compiler.serve.errors import ConversationConflictError, InvalidRequestError


def messages(text: str) -> list[Message]:
    """``"s: a, u: b"``."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    parts = [part.strip().split(": ") for part in text.split(",") if part.strip()]
    return [Message(roles[role], content) for role, content in parts]


READ = "s: w1, u: w2, a: w3"


@pytest.mark.parametrize(
    ("sent", "mode", "new"),
    [
        (f"{READ}, u: w4", "auto", "u: w4"),
        (f"{READ}, u: w4", "continue", "u: w4"),
        (f"{READ}, u: w4", "append", f"{READ}, u: w4"),
        (f"{READ}, a: w5, u: w4", "auto", "a: w5, u: w4"),
        ("u: w4", "auto", "u: w4"),
        ("u: w4", "append", "u: w4"),
        ("u: w4", "continue", None),
        ("s: w9, u: w4", "auto", "s: w9, u: w4"),
        ("s: w1, u: w4", "auto", None),
        ("s: w1, u: w4", "append", "s: w1, u: w4"),
        ("u: w2", "auto", "u: w2"),
        (READ, "auto", None),
        ("s: w1, u: w2", "auto", None),
        ("s: w1, u: w2, a: w9, u: w4", "auto", None),
        ("s: w9, u: w2, a: w3, u: w4", "auto", None),
        ("u: w8, a: w9, u: w4", "auto", None),
        ("u: w8, a: w9, u: w4", "append", "u: w8, a: w9, u: w4"),
    ],
)
def test_what_is_new(sent, mode, new):
    if new is None:
        with pytest.raises(ConversationConflictError, match="has read 3 messages"):
            new_messages(messages(READ), messages(sent), mode)
    else:
        assert new_messages(messages(READ), messages(sent), mode) == messages(new)


@pytest.mark.parametrize("mode", ["auto", "continue", "append"])
def test_to_a_new_session_everything_is_new(mode):
    assert new_messages([], messages(READ), mode) == messages(READ)


def test_surrounding_whitespace_is_no_difference():
    sent = [Message(m.role, f" {m.content}\n") for m in messages(READ)]
    assert new_messages(messages(READ), [*sent, *messages("u: w4")], "continue") == messages("u: w4")


def shown(template: str | None, new: str, read: str = READ) -> str:
    chat = ChatTemplate(make_tokenizer(), template)
    return " ".join(WORDS[i] for i in chat.following(messages(read), messages(new)))


def test_what_follows_begins_with_the_end_of_the_last_turn():
    assert shown(None, "u: w4") == "<|end|> <|user|> w4 <|end|> <|assistant|>"
    first = ChatTemplate(make_tokenizer()).first(messages("u: w4"))
    assert [WORDS[i] for i in first] == ["<|user|>", "w4", "<|end|>", "<|assistant|>"]


def test_a_template_that_renders_earlier_turns_differently_later():
    """As those do that drop the thoughts of earlier replies, or mark the last one."""
    template = TEMPLATE.replace(
        "<|{{ m.role }}|>",
        "<|{{ m.role }}|>{% if loop.last %} w60 {% elif m.role == 'assistant' %} w61 {% endif %}",
    )
    assert shown(template, "u: w4") == "<|end|> <|user|> w60 w4 <|end|> <|assistant|>"


def test_a_template_that_trims():
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
    assert shown(template, "u:  w4 ") == "<|end|> <|user|> w4 <|end|> <|assistant|>"


def test_templates_that_cannot_continue():
    hoists = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}" + TEMPLATE.replace(
        "in messages %}", "in messages if m.role != 'system' %}"
    )
    with pytest.raises(InvalidRequestError, match="does not show a system message"):
        shown(hoists, "s: w9, u: w4")
    forgets = TEMPLATE.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")
    with pytest.raises(InvalidRequestError, match="0 times"):
        shown(forgets, "u: w4")
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        shown(refuses, "u: w4")


def test_a_model_without_a_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="--chat-template plain"):
        ChatTemplate(tokenizer)
    chat = ChatTemplate(tokenizer, PLAIN)
    text = chat._render(messages(f"{READ}, u: w4"))
    assert text == "system: w1\nuser: w2\nassistant: w3\nuser: w4\nassistant:"
    assert len(chat.following(messages(READ), messages("u: w4"))) == 3
