"""Writes chats as text. OPT has no role tokens, so each message is a line that starts with the name of its role:

    </s>System: You are brief.
    User: What is a synset?
    Assistant: A set of synonyms.</s>User: And a gloss?
    Assistant: Its definition.</s>

An answer starts with the space after the colon and ends with `</s>`, where generation stops. All text before an answer
is its prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from opt_parallel.data.text.records import require_good

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}

# A Jinja template for `apply_chat_template` of transformers, which renders a chat as the same text as this module.
TEMPLATE = """\
{{ END }}{% for message in messages %}\
{% if message.role == 'assistant' %}{{ 'Assistant: ' + message.content + END }}\
{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\\n' }}\
{% elif message.role == 'system' %}{{ 'System: ' + message.content + '\\n' }}\
{% else %}{{ raise_exception('roles are system, user and assistant') }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}
"""


def chat_template(tokenizer: Tokenizer, end: int) -> str:
    """The Jinja chat template for a tokenizer whose end-of-text token has the id `end`."""
    return TEMPLATE.replace("END", json.dumps(tokenizer.id_to_token(end)))


def turns_of(messages: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], int]:
    """A pair (prompt, answer) for each answer of the assistant, and the number of messages after the last answer.

    `messages` are pairs (role, content). An answer starts with the white space after the colon, because a byte-level
    tokenizer splits text before white space."""
    turns, before, waiting = [], "", 0
    for role, content in messages:
        if role == "assistant":
            turns.append((f"{before}{ROLES[role]}:", f" {content}"))
            before, waiting = "", 0
        else:
            before, waiting = f"{before}{ROLES[role]}: {content}\n", waiting + 1
    return turns, waiting


def read_messages(value: Any, where: str) -> list[tuple[str, Any]]:
    """The role and the content of each message. Raises: BadRecord, with an error message that starts with `where`."""
    require_good(isinstance(value, list) and bool(value), f"{where} is {value!r:.40}: it must be a list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        require_good(
            isinstance(message, dict) and {"role", "content"} <= set(message),
            f'{where}: message {number} is {message!r:.60}: it must be an object such as {{"role": "user", '
            '"content": "…"}',
        )
        role = message["role"]
        require_good(
            isinstance(role, str) and role in ROLES,
            f"{where}: message {number} has the role {role!r:.40}: the roles are {', '.join(ROLES)}",
        )
        messages.append((role, message["content"]))
    require_good(
        any(role == "assistant" for role, _ in messages),
        f"{where} has no message of the assistant, so there is nothing to learn: add one, or leave the record out",
    )
    return messages
