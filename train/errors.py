"""The family of exceptions that this project raises on purpose.

    LorapackError           exit code 1: something failed
    ├── BadInput            exit code 2: the user's mistake; the message says what, which value, what to do next
    ├── StorageError        the disk is full, read-only or gone
    │   └── DamagedFile     a file is not what it should be: named, with what to do
    │       └── NewerFormat a later version wrote it
    ├── LeaseHeld           another live process trains this run
    └── PeerLost            another process of this job ended

Foreign errors are translated at one seam each, with ``raise … from exc``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from train.store.causes import Cause


class LorapackError(Exception):
    """Base of every error with a message meant for the user; `exit_code` is what the process ends with."""

    exit_code = 1


class BadInput(LorapackError):
    """A mistake in configuration, data or model that the user can correct."""

    exit_code = 2


class StorageError(LorapackError):
    """A file could not be written or read back; `cause` of the attempt is ``storage``."""


class DamagedFile(StorageError):
    """A file that is not what this program writes; `path` is the file, `what` one clause about it."""

    def __init__(
        self, path: Path, what: str, advice: str = "Restore it, or remove it and run the same command again."
    ) -> None:
        super().__init__(f"{path} {what}. {advice}".strip())
        self.path = path


class NewerFormat(DamagedFile):
    """A file of a format that only a later version knows."""

    def __init__(self, path: Path, found: int, known: int) -> None:
        super().__init__(
            path,
            f"was written by a newer lorapack (format {found}, this version knows {known}); upgrade lorapack",
            "",
        )


class LeaseHeld(LorapackError):
    """The run folder belongs to another live process."""


class PeerLost(LorapackError):
    """Another process of this job ended; `cause` is that of its attempt, as far as it could tell."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
