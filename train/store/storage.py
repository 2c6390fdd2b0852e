"""How files are written and read back, and what the operating system's errors mean to the user.

A file that exists is complete: it is written under a temporary name in the same folder, flushed to the disk, and renamed. Files that
grow (`append_lines`) are read up to their last whole line. Folders are private (0700, files 0600).

Light on purpose: the launcher imports it on the login node.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.errors import BadInput, StorageError

Record = dict[str, Any]

# How Rust's libraries (safetensors, tokenizers) write an error of the operating system: "No space left on device (os error 28)".
RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` so that `path` holds either all of it or what it held before; if `durable`, also after a power cut.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                # Before the rename: after a power cut the new name must not stand for content that never reached the disk.
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        # The name itself is content of the folder.
        if durable:
            sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for one JSON document; NaN and infinity are refused because JSON has neither."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_note(path: Path, value: Any) -> None:
    """`write_json` for what is worthless after a power cut: it is not flushed, which spares a shared file system the work."""
    write_bytes(path, json.dumps(value, allow_nan=False).encode(), durable=False)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when it is complete, or not at all.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        try:
            make_folder(temporary)
            yield temporary
            # Content before names, here too: every file, then the folder that names them, then, after the rename, its parent.
            for file in temporary.rglob("*"):
                sync_folder(file)
            sync_folder(temporary)
            # A folder cannot be renamed over one that holds files, so the old one is moved away first. A kill between the two renames
            # leaves no folder at `path`, which readers take for one that was never written.
            if path.exists():
                retired = temporary.with_suffix(".old")
                os.replace(path, retired)
                os.replace(temporary, path)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)


def append_lines(path: Path, records: list[Record]) -> None:
    """Append one JSON line per record, and flush them to the disk: all of them, or none if the disk refuses.

    A torn line that a killed writer left at the end is cut off first. For example, of ``{"step":1}\\n{"st`` the first 11 bytes stay,
    and the new lines follow them.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    content = "".join(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n" for record in records).encode()
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            end = _whole_lines(handle)
            try:
                # A write may take only a part: on a disk that is nearly full, or if a signal comes.
                while content:
                    content = content[os.write(handle, content) :]
                os.fsync(handle)
            except OSError:
                # A device such as /dev/full cannot be cut. The first error is the one to report.
                with suppress(OSError):
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def _whole_lines(handle: int, block_bytes: int = 1 << 16) -> int:
    """Cut a torn last line off an open file; the file's length after that."""
    size = os.fstat(handle).st_size
    # The usual case costs one byte: the file ends with a line end.
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return size
    # Backwards in blocks, since the torn line may be longer than one. Of 100,000 bytes the last block of 65,536 begins at 34,464. If
    # its last line end is at 65,000 of the block, end = 34,464 + 65,000 + 1 = 99,465. Without any line end, nothing is left.
    start = size
    end = 0
    while start > 0 and end == 0:
        start = max(0, start - block_bytes)
        line_end = os.pread(handle, block_bytes, start).rfind(b"\n")
        end = start + line_end + 1 if line_end >= 0 else 0
    os.ftruncate(handle, end)
    return end


def read_json(path: Path) -> Any:
    """The JSON document at `path`; None if there is no file.

    Raises:
        StorageError: it is damaged. This project writes whole files only, so another program did it (a copy to a full disk, say).
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as exc:
        raise StorageError(
            f"{path} is damaged: it is not valid JSON ({exc}). Restore it, or remove it and run the same command again."
        ) from exc


def make_folder(path: Path) -> Path:
    """Create `path` and its missing parents, private to the user.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    with storage_errors(path):
        # Not mkdir(parents=True), which would create the parents with the default permissions.
        for folder in [*reversed(path.parents), path]:
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
    return path


def local_path(text: str) -> Path:
    """The absolute path that the user means by `text`.

    Raises:
        BadInput: it begins with the home of a user that does not exist.
    """
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as exc:
        raise BadInput(
            f"{text!r} begins with a home folder that cannot be found ({exc}); write the path in full."
        ) from exc


def named_folder(key: str, text: str) -> Path:
    """The absolute path of the folder that the user gave as ``key=text``.

    Raises:
        BadInput: it is empty, which would mean the current folder; a part of it is a file; or see `local_path`.
    """
    if not text.strip():
        raise BadInput(f"{key}= is empty; name a folder, {key}=. for this one, or leave it out.")
    folder = local_path(text)
    for parent in folder.parents:
        with readable(parent):
            if parent.exists() and not parent.is_dir():
                raise BadInput(
                    f"{key}={text}: {parent} is not a folder, so nothing can be created below it; choose another {key}=."
                )
    return folder


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Translate the operating system's errors in reading a file or folder that the user named.

    Raises:
        BadInput: saying which, and why.
    """
    try:
        yield
    except OSError as exc:
        raise BadInput(f"{path} cannot be read: {exc.strerror or exc}; check the path and its permissions.") from exc


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Translate the operating system's errors in writing at `path`.

    safetensors and tokenizers raise exceptions of their own, with the error number in the text.

    Raises:
        StorageError: saying what, where and what to do next.
    """
    advice = {
        errno.ENOSPC: "the disk is full; free some space, or choose another root= or cache=",
        errno.EDQUOT: "your quota is used up; free some space, or choose another root= or cache=",
        errno.EROFS: "the file system is read-only; choose another root= or cache=",
        errno.EACCES: "you may not write there; choose another root= or cache=",
        errno.EIO: "the disk answers with errors; ask the administrator",
        errno.ENOENT: "its folder is gone; run the same command again to create it",
        errno.ENOTDIR: "a part of that path is a file; choose another root= or cache=",
        errno.ENAMETOOLONG: "a name in that path is too long; choose another root= or cache=",
        errno.ESTALE: "the network file system lost the folder; try again",
    }
    try:
        yield
    except Exception as exc:
        rust_error = RUST_ERROR.search(str(exc))
        code = exc.errno if isinstance(exc, OSError) else int(rust_error[1]) if rust_error else None
        # Any other error is a defect, or has its own meaning: it passes as it is.
        if code not in advice:
            raise
        raise StorageError(f"{path} could not be written: {advice[code]}.") from exc


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (or a file's content) to the disk."""
    # A folder can only be opened for reading, and that is enough to flush it.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
