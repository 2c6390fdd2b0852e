"""Every file name below the root and the cache, and the only ways in which files come to exist.

A file that exists is complete: it is written beside its place, flushed to the disk with its folder, and renamed. Logs that
grow (`append_lines`) are read up to their last whole line. Folders are private (0700, files 0600).

Light on purpose: the launcher imports it on the login node.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import BadInput, StorageError

Record = dict[str, Any]


@dataclass(frozen=True)
class RunDir:
    """The files of one run: ``runs/<sweep>/<run-name>-<run-id>/``."""

    path: Path

    @property
    def config(self) -> Path:
        """The fully resolved `RunConfig`, YAML."""
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        """What the run computed, a line per step and evaluation; the same bytes whatever happened to the job."""
        return self.path / "journal.jsonl"

    @property
    def pace(self) -> Path:
        """How fast it was computed (clock time, tokens per second, memory): differs from attempt to attempt."""
        return self.path / "pace.jsonl"

    @property
    def samples(self) -> Path:
        """What the run answers to a few held-out prompts, a line per evaluation; the same bytes whatever happened to the job."""
        return self.path / "samples.jsonl"

    @property
    def attempts(self) -> Path:
        """A line per ended attempt with its cause."""
        return self.path / "attempts.jsonl"

    @property
    def lease(self) -> Path:
        """Who trains this run now; its modification time is the heartbeat."""
        return self.path / "lease.json"

    @property
    def stop_note(self) -> Path:
        """Why the process that holds the lease was asked to stop, for its successor should it be killed before it can say so."""
        return self.path / "stop.json"

    @property
    def mirror(self) -> Path:
        """How far W&B has this run."""
        return self.path / "mirror.json"

    @property
    def mirror_lease(self) -> Path:
        """Who sends this run to W&B now."""
        return self.path / "mirror-lease.json"

    @property
    def cancel_request(self) -> Path:
        """Exists while the user wants this run to stop; the training loop polls it."""
        return self.path / "cancel.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending; whether it is sound only reading it tells."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-????????"))

    @property
    def adapter(self) -> Path:
        """Folder that `peft.PeftModel.from_pretrained` loads."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Folder of the merged model, made by ``merge``."""
        return self.path / "merged"

    @property
    def result(self) -> Path:
        """Written last: it exists only if the run is done."""
        return self.path / "result.json"

    @property
    def id(self) -> str:
        """The run id at the end of the folder's name."""
        return self.path.name.rpartition("-")[2]

    @property
    def name(self) -> str:
        """The folder's name without the run id."""
        return self.path.name.rpartition("-")[0]


@dataclass(frozen=True)
class PackDir:
    """The files of one job: ``runs/<sweep>/jobs/<pack-id>/``."""

    path: Path

    @property
    def pack(self) -> Path:
        """What the job trains: sweep folder, cache and run folders."""
        return self.path / "pack.json"

    @property
    def job(self) -> Path:
        """Which job was submitted for it, and when."""
        return self.path / "job.json"

    @property
    def mirror_log(self) -> Path:
        """What the mirror to W&B had to say, of every attempt."""
        return self.path / "mirror.log"

    @property
    def submitit(self) -> Path:
        """submitit's own folder, with stdout and stderr of every attempt."""
        return self.path / "submitit"


@dataclass(frozen=True)
class ArrayDir:
    """The files of one array of jobs on Slurm: ``runs/<sweep>/arrays/<token>/``."""

    path: Path

    @property
    def record(self) -> Path:
        """Which packs it trains, in the order of its tasks; written before it is submitted, and again once its id is known."""
        return self.path / "array.json"

    @property
    def submitit(self) -> Path:
        """submitit's own folder, with stdout and stderr of every attempt of every task."""
        return self.path / "submitit"

    @property
    def callable(self) -> Path:
        """What every task runs, pickled: a task starts from it even if its launcher died before it could name it by the job's id."""
        return self.submitit / "task.pkl"


@dataclass(frozen=True)
class SweepDir:
    """The files of one sweep: ``runs/<sweep>/``."""

    path: Path

    @property
    def lease(self) -> Path:
        """Which launcher submits to this sweep and watches it now."""
        return self.path / "lease.json"

    @property
    def plans(self) -> Path:
        """Folder of the accepted plans, ``<n>.json`` from 1."""
        return self.path / "plans"

    @property
    def code(self) -> Path:
        """Folder of frozen code, a folder per tree hash."""
        return self.path / "code"

    @property
    def jobs(self) -> Path:
        """Folder of packs."""
        return self.path / "jobs"

    @property
    def arrays(self) -> Path:
        """Folder of the arrays that were submitted to Slurm."""
        return self.path / "arrays"

    @property
    def report_job(self) -> Path:
        """submitit's folder of the job that writes the report when the others have ended."""
        return self.path / "report-job"

    @property
    def wandb(self) -> Path:
        """W&B's own folder of offline runs."""
        return self.path / "wandb"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        """Folder of the report's PNG plots."""
        return self.path / "plots"

    def pack(self, pack_id: str) -> PackDir:
        """The folder of one pack."""
        return PackDir(self.jobs / pack_id)

    def array(self, token: str) -> ArrayDir:
        """The folder of one array."""
        return ArrayDir(self.arrays / token)

    def runs(self) -> list[RunDir]:
        """Every run folder, by name."""
        return [RunDir(path.parent) for path in sorted(self.path.glob("*-*/config.yaml"))]


@dataclass(frozen=True)
class CacheDir:
    """What is fetched or derived once and shared by every sweep: models and tokenised data."""

    path: Path

    def model(self, key: str) -> Path:
        """Folder of a fetched or converted model, complete if it exists."""
        return self.path / "models" / key

    def model_lock(self, key: str) -> Path:
        """Held by the process that makes the model, so that others wait for it instead of doing the same."""
        return self.path / "models" / f"{key}.lock"

    def download(self, key: str) -> Path:
        """Folder of a model's files while they are fetched: what arrived before an interruption is not fetched again."""
        return self.path / "downloads" / key

    def base(self, key: str) -> BaseDir:
        """A base model as jobs load it, quantised; complete if it exists."""
        return BaseDir(self.path / "bases" / key)

    def base_lock(self, key: str) -> Path:
        """Held by the process that quantises the base."""
        return self.path / "bases" / f"{key}.lock"

    @property
    def compiled(self) -> Path:
        """Folder of compiled kernels; the compilers name the files in it."""
        return self.path / "compiled"

    def tokens(self, key: str) -> Path:
        """Folder of tokenised data (`TokensDir`), complete if it exists."""
        return self.path / "tokens" / key


@dataclass(frozen=True)
class BaseDir:
    """The files of a quantised base: ``cache/bases/<key>/``."""

    path: Path

    @property
    def about(self) -> Path:
        """What the key stands for, for whoever wants to know which folder may go."""
        return self.path / "about.json"

    @property
    def weights(self) -> Path:
        """The tensors."""
        return self.path / "base.safetensors"


@dataclass(frozen=True)
class TokensDir:
    """The files of tokenised data: ``cache/tokens/<key>/``."""

    path: Path

    @property
    def facts(self) -> Path:
        """Counts of rows and tokens, for the user and the forecast."""
        return self.path / "facts.json"

    def array(self, table: str, part: str) -> Path:
        """One array (``tokens``, ``labels``, ``offsets``) of one table (``train``, ``eval``)."""
        return self.path / f"{table}-{part}.npy"


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either all of it or what it held before, also after a power cut.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for one JSON document; NaN and infinity are refused because JSON has neither."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill beside `path`; it takes `path`'s place complete, or not at all.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        try:
            make_folder(beside)
            yield beside
            for file in beside.rglob("*"):
                sync_folder(file)
            sync_folder(beside)
            if path.exists():
                retired = beside.with_suffix(".old")
                os.replace(path, retired)
                os.replace(beside, path)
                shutil.rmtree(retired)
            else:
                os.replace(beside, path)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync_folder(path.parent)


def append_lines(path: Path, records: list[Record]) -> None:
    """Append one JSON line per record, and flush them to the disk: all of them, or none if the disk refuses.

    A torn line that a killed writer left at the end is cut off first.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    content = "".join(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n" for record in records).encode()
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            end = _whole_lines(handle)
            try:
                while content:
                    content = content[os.write(handle, content) :]
                os.fsync(handle)
            except OSError:
                with suppress(OSError):  # a device cannot be cut; the first error counts
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def _whole_lines(handle: int, tail_bytes: int = 1 << 16) -> int:
    """Cut a torn last line off an open file; its length then."""
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return size
    start = max(0, size - tail_bytes)
    end = start + os.pread(handle, tail_bytes, start).rfind(b"\n") + 1
    os.ftruncate(handle, end)
    return end


def read_json(path: Path) -> Any:
    """The JSON document at `path`, or None where there is none."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def read_lines(path: Path) -> list[Record]:
    """Every whole line of a growing JSON-lines file; a torn last line and a missing file count as nothing."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def read_first_line(path: Path) -> Record | None:
    """The first whole line of a growing JSON-lines file; None where there is none."""
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    record: Record | None = json.loads(line) if line.endswith(b"\n") else None
    return record


def tail_lines(path: Path, tail_bytes: int = 4096) -> list[Record]:
    """The whole lines in the last `tail_bytes` of a growing JSON-lines file, without reading the rest."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - tail_bytes)
            file.seek(start)
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return []
    if start > 0:
        whole = whole.partition(b"\n")[2] if b"\n" in whole else b""
    return [json.loads(line) for line in whole.splitlines()]


def last_line(path: Path) -> Record | None:
    """The last whole line of a growing JSON-lines file, without reading the rest; None where there is none."""
    lines = tail_lines(path)
    return lines[-1] if lines else None


def make_folder(path: Path) -> Path:
    """Make `path` and what lacks above it, private to the user.

    Raises:
        StorageError: the disk is full, read-only or gone.
    """
    with storage_errors(path):
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
        BadInput: it is empty, which would be the present folder, or see `local_path`.
    """
    if not text.strip():
        raise BadInput(f"{key}= is empty; name a folder, {key}=. for this one, or leave it out.")
    return local_path(text)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Translate the operating system's refusals to read a file or folder that the user named.

    Raises:
        BadInput: saying which, and why.
    """
    try:
        yield
    except OSError as exc:
        raise BadInput(f"{path} cannot be read: {exc.strerror or exc}; check the path and its permissions.") from exc


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Translate the operating system's refusals to write at `path`.

    Raises:
        StorageError: saying what, where and what to do next.
    """
    advice = {
        errno.ENOSPC: "the disk is full; free some space, or choose another root= or cache=",
        errno.EDQUOT: "your quota is used up; free some space, or choose another root= or cache=",
        errno.EROFS: "the file system is read-only; choose another root= or cache=",
        errno.EACCES: "you may not write there; choose another root= or cache=",
        errno.EIO: "the disk answers with errors; ask the administrator",
        errno.ENOENT: "its folder is gone; run the same command again to make it anew",
        errno.ENOTDIR: "a part of that path is a file; choose another root= or cache=",
        errno.ENAMETOOLONG: "a name in that path is too long; choose another root= or cache=",
        errno.ESTALE: "the network file system lost the folder; try again",
    }
    try:
        yield
    except OSError as exc:
        if exc.errno not in advice:
            raise
        raise StorageError(f"{path} could not be written: {advice[exc.errno]}.") from exc


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (or a file's content) to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
