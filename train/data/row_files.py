"""Reading rows from local files, every row checked as it is read.

A row that cannot be learnt is refused with its file and line, before anything heavy is imported: the launcher calls
`read_rows` on the login node. Reading json and csv needs the standard library alone; parquet needs pyarrow.

`datasets` reads what comes from the hub, but not these files: it guesses a type per column, and would turn answers like
``42``, ``N/A`` or ``2024-05-01 12:00:00`` into numbers, gaps and timestamps.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.rows import COLUMNS_HELP, Format, Row, parse_row
from train.errors import BadInput
from train.store.storage import readable

BLANKS = re.compile(r"\s*")
LONGEST_FIELD = 2**31 - 1  # of a CSV; the module's own limit is 128 KiB, less than a long answer


def read_rows(path: Path, form: Format) -> list[Row]:
    """Every row of a .json, .jsonl, .csv or .parquet file, checked.

    Raises:
        BadInput: the file is missing, of another kind or empty, or a row is malformed (naming file and line).
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"data file {path} ends with {path.suffix!r}; it has to be one of {', '.join(READERS)}.")
    if not path.exists():
        raise BadInput(f"data file {path.absolute()} does not exist; check data.source and data.eval_source.")
    with readable(path):
        rows = [parse_row(values, form, where) for where, values in reader(path)]
    if not rows:
        raise BadInput(f"data file {path} has no rows; {COLUMNS_HELP}.")
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            line = _decoded(content, path, number)
            if line.strip():
                yield f"{path}:{number}", _parsed(line, path, number)


def _decoded(content: bytes, path: Path, first_line: int = 1) -> str:
    """`content`, which begins with line `first_line` of `path`, as text."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = first_line + exc.object.count(b"\n", 0, exc.start)
        raise BadInput(
            f"{path}:{line}: the byte 0x{exc.object[exc.start]:02x} there is not UTF-8 text; save the file as UTF-8."
        ) from exc


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise BadInput(f"{path}:{number}: the line is no JSON ({_reason(exc)}); each line has to be one row.") from exc


def _reason(exc: Exception) -> str:
    """Why something is no JSON: where its syntax is wrong, or that it nests or counts too far."""
    return f"{exc.msg} at column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else str(exc)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of objects, or lines of them."""
    text = _decoded(path.read_bytes(), path)
    return _read_array(path, text) if text.lstrip().startswith("[") else _read_jsonl(path)


def _read_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array one by one, since `json.loads` would not tell on which lines they begin."""
    decoder = json.JSONDecoder()
    position, line, counted = _skip_blanks(text, text.index("[") + 1), 1, 0
    try:
        while text[position : position + 1] != "]":
            line, counted = line + text.count("\n", counted, position), position
            value, end = decoder.raw_decode(text, position)
            yield f"{path}:{line}", value
            position = _skip_blanks(text, end)
            if text[position : position + 1] == ",":
                position = _skip_blanks(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = _skip_blanks(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except (ValueError, RecursionError) as exc:
        wrong = exc.lineno if isinstance(exc, json.JSONDecodeError) else line
        raise BadInput(f"{path}:{wrong}: this is no JSON ({_reason(exc)}); correct it.") from exc


def _skip_blanks(text: str, position: int) -> int:
    match = BLANKS.match(text, position)
    return match.end() if match else position


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_FIELD)
    with io.StringIO(_decoded(path.read_bytes(), path), newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows_end = 1  # the header
        try:
            _refuse_other_separators(reader.fieldnames or [], path)
            for values in reader:
                fields, rows_end = list(values.values()), reader.line_num
                if None in values or None in fields:
                    raise BadInput(f"{path}:{rows_end}: the row has not as many fields as the header; quote commas.")
                where = f"{path}:{rows_end - sum(field.count(chr(10)) for field in fields)}"
                yield where, _with_conversation(values, where)
        except csv.Error as exc:  # an open quote swallows the lines behind it, so the row's first line is named
            raise BadInput(f"{path}:{rows_end + 1}: this is no CSV ({exc}); correct it.") from exc


def _refuse_other_separators(header: Sequence[str], path: Path) -> None:
    """Many a spreadsheet writes semicolons or tabs and calls that CSV."""
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise BadInput(
            f"{path}:1: the header is one field, {header[0]!r}; save the file with commas between the fields."
        )


def _with_conversation(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of a CSV, whose column ``messages`` holds a conversation as JSON text."""
    if "messages" not in values:
        return values
    try:
        return values | {"messages": json.loads(values["messages"])}
    except (ValueError, RecursionError) as exc:
        raise BadInput(
            f"{where}: messages is no JSON ({_reason(exc)}); in a CSV it has to be a JSON list of {{role, content}} as text."
        ) from exc


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # a dependency of `datasets`; heavy, and only this kind of file needs it

    with path.open("rb") as file:
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as exc:  # damaged pages are OSErrors
            raise BadInput(f"{path} is no parquet file that can be read ({exc}); write it anew.") from exc
    for number, values in enumerate(rows, 1):
        yield f"{path} row {number}", values


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
