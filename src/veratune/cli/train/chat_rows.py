"""Rows of ShareGPT and Alpaca files as chats: lists of messages with "role" and "content"."""

from typing import Any

from veratune.cli.train.reading import Row
from veratune.cli.train.settings import TrainSettings
from veratune.cli.values import check_text, is_empty

# ShareGPT's names of the speakers.
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_SHAREGPT, _MESSAGES = "conversations", "messages"


def with_chats(path: str, rows: list[Row], settings: TrainSettings) -> list[Row]:
    """Return the rows of a language model's data, with chats in the text column.

    If there is no such column, "messages", ShareGPT's "conversations", or Alpaca's "instruction", "input" and "output"
    become chats there. ShareGPT's messages have "from" and "value" instead of "role" and "content".

    Args:
        path: the rows' file, for messages.
        rows: the rows.
        settings: the settings.

    Raises:
        ValueError: a message is from somebody unknown, or an Alpaca row has no text where it needs one.
    """
    column, first = settings.text_column, rows[0]
    if settings.task != "causal-lm":
        return rows
    found = column
    if column not in first and column == TrainSettings.text_column:
        found = next((name for name in (_MESSAGES, _SHAREGPT) if name in first), column)
        if found == column and {"instruction", "output"} <= first.keys():
            return [{**row, column: _alpaca(f"{path}: row {i}", row)} for i, row in enumerate(rows, start=1)]
    return [
        {**row, column: _sharegpt(f"{path}: row {i}", row, found)}
        if _is_sharegpt(row.get(found)) or found != column
        else row
        for i, row in enumerate(rows, start=1)
    ]


def _is_sharegpt(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and {"from", "value"} <= x.keys() for x in value)
    )


def _sharegpt(where: str, row: Row, column: str) -> Any:
    """Return ShareGPT's messages with our keys; anything else as it is."""
    messages: Any = row.get(column)
    if not _is_sharegpt(messages):
        return messages
    converted = []
    for number, message in enumerate(messages, start=1):
        role = _ROLES.get(message["from"]) if isinstance(message["from"], str) else None
        if role is None:
            raise ValueError(
                f"{where}, message {number} is from {message['from']!r}, whose role is unknown: use one of"
                f" {', '.join(_ROLES)}, or messages with 'role' and 'content'"
            )
        converted.append({"role": role, "content": message["value"]})
    if isinstance(row.get("system"), str) and row["system"].strip() and converted[0]["role"] != "system":
        converted.insert(0, {"role": "system", "content": row["system"]})
    return converted


def _alpaca(where: str, row: Row) -> list[Row]:
    """Return an instruction, with its input after it, and the answer."""
    for name in ("instruction", "output"):
        check_text(f"{where}: {name!r}", row.get(name))
    messages = []
    if not is_empty(row.get("system")):
        messages.append({"role": "system", "content": row["system"]})
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{where}: 'history' is not a list of pairs of a question and its answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = row["instruction"]
    if not is_empty(row.get("input")):
        check_text(f"{where}: 'input'", row["input"])
        question = f"{question}\n\n{row['input']}"
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
