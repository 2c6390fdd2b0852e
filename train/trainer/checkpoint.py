"""A run's checkpoints: one folder per saved step, with a manifest. A checkpoint that does not match its manifest is never used.

A checkpoint belongs to a run, not to its pack: its tensors are the run's own, unpadded, so that unfinished runs can be packed
differently later. No pickle (CVE-2025-32434, CVE-2026-24747).

    step-00000040/state.safetensors   weights and AdamW's averages (none at step 0)
    step-00000040/state.json          `Progress`
    step-00000040/MANIFEST.json       size and SHA-256 of the two, written last

Three things protect a checkpoint. A folder gets its name only when it is complete. The manifest finds files that were damaged later.
The newest two are kept, so that a damaged one has a predecessor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from train.errors import DamagedFile, NewerFormat
from train.store.layout import RunDir
from train.store.record_file import FileRecord, parse_record, write_record
from train.store.storage import storage_errors, write_folder, write_json

log = logging.getLogger("lorapack.trainer")

KEPT = 2
TENSORS = "state.safetensors"
NUMBERS = "state.json"
MANIFEST = "MANIFEST.json"


class Progress(FileRecord):
    """The numbers of a run after `step` optimizer steps.

    `journal_bytes` and `samples_bytes` are the lengths of these files at that time: a resume cuts them back to that. `seconds` were
    spent by all attempts so far, `gpu_seconds` is the run's share of its packs' GPUs. `evaluated_step` is the step of the last
    evaluation. `applied`, `good_steps`, `loss_scale` and `alive` are the run's entries of `PackedAdamW`'s tensors of these names.
    """

    step: int
    journal_bytes: int
    tokens: int
    seconds: float
    gpu_seconds: float
    evaluated_step: int | None
    applied: float
    good_steps: float
    loss_scale: float
    alive: bool
    best_eval_loss: float | None
    best_eval_step: int | None
    # Checkpoints of runs from before there were samples lack the key.
    samples_bytes: int = 0


@dataclass(frozen=True)
class ManifestEntry:
    """A file of a checkpoint with its length in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


_MANIFEST = TypeAdapter(list[ManifestEntry])


class OptimizerNumbers(TypedDict):
    """The numbers of `Progress` that belong to the optimizer."""

    applied: float
    good_steps: float
    loss_scale: float
    alive: bool


@dataclass(frozen=True)
class Checkpoint:
    """A run's whole state. That of step 0 has no tensors: they follow from the seed."""

    progress: Progress
    tensors: dict[str, torch.Tensor]


def save_checkpoint(run: RunDir, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and delete all but the newest two.

    Raises:
        StorageError: it could not be written; the earlier ones are unchanged.
    """
    # `write_folder` renames the folder last, so a kill at any line leaves either no checkpoint of this step or a whole one.
    with write_folder(run.checkpoint(checkpoint.progress.step)) as folder, storage_errors(folder):
        if checkpoint.tensors:
            save_file(checkpoint.tensors, folder / TENSORS)
        write_record(folder / NUMBERS, checkpoint.progress)
        # From the files' bytes on the disk, not from what was meant to be written.
        files = [file for file in (folder / TENSORS, folder / NUMBERS) if file.exists()]
        manifest = [ManifestEntry(f.name, f.stat().st_size, _sha256(f.read_bytes())) for f in files]
        write_json(folder / MANIFEST, _MANIFEST.dump_python(manifest))
    # Only now: until the new one has its name, the older ones are needed.
    for old in run.checkpoint_steps()[:-KEPT]:
        shutil.rmtree(run.checkpoint(old))


def load_checkpoint(run: RunDir, step: int) -> Checkpoint | None:
    """The checkpoint of `step`, or None if it does not match its manifest, or the journal does not reach it.

    Raises:
        NewerFormat: a later version wrote it.
    """
    folder = run.checkpoint(step)
    try:
        # Each file is read once: what is checked is what is used.
        contents = {}
        for entry in _MANIFEST.validate_json((folder / MANIFEST).read_bytes(), strict=True):
            content = (folder / entry.name).read_bytes()
            if len(content) != entry.size or _sha256(content) != entry.sha256:
                return None
            contents[entry.name] = content
        progress = parse_record(contents[NUMBERS], Progress, folder / NUMBERS)
        # The journal was cut or restored from an older copy. It could not be continued from here without a gap.
        if run.journal.stat().st_size < progress.journal_bytes:
            return None
        return Checkpoint(progress, load(contents[TENSORS]) if TENSORS in contents else {})
    # It is not damaged, so it must not be set aside.
    except NewerFormat:
        raise
    # Whatever a damaged file can lead to: missing, cut, not JSON, keys or tensors that do not fit.
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, DamagedFile):
        return None


def to_bytes(states: Sequence[Checkpoint | None]) -> bytes:
    """States of several runs as one message: the length of a JSON document, the document, and tensors as safetensors.

    For example two runs, the second of which begins: 8 bytes with 310, ``[{"format": 1, "step": 40, …}, null]`` (310 bytes), and the
    tensors ``0/theta/…``, ``0/exp_avg/…``, ``0/exp_avg_sq/…``.
    """
    numbers = json.dumps([None if state is None else state.progress.model_dump() for state in states]).encode()
    tensors = {f"{i}/{name}": t for i, state in enumerate(states) if state for name, t in state.tensors.items()}
    return len(numbers).to_bytes(8, "little") + numbers + save(tensors)


def from_bytes(message: bytes) -> list[Checkpoint | None]:
    """The inverse of `to_bytes`."""
    # The document ends where the tensors begin: 8 + 310 = 318 in the example.
    end = 8 + int.from_bytes(message[:8], "little")
    tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load(message[end:]).items():
        index, _, name = key.partition("/")
        tensors[index][name] = tensor
    numbers = json.loads(message[8:end])
    return [
        None if n is None else Checkpoint(Progress.model_validate(n), tensors[str(i)]) for i, n in enumerate(numbers)
    ]


def sound_checkpoints(run: RunDir) -> dict[int, Checkpoint]:
    """Every undamaged checkpoint by step. Damaged ones are renamed, and logged as a warning."""
    sound: dict[int, Checkpoint] = {}
    for step in run.checkpoint_steps():
        checkpoint = load_checkpoint(run, step)
        if checkpoint is not None:
            sound[step] = checkpoint
        else:
            aside = _set_aside(run.checkpoint(step))
            log.warning(f"{run.path.name}: the checkpoint of step {step} is damaged; set aside as {aside.name}")
    return sound


def common_step(steps_per_run: list[set[int]]) -> int | None:
    """The newest step of which every run has a checkpoint; None if there is none.

    Runs of a pack that resume at the same step repeat exactly the batches of the uninterrupted job, so that even the last bit is the
    same. From different steps each run is still correct, up to rounding.

    For example, a job of two runs was killed between their saves at step 60: run 0 has {40, 60}, run 1 has {20, 40}. Both resume at
    step 40, and run 0 computes the steps 41 to 60 again. This is why the newest two are kept.
    """
    common = set.intersection(*steps_per_run) if steps_per_run else set()
    return max(common, default=None)


def _set_aside(folder: Path) -> Path:
    # The name no longer begins with "step-", so `checkpoint_steps` does not list it. One from an earlier time gives way.
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
