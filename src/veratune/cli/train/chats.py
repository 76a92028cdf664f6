"""Tokenize chats, with labels for the assistant's messages."""

from typing import Any

# The label that transformers' losses ignore.
IGNORED = -100

Message = dict[str, Any]


def chat_tokens(tokenizer: Any, messages: list[Message], *, every: bool) -> tuple[list[int], list[int]]:
    """Return a chat's tokens by the tokenizer's template, and the labels: the tokens to learn, with the others ignored.

    An assistant's message consists of the text that the template adds to the preceding chat with a generation prompt.
    The template writes the special tokens itself.

    Args:
        tokenizer: the model's, with a chat template.
        messages: dictionaries with "role" and "content".
        every: learn all tokens, not only the assistant's.

    Raises:
        ValueError: there is no template, it refuses the chat, or it writes the beginning of a chat differently once
            an answer follows.
    """
    text = chat_text(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=not every)
    ids = list(encoded["input_ids"])
    if every:
        return ids, ids
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat_text(tokenizer, messages[:i], add_generation_prompt=True)
        through = chat_text(tokenizer, messages[: i + 1])
        if not through.startswith(before) or not text.startswith(through):
            raise ValueError(
                "the model's chat template writes the beginning of a chat differently once an answer follows, so that"
                " the assistant's part cannot be found: --chat-loss all learns everything"
            )
        for index, (start, end) in enumerate(encoded["offset_mapping"]):
            if len(before) <= start < end <= len(through):
                labels[index] = ids[index]
    return ids, labels


def check_chats(tokenizer: Any, *, every: bool) -> None:
    """Raise ValueError for a tokenizer that cannot convert chats to tokens and labels."""
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template: use plain text instead of lists of messages")
    if not every and not tokenizer.is_fast:
        raise ValueError("the model has no fast tokenizer to find the assistant's part with: use --chat-loss all")


def chat_text(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    """Return a chat as text, by the tokenizer's template.

    Raises:
        ValueError: the template refuses the chat.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the model's chat template refuses this chat: {error}") from None
    return text
