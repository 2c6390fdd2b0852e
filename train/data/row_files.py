"""Reads rows from local files and checks each one as it is read.

A bad row is rejected with its file and line before anything heavy is imported: the launcher calls `read_rows` on the login node.
JSON and CSV need only the standard library; Parquet needs pyarrow.

Why not `datasets`, which reads what comes from the hub? It infers a type per column. Answers like ``42``, ``N/A`` or
``2024-05-01 12:00:00`` would become numbers, missing values and timestamps, and a mixed column would be an error without a line.

A new file format is one more reader in `READERS`: a function from a path to pairs of where a row is (``rows.csv:3``) and its values.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.config import RowFormat
from train.data.rows import COLUMNS_HELP, Row, parse_row
from train.errors import BadInput
from train.store.storage import readable

Reader = Callable[[Path], Iterator[tuple[str, Any]]]

BLANKS = re.compile(r"\s*")
# Characters of a CSV field. The csv module's own limit is 128 KiB, less than a long answer.
MAX_FIELD = 2**31 - 1


def read_rows(path: Path, form: RowFormat) -> list[Row]:
    """Every row of a .json, .jsonl, .csv or .parquet file, checked.

    Raises:
        BadInput: the file is missing, in another format or empty, or a row is malformed (naming file and line).
    """
    reader = reader_of(path)
    if not path.exists():
        raise BadInput(f"data file {path.absolute()} does not exist; check data.source and data.eval_source.")
    with readable(path):
        rows = [parse_row(values, form, where) for where, values in reader(path)]
    if not rows:
        raise BadInput(f"data file {path} has no rows; {COLUMNS_HELP}.")
    return rows


def reader_of(path: Path) -> Reader:
    """The reader for a file's suffix.

    Raises:
        BadInput: no reader knows the suffix.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"data file {path} ends with {path.suffix!r}; it has to be one of {', '.join(READERS)}.")
    return reader


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            line = _decoded(content, path, number)
            if line.strip():
                yield f"{path}:{number}", _parsed(line, path, number)


def _decoded(content: bytes, path: Path, first_line: int = 1) -> str:
    """`content` as text; it begins with line `first_line` of `path`."""
    try:
        # "-sig" drops the byte-order mark that Windows programs put at the start.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = first_line + exc.object.count(b"\n", 0, exc.start)
        raise BadInput(
            f"{path}:{line}: the byte 0x{exc.object[exc.start]:02x} is not valid UTF-8; save the file as UTF-8."
        ) from exc


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as exc:
        # A RecursionError is JSON that nests too deeply; a ValueError also a number with too many digits.
        raise BadInput(
            f"{path}:{number}: not valid JSON ({_reason(exc)}); each line must hold exactly one row."
        ) from exc


def _reason(exc: Exception) -> str:
    """Why text is not valid JSON: where its syntax is wrong, or which limit of the parser it exceeds."""
    return f"{exc.msg} at column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else str(exc)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of objects, or one object per line."""
    text = _decoded(path.read_bytes(), path)
    return _read_array(path, text) if text.lstrip().startswith("[") else _read_jsonl(path)


def _read_array(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array one by one: `json.loads` would not say on which line each begins."""
    decoder = json.JSONDecoder()
    position = _skip_blanks(text, text.index("[") + 1)
    # `position` is in line `line`, and the line breaks before `counted` are in it already: each is counted once.
    line = 1
    counted = 0
    try:
        # A slice, not an index: at the end of the text it is "", which raw_decode below reports as a missing value.
        while text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            counted = position
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
        bad_line = exc.lineno if isinstance(exc, json.JSONDecodeError) else line
        raise BadInput(f"{path}:{bad_line}: not valid JSON ({_reason(exc)}); correct the file.") from exc


def _skip_blanks(text: str, position: int) -> int:
    match = BLANKS.match(text, position)
    return match.end() if match else position


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_FIELD)
    # newline="" leaves line breaks to the csv module, which keeps those inside quotes as they are.
    with io.StringIO(_decoded(path.read_bytes(), path), newline="") as file:
        reader = csv.DictReader(file, strict=True)
        # The line on which the last row ended that was read whole; line 1 is the header.
        row_end = 1
        try:
            _refuse_other_separators(reader.fieldnames or [], path)
            for values in reader:
                fields = list(values.values())
                row_end = reader.line_num
                # DictReader puts surplus fields under the key None, and None into columns that the row lacks.
                if None in values or None in fields:
                    raise BadInput(
                        f"{path}:{row_end}: the row does not have as many fields as the header; quote fields that hold commas."
                    )
                # Where the row begins: an answer 'b\nc' that ends on line 3 began on line 2.
                where = f"{path}:{row_end - sum(field.count(chr(10)) for field in fields)}"
                yield where, _with_conversation(values, where)
        except csv.Error as exc:
            # The bad row's first line: an open quote swallows the lines after it, so `line_num` is far behind the mistake.
            raise BadInput(f"{path}:{row_end + 1}: not valid CSV ({exc}); correct the file.") from exc


def _refuse_other_separators(header: Sequence[str], path: Path) -> None:
    """Some spreadsheets separate fields with semicolons or tabs and call that CSV."""
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise BadInput(
            f"{path}:1: the header is one field, {header[0]!r}; save the file with commas between the fields."
        )


def _with_conversation(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A CSV row with its column ``messages``, if any, parsed: it holds a conversation as JSON text."""
    if "messages" not in values:
        return values
    try:
        return values | {"messages": json.loads(values["messages"])}
    except (ValueError, RecursionError) as exc:
        raise BadInput(
            f"{where}: messages is not valid JSON ({_reason(exc)}); in a CSV it has to be a JSON list of {{role, content}} as text."
        ) from exc


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    # A dependency of `datasets`. Imported here because it is heavy and only this format needs it.
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as exc:
            # pyarrow reports damaged pages as OSError.
            raise BadInput(f"{path} cannot be read as a Parquet file ({exc}); write the file again.") from exc
    for number, values in enumerate(rows, 1):
        yield f"{path} row {number}", values


READERS: dict[str, Reader] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
