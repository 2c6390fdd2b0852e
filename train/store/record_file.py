"""Records on disk: every file below a sweep folder is read through the pydantic model that describes it.

A JSON document is one record, a ``.jsonl`` file one record per line. Both have one integer, `FORMAT`, for the whole folder: a document
holds it as its key ``format``, a ``.jsonl`` file in its first line; a missing one means 1, so version 0.1.0's files are format 1. The
journal's bytes are what a run computed and nothing else: it has no number as long as its format is 1.
`FORMAT` grows when an older version would misread a file. New keys that may be ignored need no new number.

What cannot be read as promised raises `DamagedFile`, which names the file; nothing below reads files in another way. A last line that
a killed writer left incomplete is not damage: it counts as not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from train.errors import DamagedFile, NewerFormat
from train.store.storage import append_lines, write_json

FORMAT = 1


class RecordPart(BaseModel):
    """A JSON object: keys and types as declared, no conversions; keys of a later version are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class FileRecord(RecordPart):
    """A JSON object that is a whole file."""

    format: int = Field(FORMAT, ge=1)


class LineRecord(FileRecord):
    """One line of a ``.jsonl`` file; only the first line of a file holds its format."""

    format: int = Field(FORMAT, ge=1, exclude=True)


R = TypeVar("R", bound=FileRecord)
L = TypeVar("L", bound=LineRecord)
T = TypeVar("T")


def read_record(path: Path, kind: type[R]) -> R | None:
    """The record in the JSON document at `path`; None where there is no file.

    Raises:
        DamagedFile: it is not the document of a `kind`.
    """
    content = read_content(path)
    return None if content is None else parse_record(content, kind, path)


def read_existing(path: Path, kind: type[R]) -> R:
    """`read_record` for a file that has to be there.

    Raises:
        DamagedFile: it is missing, or not the document of a `kind`.
    """
    record = read_record(path, kind)
    if record is None:
        raise DamagedFile(path, "is missing")
    return record


def write_record(path: Path, record: FileRecord) -> None:
    """Write a document that holds `record`.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    write_json(path, record.model_dump(mode="json"))


def append_records(path: Path, records: Sequence[LineRecord]) -> None:
    """Append a line per record; a file that these begin gets the format in its first line.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    lines = [record.model_dump(mode="json", exclude_unset=True) for record in records]
    if lines and not _has_content(path):
        lines[0] = {"format": FORMAT} | lines[0]
    append_lines(path, lines)


def read_records(path: Path, kind: type[L]) -> list[L]:
    """Every whole line of a growing file; none where there is no file.

    Raises:
        DamagedFile: a line is not a `kind`.
    """
    content = read_content(path) or b""
    return [
        parse_record(line, kind, path, f"line {number}: ")
        for number, line in enumerate(whole_lines(content, path), start=1)
    ]


def read_first(path: Path, kind: type[L]) -> L | None:
    """The first whole line of a growing file, without reading the rest; None where there is none.

    Raises:
        DamagedFile: it is not a `kind`.
    """
    line = first_line(path)
    return None if line is None else parse_record(line, kind, path, "line 1: ")


def read_tail(path: Path, kind: type[L], tail_bytes: int = 4096) -> list[L]:
    """The whole lines in the last `tail_bytes` of a growing file, without reading the rest.

    Raises:
        DamagedFile: one of them is not a `kind`.
    """
    return [parse_record(line, kind, path, "near its end: ") for line in tail_lines(path, tail_bytes)]


def read_last(path: Path, kind: type[L], tail_bytes: int = 4096) -> L | None:
    """The last whole line of a growing file, by its last `tail_bytes` alone; None where there is none.

    Raises:
        DamagedFile: it is not a `kind`.
    """
    lines = tail_lines(path, tail_bytes)
    return parse_record(lines[-1], kind, path, "near its end: ") if lines else None


class DamageLog:
    """Damaged files that somebody met who continues without them; `messages` name each once."""

    def __init__(self) -> None:
        self._messages: dict[str, None] = {}

    @property
    def messages(self) -> tuple[str, ...]:
        """What is wrong, in the order in which it was met."""
        return tuple(self._messages)

    def read(self, reader: Callable[[], T], otherwise: T) -> T:
        """What `reader` gives; `otherwise` where it meets a damaged file."""
        try:
            return reader()
        except DamagedFile as exc:
            self._messages[str(exc)] = None
            return otherwise


# Bytes


def read_content(path: Path) -> bytes | None:
    """What a file holds; None where there is none.

    Raises:
        DamagedFile: it cannot be read (a folder in its place, or no permission).
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def whole_lines(content: bytes, path: Path) -> list[bytes]:
    """The lines of a growing file up to the last line end.

    Raises:
        DamagedFile: what follows is not the beginning of a record, so no killed writer left it.
    """
    end = content.rfind(b"\n") + 1
    # A power cut can leave zeros where the file had grown and its bytes had not arrived.
    if content[end : end + 1] not in {b"", b"{", b"\0"}:
        raise DamagedFile(path, "is damaged: its last line is not JSON")
    return content[:end].splitlines()


def first_line(path: Path) -> bytes | None:
    """The first whole line of a growing file; None where there is none.

    Raises:
        DamagedFile: it cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            lines = whole_lines(file.readline(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    return lines[0] if lines else None


def tail_lines(path: Path, tail_bytes: int = 4096) -> list[bytes]:
    """The whole lines in the last `tail_bytes` of a growing file, without reading the rest.

    Raises:
        DamagedFile: it cannot be read, or its end is something else.
    """
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - tail_bytes)
            file.seek(start)
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    if start > 0:
        # The first of these lines began before the tail.
        content = content.partition(b"\n")[2]
    return whole_lines(content, path)


# Checks


def parse_record(content: bytes, kind: type[R], path: Path, where: str = "") -> R:
    """The record that `content` of the file `path` holds; `where` in the file it was.

    Raises:
        DamagedFile: it is not a `kind`.
    """
    try:
        record = kind.model_validate_json(content)
    except ValidationError as exc:
        raise damage(exc, content, path, where) from exc
    refuse_newer(record.format, path)
    return record


def parse_as(adapter: TypeAdapter[T], content: bytes, path: Path, where: str = "") -> T:
    """`parse_record` for what needs no model per line, such as thousands of journal lines.

    Raises:
        DamagedFile: it is not what `adapter` wants.
    """
    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError as exc:
        raise damage(exc, content, path, where) from exc


def refuse_newer(found: int, path: Path) -> None:
    """Refuse a file whose format this version does not know.

    Raises:
        NewerFormat: naming both numbers.
    """
    if found > FORMAT:
        raise NewerFormat(path, found, FORMAT)


def damage(exc: ValidationError, content: bytes, path: Path, where: str) -> DamagedFile:
    """The error for content that a model refused: of a later version, or damaged."""
    found = _format_of(content)
    if found > FORMAT:
        return NewerFormat(path, found, FORMAT)
    return DamagedFile(path, f"is damaged: {where}{_explain(exc, content)}")


def _format_of(content: bytes) -> int:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return 1
    number = values.get("format") if isinstance(values, dict) else None
    return number if isinstance(number, int) else 1


def _explain(exc: ValidationError, content: bytes) -> str:
    """One clause about the first thing that is wrong."""
    if not content.strip():
        return "it is empty"
    error = exc.errors(include_url=False)[0]
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "json_invalid":
        return f"it is not valid JSON ({error['msg'].removeprefix('Invalid JSON: ')})"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    wanted = error["msg"].removeprefix("Input should be ")
    return f"the key {key!r} should be {wanted}" if key else f"it holds {_name_of(error['input'])} instead of {wanted}"


def _name_of(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        # Whether it can be written is what appending finds out.
        return False


def _unreadable(path: Path, exc: OSError) -> DamagedFile:
    advice = "Remove it, or restore the file" if path.is_dir() else "Check its permissions, or restore it from a copy"
    return DamagedFile(path, f"cannot be read ({exc.strerror or exc})", f"{advice}, and run the same command again.")
