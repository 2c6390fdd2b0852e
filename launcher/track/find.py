"""Find the sweeps and runs below a root, by what the user types: a name, a unique part of one, or nothing for the newest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from train.errors import BadInput
from train.store.layout import RunDir, SweepDir
from train.store.storage import readable

MOST_LISTED = 12

Folder = TypeVar("Folder", bound=SweepDir | RunDir)


def sweeps(root: Path) -> list[SweepDir]:
    """Every sweep below `root`, the newest first.

    Raises:
        BadInput: the user may not look there.
    """
    with readable(root):
        folders = [SweepDir(path) for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted((sweep for sweep in folders if sweep.plans.is_dir() or sweep.runs()), key=submitted_at, reverse=True)


def submitted_at(sweep: SweepDir) -> float:
    """When the sweep was last submitted, Unix time."""
    plans = [plan.stat().st_mtime for plan in sweep.plans.glob("*.json")]
    return max(plans, default=sweep.path.stat().st_mtime)


def find_sweep(root: Path, part: str) -> SweepDir:
    """The sweep that `part` means, the newest if it is empty.

    Raises:
        BadInput: there is none, or more than one.
    """
    return _pick("sweep", root, part, sweeps(root))


def find_run(root: Path, part: str, *, finished: bool = False) -> RunDir:
    """The run that `part` means, the newest if it is empty. `part` may be ``sweep/run`` or a run id.

    finished: look only at finished runs.

    Raises:
        BadInput: there is none, or more than one.
    """
    runs = [run for run in _all_runs(root) if not finished or run.result.exists()]
    return _pick("finished run" if finished else "run", root, part, runs)


def find_runs(root: Path, part: str) -> list[RunDir]:
    """The runs of the sweep that `part` means, or the one run; those of the newest sweep if it is empty.

    Raises:
        BadInput: there is none, or more than one.
    """
    folders: list[SweepDir | RunDir] = [*sweeps(root), *_all_runs(root)]
    folder = _pick("sweep or run", root, part, folders)
    return folder.runs() if isinstance(folder, SweepDir) else [folder]


def sweep_summary(sweep: SweepDir) -> dict[str, Any]:
    """A sweep in one row: runs, finished runs, when it was last submitted (Unix time), and how much disk it takes."""
    runs = sweep.runs()
    return {
        "name": sweep.path.name,
        "runs": len(runs),
        "done": sum(run.result.exists() for run in runs),
        "submitted": submitted_at(sweep),
        "bytes": sum(path.lstat().st_size for path in sweep.path.rglob("*") if path.is_file()),
    }


def _all_runs(root: Path) -> list[RunDir]:
    """Every run below `root`, those of the newest sweep first."""

    def submitted(run: RunDir) -> float:
        return run.config.stat().st_mtime

    return [run for sweep in sweeps(root) for run in sorted(sweep.runs(), key=submitted, reverse=True)]


def _pick(kind: str, root: Path, part: str, folders: Sequence[Folder]) -> Folder:
    """The only folder of that name, or else the only one whose name contains `part`."""
    if not folders:
        raise BadInput(
            f"There is no {kind} below {root}; start one with 'python -m launcher sweep=rank', or give root=."
        )
    if not part:
        return folders[0]
    exact = [folder for folder in folders if part in (_label(folder), *_own_names(folder))]
    matches = exact or [folder for folder in folders if _has_part(folder, part)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise BadInput(f"No {kind} below {root} is called {part!r}; choose from {_listing(folders)}.")
    raise BadInput(f"{part!r} fits more than one {kind}; say which: {_listing(matches)}.")


def _has_part(folder: SweepDir | RunDir, part: str) -> bool:
    """Whether `part` is in ``sweep/run`` if it has a slash, else in the folder's own name."""
    return part in (_label(folder) if "/" in part else folder.path.name)


def _own_names(folder: SweepDir | RunDir) -> list[str]:
    own = [folder.path.name]
    return own if isinstance(folder, SweepDir) else [*own, folder.name, folder.id]


def _label(folder: SweepDir | RunDir) -> str:
    """A name that is unique below a root."""
    return folder.path.name if isinstance(folder, SweepDir) else f"{folder.path.parent.name}/{folder.path.name}"


def _listing(folders: Sequence[Folder]) -> str:
    more = len(folders) - MOST_LISTED
    return ", ".join(map(_label, folders[:MOST_LISTED])) + (f" and {more} more" if more > 0 else "")
