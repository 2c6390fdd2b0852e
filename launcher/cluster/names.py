"""What a sweep's jobs are called. By these names they are found and cancelled, so no other sweep's jobs may ever have them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from train.store.layout import SweepDir
from train.store.storage import read_json


@dataclass(frozen=True)
class JobNames:
    """The names of the jobs of the sweep called `sweep`; `key` tells it from its namesakes."""

    sweep: str
    key: str

    def token(self, packs: Sequence[str]) -> str:
        """Eight hexadecimal digits for the array of these packs; a sweep uses no pack id twice."""
        return _digits(self.key, *packs)

    def array(self, packs: Sequence[str]) -> str:
        """What the array of these packs is called."""
        return f"{self.sweep}.{self.token(packs)}"

    @property
    def report(self) -> str:
        """What the job is called that writes the report."""
        return f"{self.sweep}.report.{self.key}"


def job_names(sweep: SweepDir) -> JobNames:
    """The names for a sweep's jobs, by its folder and by when its first plan was accepted: the same for as long as the folder is
    not deleted, other ones for a namesake elsewhere, or for one that is submitted again after it was deleted."""
    first = read_json(sweep.plans / "1.json") or {}
    return JobNames(sweep.path.name, _digits(str(sweep.path.resolve()), str(first.get("accepted"))))


def _digits(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
