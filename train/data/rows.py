"""Rows of instructions: their two forms, and the check that gives plain values one of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from train.errors import BadInput

Format = Literal["auto", "alpaca", "chat"]
Values = dict[str, Any]

# JSON can say "\ud83d" alone, the first half of a UTF-16 pair, which is no text: no tokenizer takes it.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
COLUMNS_HELP = "rows need the columns instruction, input (may be missing) and output, or one column messages"


@dataclass(frozen=True)
class AlpacaRow:
    """An instruction, what it is applied to (may be empty) and the answer to learn."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation ``({"role": …, "content": …}, …)``; what the assistant says is learnt, and it has the last word."""

    messages: tuple[dict[str, str], ...]


Row = AlpacaRow | ChatRow


class EmptyAnswer(BadInput):
    """A row whose answer is empty: refused in the user's own file, dropped and counted in a hub's data set."""


def parse_row(values: Any, form: Format, where: str) -> Row:
    """Check one row and give it its type; `where` names it in messages.

    Raises:
        BadInput: it lacks a column, or a value is no text.
        EmptyAnswer: there is nothing to learn in it.
    """
    if not isinstance(values, dict):
        raise BadInput(f"{where}: a row has to be an object, not {_shown(values)}; {COLUMNS_HELP}.")
    if form == "chat" or (form == "auto" and "messages" in values):
        return _parse_chat(values, where)
    return _parse_alpaca(values, where)


def _parse_alpaca(values: Values, where: str) -> AlpacaRow:
    for column in ("instruction", "output"):
        if column not in values:
            raise BadInput(f"{where}: column {column!r} is missing, there are {_columns(values)}; {COLUMNS_HELP}.")
    instruction = _text(values["instruction"], "instruction", where)
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
    turns = tuple(_parse_turn(turn, f"{where}: messages[{i}]") for i, turn in enumerate(messages))
    if turns[0]["role"] == "assistant":
        raise BadInput(f"{where}: the assistant speaks first; begin with a message of the user or the system.")
    if turns[-1]["role"] != "assistant":
        raise BadInput(f"{where}: the last message is of {turns[-1]['role']!r}; it has to be the assistant's answer.")
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        raise EmptyAnswer(f"{where}: an answer of the assistant is empty; write it or remove the row.")
    return ChatRow(turns)


def _parse_turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadInput(f"{where} has to be an object with role and content, not {_shown(turn)}.")
    return {key: _text(turn.get(key), key, where) for key in ("role", "content")}


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where}: {column} has to be text, not {_shown(value)}.")
    broken = HALF_CHARACTER.search(value)
    if broken:
        raise BadInput(
            f"{where}: {column} has {broken[0]!r}, half of a character that is written in two; write it whole or remove it."
        )
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _columns(values: Values) -> str:
    return ", ".join(map(repr, values)) or "none"
