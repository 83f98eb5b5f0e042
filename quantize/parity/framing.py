"""How a text is put to a chat model: through the tokenizer's chat template, as a turn of a conversation."""

from __future__ import annotations

from typing import Any

GREETING = "Hello!"
REQUEST = "Please continue with a text of your choice."
"""The message that windows of a corpus answer."""


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template that takes a user's message."""
    if not tokenizer.chat_template:
        return False
    try:
        return bool(turn(tokenizer, GREETING))
    except Exception:  # noqa: BLE001 - a template is foreign code, which may want another conversation or fail
        return False


def prompt(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """The ids of a text to be continued: as it is, or as a `chat`'s question."""
    return turn(tokenizer, text) if chat else list(tokenizer(text).input_ids)


def turn(tokenizer: Any, message: str) -> list[int]:
    """The ids of a user's message, and of what stands before an answer."""
    conversation = [{"role": "user", "content": message}]
    encoded = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
    return [int(token) for token in encoded["input_ids"]]
