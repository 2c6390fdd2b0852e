"""Records on disk: every file below a sweep folder is read through the pydantic model that describes it.

A JSON document is one record; a ``.jsonl`` file has one record per line (`train.store.line_file`). One integer, `FORMAT`, covers all
of them. A document holds it under the key ``format``, a ``.jsonl`` file in its first line:

    {"format": 1, "time": 1796057418.8}                    cancel.json
    {"format": 1, "attempt": 1, "cause": "preempted", …}   attempts.jsonl, line 1
    {"attempt": 2, "cause": "done", …}                     attempts.jsonl, line 2

A missing number means 1, so version 0.1.0's files are format 1. The journal holds what a run computed and nothing else: it has no
number as long as its format is 1. `FORMAT` grows when an older version would misread a file. New keys that an older version may
ignore need no new number.

A file that does not hold what its model declares raises `DamagedFile`, which names the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from train.errors import DamagedFile, NewerFormat
from train.store.storage import write_json

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
T = TypeVar("T")


def read_record(path: Path, kind: type[R]) -> R | None:
    """The record in the JSON document at `path`; None if there is no file.

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


class DamageLog:
    """Collects damaged files for a caller that continues without them; `messages` names each file once."""

    def __init__(self) -> None:
        # A dictionary as an ordered set: several readers may find the same damage.
        self._messages: dict[str, None] = {}

    @property
    def messages(self) -> tuple[str, ...]:
        """What is wrong, in the order in which it was found."""
        return tuple(self._messages)

    def read(self, reader: Callable[[], T], otherwise: T) -> T:
        """What `reader` returns; `otherwise` if it raises `DamagedFile`."""
        try:
            return reader()
        except DamagedFile as exc:
            self._messages[str(exc)] = None
            return otherwise


# Bytes


def read_content(path: Path) -> bytes | None:
    """What a file holds; None if there is no file.

    Raises:
        DamagedFile: it cannot be read (a folder in its place, or no permission).
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise unreadable(path, exc) from exc


# Checks


def parse_record(content: bytes, kind: type[R], path: Path, where: str = "") -> R:
    """The record in `content`, which was read from `path`; `where` in the file it was, as a prefix for the message.

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
    """`parse_record` for content that needs no model per line, such as thousands of journal lines.

    Raises:
        DamagedFile: it does not match `adapter`.
    """
    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError as exc:
        raise damage(exc, content, path, where) from exc


def refuse_newer(format_number: int, path: Path) -> None:
    """Refuse a file whose format this version does not know.

    Raises:
        NewerFormat: naming both numbers.
    """
    if format_number > FORMAT:
        raise NewerFormat(path, format_number, FORMAT)


def damage(exc: ValidationError, content: bytes, path: Path, where: str) -> DamagedFile:
    """The error for content that a model refused: a later version wrote it, or it is damaged."""
    # A later version may have changed keys, so its number counts more than the key that this version misses.
    format_number = _format_of(content)
    if format_number > FORMAT:
        return NewerFormat(path, format_number, FORMAT)
    return DamagedFile(path, f"is damaged: {where}{_explain(exc, content)}")


def _format_of(content: bytes) -> int:
    """The format number in content of any kind; 1 if it has none."""
    try:
        values = json.loads(content)
    # Python's parser gives up on content such as 100,000 opening brackets with a RecursionError.
    except (ValueError, RecursionError):
        return 1
    number = values.get("format") if isinstance(values, dict) else None
    return number if isinstance(number, int) else 1


def _explain(exc: ValidationError, content: bytes) -> str:
    """One clause about the first error."""
    if not content.strip():
        return "it is empty"
    # {"loc": ("runs", 0), "msg": "Input should be a valid string", …} -> the key 'runs.0' should be a valid string
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


def unreadable(path: Path, exc: OSError) -> DamagedFile:
    """The error for a file that the operating system does not let us read."""
    advice = "Remove it, or restore the file" if path.is_dir() else "Check its permissions, or restore it from a copy"
    return DamagedFile(path, f"cannot be read ({exc.strerror or exc})", f"{advice}, and run the same command again.")
