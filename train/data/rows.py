"""Data rows: their two forms, and the check that turns a file's plain values into one of them.

A new form is a class here with its check, a case of `parse_row`, and its text in `train.data.rendering`.

In this project a row is what a user's file or data set holds. Once tokenized it is an example (`train.data.token_table`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from train.config import RowFormat
from train.errors import BadInput

Values = dict[str, Any]

# JSON can hold "\ud83d" alone, the first half of a UTF-16 surrogate pair. That is not a character, and tokenizers reject it.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
COLUMNS_HELP = "rows need the columns instruction, input (may be missing) and output, or one column messages"


@dataclass(frozen=True)
class AlpacaRow:
    """An instruction, the input that it applies to (may be empty), and the answer to learn."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation ``({"role": …, "content": …}, …)``. The assistant's messages are learned, and the last message is one of them."""

    messages: tuple[dict[str, str], ...]


Row = AlpacaRow | ChatRow


class EmptyAnswer(BadInput):
    """A row whose answer is empty: rejected in the user's own file, dropped and counted in a data set of the hub."""


def parse_row(values: Any, form: RowFormat, where: str) -> Row:
    """Check one row and give it its type; `where` names it in messages.

    Raises:
        BadInput: a column is missing, or a value is not text.
        EmptyAnswer: an answer is empty, so there is nothing to learn.
    """
    if not isinstance(values, dict):
        raise BadInput(f"{where}: a row has to be an object, not {_shown(values)}; {COLUMNS_HELP}.")
    if form == "chat" or (form == "auto" and "messages" in values):
        return _parse_chat(values, where)
    return _parse_alpaca(values, where)


def _parse_alpaca(values: Values, where: str) -> AlpacaRow:
    for column in ("instruction", "output"):
        if column not in values:
            raise BadInput(
                f"{where}: column {column!r} is missing (columns: {', '.join(map(repr, values)) or 'none'}); {COLUMNS_HELP}."
            )
    instruction = _text(values["instruction"], "instruction", where)
    # A missing and a null input are no input; 0 or [] is a mistake.
    input = "" if values.get("input") is None else _text(values["input"], "input", where)
    output = _text(values["output"], "output", where)
    if not instruction.strip():
        raise BadInput(f"{where}: instruction is empty; write one or remove the row.")
    if not output.strip():
        raise EmptyAnswer(f"{where}: output is empty, so there is nothing to learn; write an answer or remove the row.")
    return AlpacaRow(instruction, input, output)


def _parse_chat(values: Values, where: str) -> ChatRow:
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where}: messages has to be a list of {{role, content}}, not {_shown(messages)}.")
    turns = tuple(_parse_message(turn, f"{where}: messages[{i}]") for i, turn in enumerate(messages))
    if turns[0]["role"] == "assistant":
        raise BadInput(f"{where}: the assistant speaks first; begin with a message from the user or the system.")
    if turns[-1]["role"] != "assistant":
        raise BadInput(f"{where}: the last message is from {turns[-1]['role']!r}; it has to be the assistant's answer.")
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        raise EmptyAnswer(f"{where}: an answer of the assistant is empty; write an answer or remove the row.")
    return ChatRow(turns)


def _parse_message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadInput(f"{where} has to be an object with role and content, not {_shown(turn)}.")
    return {key: _text(turn.get(key), key, where) for key in ("role", "content")}


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}: {column} has to be text, not {_shown(value)}; put it in quotes, or remove the row.")
    broken = LONE_SURROGATE.search(value)
    if broken:
        raise BadInput(
            f"{where}: {column} has {broken[0]!r}, half of a character (a lone UTF-16 surrogate); "
            "write the whole character or remove it."
        )
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
