"""Files that grow by a line per record (``.jsonl``): journal, pace, samples and attempts.

A reader may meet a file while its writer is at work, or after the writer was killed. Both leave at most one incomplete line, the last
one. It counts as not written, and the next writer cuts it off (`train.store.storage.append_lines`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from train.errors import DamagedFile
from train.store.record_file import FORMAT, LineRecord, parse_record, read_content, unreadable
from train.store.storage import append_lines

L = TypeVar("L", bound=LineRecord)


def append_records(path: Path, records: Sequence[LineRecord]) -> None:
    """Append a line per record; the first line of a file also gets the format.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    # Only the keys that were set: optional ones, such as what the start of an attempt took, are left out instead of null.
    lines = [record.model_dump(mode="json", exclude_unset=True) for record in records]
    if lines and not _has_content(path):
        lines[0] = {"format": FORMAT} | lines[0]
    append_lines(path, lines)


def read_records(path: Path, kind: type[L]) -> list[L]:
    """Every whole line of a growing file; none if there is no file.

    Raises:
        DamagedFile: a line is not a `kind`.
    """
    content = read_content(path) or b""
    return [
        parse_record(line, kind, path, f"line {number}: ")
        for number, line in enumerate(whole_lines(content, path), start=1)
    ]


def read_first(path: Path, kind: type[L]) -> L | None:
    """The first whole line of a growing file, without reading the rest; None if there is none.

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
    """The last whole line of a growing file, reading its last `tail_bytes` alone; None if there is none.

    Raises:
        DamagedFile: it is not a `kind`.
    """
    lines = tail_lines(path, tail_bytes)
    return parse_record(lines[-1], kind, path, "near its end: ") if lines else None


def whole_lines(content: bytes, path: Path) -> list[bytes]:
    """The lines of a growing file up to the last line end.

    Raises:
        DamagedFile: the rest is not the beginning of a record, so no killed writer left it.
    """
    # b'{"step":1}\n{"step":2}\n{"st': the last line end is at 21, so end = 22, and b'{"st' is the torn line.
    # Without any line end rfind gives -1, so end = 0: there is no whole line.
    end = content.rfind(b"\n") + 1
    # A torn line begins like a record. A power cut can also leave zeros: the file had grown, but its bytes had not arrived.
    if content[end : end + 1] not in {b"", b"{", b"\0"}:
        raise DamagedFile(path, "is damaged: its last line is not JSON")
    return content[:end].splitlines()


def first_line(path: Path) -> bytes | None:
    """The first whole line of a growing file; None if there is none.

    Raises:
        DamagedFile: it cannot be read, or its only line is torn and does not begin like a record.
    """
    try:
        with path.open("rb") as file:
            # A file with one torn line gives that line without its end, so `whole_lines` drops it.
            lines = whole_lines(file.readline(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise unreadable(path, exc) from exc
    return lines[0] if lines else None


def tail_lines(path: Path, tail_bytes: int = 4096) -> list[bytes]:
    """The whole lines in the last `tail_bytes` of a growing file, without reading the rest.

    Raises:
        DamagedFile: it cannot be read, or its end is not the beginning of a record.
    """
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - tail_bytes)
            file.seek(start)
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if start > 0:
        # The first line of the tail may have begun before it: of b'p":1}\n{"step":2}\n' only b'{"step":2}\n' is kept.
        content = content.partition(b"\n")[2]
    return whole_lines(content, path)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        # There is no file yet, or it cannot be reached. In that case appending raises next.
        return False
