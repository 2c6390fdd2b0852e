"""Turns a row into the text that the model reads, and marks which parts of it are answers.

With a chat template every row is a conversation, and the template writes it. Without one Stanford Alpaca's prompt is used,
and the end-of-text token closes the answer. A ChatML template makes of the instruction "Add. 1 2" with the answer "3"

    <|im_start|>user⏎Add. 1 2<|im_end|>⏎<|im_start|>assistant⏎3<|im_end|>

The answer's span is "3<|im_end|>": from the end of what asks for it to the end of the mark that closes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from train.data.rows import AlpacaRow, ChatRow, Row
from train.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: what is tokenized.
        answers: (start, end) in characters of each answer, with the mark that closes it.
        closed: whether the text already holds the mark that closes the last answer; otherwise the end-of-text token has to follow.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    closed: bool


def render(row: Row, tokenizer: PreTrainedTokenizerBase, mark_answers: bool = True) -> Rendered:
    """`row` as text. Without `mark_answers` its `answers` are empty; then any chat template works.

    Raises:
        BadInput: the tokenizer's chat template rejects the row, or marks no separate answer in it, or a conversation has no template.
    """
    if tokenizer.chat_template:
        return _render_chat(as_messages(row), tokenizer, mark_answers)
    if isinstance(row, ChatRow):
        raise BadInput(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, so rows with messages cannot be rendered for it; "
            "choose an instruction-tuned model, or rows with instruction, input and output."
        )
    prompt = alpaca_prompt(row.instruction, row.input)
    return Rendered(prompt + row.output, ((len(prompt), len(prompt + row.output)),), closed=False)


def as_messages(row: Row) -> Messages:
    """`row` as a conversation."""
    if isinstance(row, AlpacaRow):
        question = {"role": "user", "content": user_content(row.instruction, row.input)}
        return [question, {"role": "assistant", "content": row.output}]
    return list(row.messages)


def _render_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, mark_answers: bool) -> Rendered:
    """A conversation as the chat template writes it."""
    # A template often ends with a line break, after the mark that closes the answer. Generation stops at the mark.
    text = _apply_template(messages, tokenizer).rstrip()
    turns = [i for i, message in enumerate(messages) if mark_answers and message["role"] == "assistant"]
    answers = tuple(_answer_span(messages, i, text, tokenizer) for i in turns)
    # Text that ends with the bare answer has no mark after it. Templates may strip what they write, hence the strip.
    return Rendered(text, answers, closed=not text.endswith(messages[-1]["content"].strip()))


def _answer_span(messages: Messages, turn: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Start and end of the assistant's message `turn` in `text`, in characters.

    A template does not report what it wrote where, so the conversation is rendered twice more, each time cut off. In the module's
    example, up to the question and with the generation prompt it ends after "assistant⏎": there the answer starts. Up to and
    including the answer it ends after "3<|im_end|>": there the answer ends.
    """
    before = _apply_template(messages[:turn], tokenizer, add_generation_prompt=True)
    through = _apply_template(messages[: turn + 1], tokenizer).rstrip()
    # That only works if the shorter texts are beginnings of the whole. Templates that drop the reasoning of earlier answers break it.
    if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
        raise BadInput(
            f"the chat template of {tokenizer.name_or_path} writes the beginning of a conversation differently when more messages "
            f"follow, so the answer {messages[turn]['content'][:40]!r} cannot be separated from its prompt; use "
            "data.response_only=false, conversations with a single answer, or another tokenizer."
        )
    return len(before), len(through)


def _apply_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as exc:
        roles = ", ".join(message["role"] for message in messages)
        raise BadInput(
            f"the chat template of {tokenizer.name_or_path} rejects a conversation of {roles} ({exc}) that ends with "
            f"{messages[-1]['content'][:40]!r}; correct the row."
        ) from exc
    return text


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that close an answer: the one that training teaches, and the end-of-text token, which may be another."""
    rendered = render(AlpacaRow("question", "", "answer"), tokenizer)
    ends = {tokenizer.eos_token_id} - {None}
    if rendered.closed:
        ends.add(tokenizer(rendered.text, **special_tokens(tokenizer))["input_ids"][-1])
    return frozenset(int(token) for token in ends)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Arguments for tokenizing what `render` wrote: a chat template has written the special tokens itself."""
    return {"add_special_tokens": not tokenizer.chat_template}


ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca_prompt(instruction: str, input: str) -> str:
    """Stanford Alpaca's prompt (``train.py`` of tatsu-lab/stanford_alpaca), for tokenizers without a chat template."""
    template = ALPACA_WITH_INPUT if input else ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def user_content(instruction: str, input: str) -> str:
    """The user's message: the instruction and, after a blank line, its input."""
    return f"{instruction}\n\n{input}" if input else instruction
