"""Local files give exactly their rows; a row that cannot be learned is rejected with its file and line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from train.data.row_files import read_rows
from train.data.rows import AlpacaRow, ChatRow, EmptyAnswer, parse_row
from train.errors import BadInput

GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    return write(path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "pretty.json", "rows.csv", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_text(name: str, tmp_path: Path) -> None:
    answers = ["42", "N/A", "2024-05-01 12:00:00", 'two\nlines, "quoted"', "Zürich", "007", "true"]
    values = [
        {"instruction": f"Say {i}", "input": "", "output": answer, "kind": "x"} for i, answer in enumerate(answers)
    ]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    elif path.suffix == ".csv":
        quoted = ['"' + row["output"].replace('"', '""') + '"' for row in values]
        write(path, "instruction,input,output\n" + "".join(f"Say {i},,{text}\n" for i, text in enumerate(quoted)))
    elif name == "rows.jsonl":
        jsonl(tmp_path, *values)
    else:
        write(path, json.dumps(values, indent=2 if name.startswith("pretty") else None))
    assert read_rows(path, "auto") == [AlpacaRow(f"Say {i}", "", answer) for i, answer in enumerate(answers)]


def test_a_conversation_in_a_csv_is_json_text(tmp_path: Path) -> None:
    def cell(messages: str) -> str:
        return '"' + messages.replace('"', '""') + '"'

    path = write(tmp_path / "rows.csv", f"id,messages\n1,{cell(json.dumps(CHAT['messages']))}\n")
    assert read_rows(path, "auto") == read_rows(jsonl(tmp_path, CHAT), "auto")
    path = write(tmp_path / "rows.csv", f"id,messages\n1,{cell(json.dumps(CHAT['messages']))}\n2,hello\n")
    with pytest.raises(BadInput, match=r"rows\.csv:3: messages is not valid JSON .* as text"):
        read_rows(path, "auto")


def test_chat_rows_and_rows_without_input_are_told_by_their_columns(tmp_path: Path) -> None:
    rows = read_rows(jsonl(tmp_path, CHAT, {"instruction": "Hi", "output": "Hello"}, GOOD | {"input": None}), "auto")
    assert [type(row) for row in rows] == [ChatRow, AlpacaRow, AlpacaRow]
    assert rows[1] == AlpacaRow("Hi", "", "Hello")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"instruction": "Hi"}, "column 'output' is missing"),
        ({"instruction": "Hi", "output": 3}, "output has to be text, not 3"),
        ({"instruction": "Hi", "output": None}, "output has to be text, not null"),
        ({"instruction": "Hi", "output": " \n"}, "output is empty"),
        ({"instruction": "", "output": "x"}, "instruction is empty"),
        ({"instruction": "Hi", "input": ["x"], "output": "x"}, "input has to be text"),
        (["Hi"], "a row has to be an object"),
        ({"messages": []}, "messages has to be a list"),
        ({"messages": "Hi"}, "messages has to be a list"),
        ({"messages": [{"role": "assistant"}]}, "content has to be text"),
        ({"messages": ["Hi"]}, "messages[0] has to be an object"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "has to be the assistant's answer"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "the assistant speaks first"),
        (
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": ""}]},
            "an answer of the assistant is empty",
        ),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(bad: Any, said: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, GOOD, bad, GOOD)
    with pytest.raises(BadInput) as error:
        read_rows(path, "auto")
    assert f"{path}:3: " in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.jsonl", '{"instruction": "a", "output": "b"}\n\n{"instruction": "a", \n', 3),
        ("rows.json", '[\n{"instruction": "a",\n "output": "b"},\n{"instruction": "a"}\n]', 4),
        ("rows.json", '[\n{"instruction": "a",\n "output": "b"},\n{"instruction" "a"}\n]', 4),
        ("rows.json", '[{"instruction": "a", "output": "b"}\n {"instruction": "a", "output": "b"}]', 2),
        ("rows.json", '[{"instruction": "a", "output": "b"}', 1),
        ("rows.json", '[{"instruction": "a", "output": "b"}]\n]', 2),
        ("rows.json", '{\n"data": []}', 1),
        ("rows.csv", 'instruction,output\na,"b\nc"\n\na,\n', 5),
        ("rows.csv", "instruction,output\na,b\na,b,c\n", 3),
        ("rows.csv", "instruction,output\na,b\na\n", 3),
        ("rows.csv", 'instruction,output\na,b\na,"b"c\n', 3),
        ("rows.csv", 'instruction,output\na,b\na,"b\nc\nd\n', 3),
    ],
)
def test_the_line_is_right_in_every_kind_of_file(name: str, content: str, line: int, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(BadInput, match=f"{name}:{line}: "):
        read_rows(path, "auto")


def test_a_row_of_a_parquet_file_is_named_by_its_number(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, GOOD | {"output": ""}]), tmp_path / "rows.parquet")
    with pytest.raises(BadInput, match=r"rows\.parquet row 2: output is empty"):
        read_rows(tmp_path / "rows.parquet", "auto")


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_file_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no rows"):
        read_rows(write(tmp_path / "rows.json", content), "auto")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"/no\.jsonl does not exist"):
        read_rows(tmp_path / "no.jsonl", "auto")
    with pytest.raises(BadInput, match=r"\.json, \.jsonl, \.csv, \.parquet"):
        read_rows(write(tmp_path / "rows.xlsx", "x"), "auto")
    with pytest.raises(BadInput, match="cannot be read as a Parquet file"):
        read_rows(write(tmp_path / "rows.parquet", "x"), "auto")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "', '", "output": "c"}\n'),
        ("rows.json", '[{"instruction": "a", "output": "b"},\n{"instruction": "', '", "output": "c"}]'),
        ("rows.csv", "instruction,output\n", ",c\n"),
    ],
)
def test_the_byte_and_the_line_that_are_no_utf8_are_named(name: str, before: str, after: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(f"\ufeff{before}".encode() + "Zürich".encode("latin-1") + after.encode())
    with pytest.raises(BadInput, match=rf"{name}:2: the byte 0xfc is not valid UTF-8"):
        read_rows(tmp_path / name, "auto")


def test_a_damaged_page_of_a_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 100), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[10:60] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"rows\.parquet cannot be read as a Parquet file"):
        read_rows(path, "auto")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"instruction": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"instruction": "a", "output": "half \\ud83d"}', r"output has '\\ud83d', half of a character"),
        ('{"instruction": "a", "input": 0, "output": "b"}', "input has to be text, not 0"),
        ('{"instruction": "a", "input": [], "output": "b"}', r"input has to be text, not \[\]"),
    ],
)
def test_what_no_tokenizer_could_take_is_refused_with_its_line(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"rows\.jsonl:2: {said}"):
        read_rows(write(tmp_path / "rows.jsonl", json.dumps(GOOD) + "\n" + line + "\n"), "auto")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_of_other_separators_is_told_so(tmp_path: Path, mark: str) -> None:
    path = write(tmp_path / "rows.csv", f"\ufeffinstruction{mark}output\r\nSay yes.{mark}yes\r\n")
    with pytest.raises(BadInput, match=r"rows\.csv:1: .* with commas between the fields"):
        read_rows(path, "auto")


def test_a_csv_may_hold_long_answers(tmp_path: Path) -> None:
    long = "word " * 50_000
    (row,) = read_rows(write(tmp_path / "rows.csv", f"instruction,output\na,{long}\n"), "auto")
    assert row == AlpacaRow("a", "", long)


def test_a_form_that_is_asked_for_is_demanded() -> None:
    with pytest.raises(BadInput, match="messages has to be a list"):
        parse_row(GOOD, "chat", "here")
    with pytest.raises(BadInput, match="column 'instruction' is missing"):
        parse_row(CHAT, "alpaca", "here")


def test_an_empty_answer_can_be_told_from_a_malformed_row() -> None:
    with pytest.raises(EmptyAnswer):
        parse_row(GOOD | {"output": ""}, "auto", "here")


def test_reading_imports_nothing_heavy(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD)
    code = f"""
import sys, pathlib, train.data.row_files
train.data.row_files.read_rows(pathlib.Path({str(path)!r}), "auto")
print(sorted({{"torch", "transformers", "datasets", "pyarrow", "numpy"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
