"""Rows become tokens of which exactly the answers are learned; what is lost is counted; the cache gives the same again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from captured_log import captured_log
from train.config import DataConfig, ModelConfig
from train.data import loading, rendering, tokenizing
from train.data.loading import load_tokenized, summary
from train.data.reading import read_hub, read_split
from train.data.rendering import alpaca_prompt, render
from train.data.rows import AlpacaRow, ChatRow, Row
from train.data.source import data_fingerprint, read_dataset_stats, tokens_key
from train.data.token_table import TokenTable
from train.data.tokenizing import IGNORED_LABEL, RowTokenizer
from train.errors import BadInput
from train.section import parse_section
from train.store.layout import CacheDir, TokensDir

MODEL = ModelConfig(name="test", source="test", fingerprint="test")
CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNCLOSED = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As templates that leave the reasoning of earlier answers out.
FORGETFUL = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERSATION = ChatRow(
    (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Say assistant"},
        {"role": "assistant", "content": "assistant"},
        {"role": "user", "content": "Zürich\n?"},
        {"role": "assistant", "content": "Grüezi 🙂\nall"},
    )
)


def byte_tokenizer(chat_template: str | None = None, eos: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A token per byte, the marks of ChatML, and no pad token."""
    marks = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + marks)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, eos_token=eos)


def data_config(source: Path | str = "builtin:tasks", **values: Any) -> DataConfig:
    data = parse_section(DataConfig, {"name": "test", "source": str(source)} | values)
    return data.model_copy(update={"fingerprint": data_fingerprint(data)})


def tokenize(tokenizer: PreTrainedTokenizerFast, *rows: Row, **values: Any) -> tuple[TokenTable, RowTokenizer]:
    row_tokenizer = RowTokenizer(tokenizer, data_config(**values))
    return row_tokenizer.tokenize(rows, lambda: None, lambda count: None), row_tokenizer


def learned_texts(tokenizer: PreTrainedTokenizerFast, table: TokenTable, i: int = 0) -> list[str]:
    """The learned stretches of one row, as text."""
    tokens, labels = table.example(i)
    stretches = np.split(tokens, np.flatnonzero(np.diff(labels != IGNORED_LABEL)) + 1)
    masks = np.split(labels, np.flatnonzero(np.diff(labels != IGNORED_LABEL)) + 1)
    pairs = zip(stretches, masks, strict=True)
    return [tokenizer.decode(part.tolist()) for part, mask in pairs if mask[0] != IGNORED_LABEL]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    byte_tokenizer(CHAT_ML).save_pretrained(tmp_path / "model")
    sizes = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 1000}
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path) -> CacheDir:
    return CacheDir(tmp_path / "cache")


def write_rows(path: Path, count: int) -> Path:
    rows = [{"instruction": f"Say {i}", "output": f"number {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_of_a_conversation_every_answer_is_learned_with_its_end_mark() -> None:
    tokenizer = byte_tokenizer(CHAT_ML)
    table, _ = tokenize(tokenizer, CONVERSATION)
    assert learned_texts(tokenizer, table) == ["assistant<|im_end|>", "Grüezi 🙂\nall<|im_end|>"]
    assert tokenizer.decode(table.tokens.tolist()) == tokenizer.apply_chat_template(
        list(CONVERSATION.messages), tokenize=False
    ).rstrip("\n")


def test_the_examples_of_the_docstrings_are_what_happens() -> None:
    rendered = render(AlpacaRow("Add. 1 2", "", "3"), byte_tokenizer(CHAT_ML))
    assert f"    {rendered.text}\n".replace("\n", "⏎").removesuffix("⏎") in str(rendering.__doc__)
    ((start, end),) = rendered.answers
    assert rendered.text[start:end] == "3<|im_end|>"
    assert f"the answer is characters {start} to {end}:" in str(tokenizing.__doc__)
    spans = re.findall(r"(\d+), (\d+)", str(tokenizing.__doc__))
    texts = [rendered.text[int(first) : int(last)] for first, last in spans]
    assert texts == ["assistant", "\n", "3", "<|im_end|>"]
    overlaps = [int(last) > start and int(first) < end for first, last in spans]
    assert overlaps == [False, False, True, True]


def test_alpaca_rows_become_turns_where_there_is_a_chat_template() -> None:
    tokenizer = byte_tokenizer(CHAT_ML)
    table, _ = tokenize(tokenizer, AlpacaRow("Add.", "1 2", "3"))
    text = "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    assert tokenizer.decode(table.tokens.tolist()) == text
    assert learned_texts(tokenizer, table) == ["3<|im_end|>"]


def test_without_a_chat_template_the_words_are_those_of_stanford_alpaca() -> None:
    tokenizer = byte_tokenizer()
    table, _ = tokenize(tokenizer, AlpacaRow("Add.", "1 2", "3"), AlpacaRow("Hi", "", "Ho"))
    assert tokenizer.decode(table.example(0)[0].tolist()) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3<|im_end|>"
    )
    assert learned_texts(tokenizer, table, 0) == ["3<|im_end|>"]
    assert learned_texts(tokenizer, table, 1) == ["Ho<|im_end|>"]
    assert "Input" not in alpaca_prompt("Hi", "")


def test_marks_that_the_tokenizer_adds_itself_are_neither_learned_nor_doubled() -> None:
    tokenizer = byte_tokenizer()
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=marks
    )
    table, _ = tokenize(tokenizer, AlpacaRow("Hi", "", "Ho"))
    assert tokenizer.decode(table.tokens.tolist()) == f"<|im_start|>{alpaca_prompt('Hi', '')}Ho<|im_end|>"
    assert learned_texts(tokenizer, table) == ["Ho<|im_end|>"]


def test_answers_are_found_where_a_space_belongs_to_the_next_word() -> None:
    words = ["▁", "▁Ho", "▁ho", "▁Hi", "▁user:", "▁assistant:", "\n", *"Hioserant: ", "</s>"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0 / len(word)) for word in words], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["</s>"])
    llama = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %} {% endfor %}"
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=llama + "{% if add_generation_prompt %}assistant:{% endif %}",
        eos_token="</s>",
    )
    table, _ = tokenize(fast, AlpacaRow("Hi", "", "Ho ho"))
    tokens, labels = table.example(0)
    assert fast.convert_ids_to_tokens(tokens[labels != IGNORED_LABEL].tolist()) == ["▁Ho", "▁ho", "</s>"]


def test_a_template_that_closes_no_turn_gets_the_end_of_text_token() -> None:
    tokenizer = byte_tokenizer(UNCLOSED)
    table, _ = tokenize(tokenizer, AlpacaRow("Hi", "", "Ho"))
    assert learned_texts(tokenizer, table) == ["Ho<|im_end|>"]


def test_all_tokens_are_learned_if_asked_for() -> None:
    table, _ = tokenize(byte_tokenizer(CHAT_ML), CONVERSATION, response_only=False)
    assert (table.tokens == table.labels).all()


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    render(AlpacaRow("Hi", "", "Ho"), byte_tokenizer(FORGETFUL))
    with pytest.raises(BadInput, match="cannot be separated from its prompt"):
        render(CONVERSATION, byte_tokenizer(FORGETFUL))
    tokenize(byte_tokenizer(FORGETFUL), CONVERSATION, response_only=False)


def test_what_a_template_says_against_a_row_reaches_the_user() -> None:
    with pytest.raises(BadInput, match=r"rejects a conversation of system, user, assistant.*no system here"):
        render(CONVERSATION, byte_tokenizer("{{ raise_exception('no system here') }}"))


def test_tokenizers_that_cannot_do_it_are_refused_and_no_pad_token_is_needed() -> None:
    assert byte_tokenizer().pad_token is None
    with pytest.raises(BadInput, match="no chat template"):
        tokenize(byte_tokenizer(), CONVERSATION)
    with pytest.raises(BadInput, match="neither an end-of-text token nor a chat template"):
        tokenize(byte_tokenizer(eos=None), AlpacaRow("Hi", "", "Ho"))
    table, _ = tokenize(byte_tokenizer(CHAT_ML, eos=None), AlpacaRow("Hi", "", "Ho"))
    assert len(table) == 1


def test_long_rows_are_cut_or_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer(CHAT_ML)
    rows = [AlpacaRow("Hi", "", "x" * 3), AlpacaRow("Hi", "", "x" * 30), AlpacaRow("long " * 9, "", "x")]
    table, row_tokenizer = tokenize(tokenizer, *rows, max_length=32)
    assert table.lengths().tolist() == [25, 32]
    assert learned_texts(tokenizer, table, 1) == ["x" * 11]
    assert row_tokenizer.tally.truncated == 1
    assert row_tokenizer.tally.dropped == {"the answer begins after 32 tokens": 1}


def test_where_nothing_is_left_the_lengths_that_would_do_are_named() -> None:
    tokenizer = byte_tokenizer(CHAT_ML)
    rows = [AlpacaRow("Hi", "", "x" * 30), AlpacaRow("Hello", "", "x" * 10)]
    with pytest.raises(BadInput, match=r"data.max_length=8 cuts off the whole answer of each of the 2 rows") as error:
        tokenize(tokenizer, *rows, max_length=8)
    whole, _ = tokenize(tokenizer, *rows)
    assert f"max_length={max(whole.lengths())} would keep every row whole" in str(error.value)
    least = int(str(error.value).split(" is the smallest")[0].split()[-1])
    assert len(tokenize(tokenizer, *rows, max_length=least)[0]) == 1
    with pytest.raises(BadInput):
        tokenize(tokenizer, *rows, max_length=least - 1)


def test_held_out_rows_that_leave_nothing_are_told_from_those_to_learn(
    tmp_path: Path, model_dir: Path, cache: CacheDir
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"instruction": "word " * 100, "output": "yes"}) + "\n")
    data = data_config(write_rows(tmp_path / "rows.jsonl", 20), eval_source=str(long), max_length=64, eval_rows=1)
    with pytest.raises(BadInput, match="answer of each of the 1 held-out rows"):
        load_tokenized(data, MODEL, model_dir, cache)


def test_the_cache_gives_the_same_and_is_not_made_twice(tmp_path: Path, model_dir: Path, cache: CacheDir) -> None:
    data = data_config(write_rows(tmp_path / "rows.jsonl", 50), eval_rows=10)
    assert read_dataset_stats(data, MODEL, cache) is None
    first = load_tokenized(data, MODEL, model_dir, cache)
    made = TokensDir(cache.tokens(tokens_key(data, MODEL))).stats.stat().st_mtime_ns
    again = load_tokenized(data, MODEL, tmp_path / "not needed", cache)
    assert TokensDir(cache.tokens(tokens_key(data, MODEL))).stats.stat().st_mtime_ns == made
    for name in ("tokens", "labels", "offsets"):
        assert isinstance(getattr(again.train, name), np.memmap)
        assert (getattr(again.train, name) == getattr(first.train, name)).all()
    assert (first.train.tokens.dtype, first.train.labels.dtype, first.train.offsets.dtype) == (
        np.int32,
        np.int32,
        np.int64,
    )
    assert read_dataset_stats(data, MODEL, cache) == again.stats


def test_a_log_is_told_how_far_it_is(
    tmp_path: Path,
    model_dir: Path,
    cache: CacheDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = data_config(write_rows(tmp_path / "rows.jsonl", 600), eval_rows=10)
    with captured_log() as lines:
        load_tokenized(data, MODEL, model_dir, cache)
    assert lines == [], "what is done within seconds needs no words"
    monkeypatch.setattr(loading, "LINE_SECONDS", 0.0)
    with captured_log() as lines:
        load_tokenized(data.model_copy(update={"max_length": 99}), MODEL, model_dir, cache)
    assert [line.rpartition(": ")[2] for line in lines] == [f"{done} of 600 rows" for done in (256, 512, 590, 600)]
    assert lines[0].startswith(f"tokenizing {data.name}: ")


def test_the_facts_count_what_the_arrays_hold(tmp_path: Path, model_dir: Path, cache: CacheDir) -> None:
    data = data_config(write_rows(tmp_path / "rows.jsonl", 50), eval_rows=10)
    tokenized = load_tokenized(data, MODEL, model_dir, cache)
    stats, train = tokenized.stats, tokenized.train
    assert (stats["train_rows"], stats["eval_rows"]) == (len(train), len(tokenized.eval)) == (40, 10)
    assert stats["train_tokens"] == len(train.tokens) == train.lengths().sum()
    assert stats["train_label_tokens"] == (train.labels != IGNORED_LABEL).sum()
    assert stats["longest"] == max(train.lengths().max(), tokenized.eval.lengths().max())
    assert summary(stats).startswith("40 rows to train on, 10 held out; 0 truncated to 512 tokens, 0 dropped;")
    assert "2 dropped (2 because it rained)" in summary(stats | {"dropped": {"it rained": 2}})


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 64},
        {"response_only": False},
        {"eval_rows": 3},
        {"split_seed": 1},
        {"train_rows": 5},
        {"format": "alpaca"},
    ],
    ids=str,
)
def test_the_key_follows_everything_that_decides_the_tokens(change: dict[str, Any]) -> None:
    data = data_config()
    assert tokens_key(data.model_copy(update=change), MODEL) != tokens_key(data, MODEL)
    assert tokens_key(data.model_copy(update={"name": "other"}), MODEL) == tokens_key(data, MODEL)
    assert tokens_key(data, MODEL.model_copy(update={"fingerprint": "other"})) != tokens_key(data, MODEL)


def test_rows_are_held_out_by_seed_and_both_parts_keep_their_order(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 50)
    train, held_out, _ = read_split(data_config(path, eval_rows=10))
    numbers = [int(row.instruction.split()[1]) for row in (*train, *held_out) if isinstance(row, AlpacaRow)]
    assert sorted(numbers) == list(range(50))
    assert numbers == sorted(numbers[:40]) + sorted(numbers[40:])
    assert read_split(data_config(path, eval_rows=10))[1] == held_out
    assert read_split(data_config(path, eval_rows=10, split_seed=1))[1] != held_out
    assert read_split(data_config(path, eval_rows=10, train_rows=7))[0] == train[:7]


def test_a_file_of_its_own_can_be_held_out(tmp_path: Path) -> None:
    train, held_out, _ = read_split(data_config("builtin:tasks", eval_source="builtin:tasks/heldout", eval_rows=64))
    assert len(train) >= 4000
    assert len(held_out) == 64
    assert not set(train) & set(held_out)
    assert len(read_split(data_config("builtin:tasks", eval_source="builtin:tasks/heldout", eval_rows=999))[1]) == 400


def test_more_rows_than_there_are_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 10)
    with pytest.raises(BadInput, match=r"data\.eval_rows=10 would hold out all of the 10 rows"):
        read_split(data_config(path, eval_rows=10))
    with pytest.raises(BadInput, match=r"data\.train_rows=9 asks for more rows"):
        read_split(data_config(path, eval_rows=2, train_rows=9))


def test_tokenizing_can_be_stopped_and_leaves_nothing(tmp_path: Path, model_dir: Path, cache: CacheDir) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_tokenized(
            data_config(write_rows(tmp_path / "rows.jsonl", 50), eval_rows=10), MODEL, model_dir, cache, stop
        )
    assert not cache.path.exists()


def test_a_data_set_of_the_hub_loses_its_empty_answers_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # `datasets.load_dataset` takes a folder where it takes a hub id.
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"instruction": "Hi", "input": "", "output": answer, "text": "x"} for answer in ("Ho", "", "He")]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, dropped = read_hub(str(folder), data_config(split="train"))
    assert found == [AlpacaRow("Hi", "", "Ho"), AlpacaRow("Hi", "", "He")]
    assert dropped == {"the answer is empty": 1}
    with pytest.raises(BadInput, match=r"data\.split=test\) could not be loaded"):
        read_hub(str(folder), data_config(split="test"))


def test_a_hub_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"'nobody/nothing'.*could not be loaded.*launcher stage"):
        read_hub("nobody/nothing", data_config())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tmp_path: Path, model_dir: Path, cache: CacheDir
) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(BadInput, match=r"gives token \d+, but the model has a vocabulary of 100"):
        load_tokenized(data_config(write_rows(tmp_path / "rows.jsonl", 30), eval_rows=5), MODEL, model_dir, cache)
