"""Every file name below the root and the cache; `train.store.storage` holds the ways to write and read them.

Light on purpose: the launcher imports it on the login node.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
        """What the run computed, a line per step and evaluation; the same bytes however often the job was interrupted."""
        return self.path / "journal.jsonl"

    @property
    def pace(self) -> Path:
        """How fast it was computed (clock time, tokens per second, memory): differs from attempt to attempt.

        The first line of an attempt also says how long the process took until its first step, and what it did in that time.
        """
        return self.path / "pace.jsonl"

    @property
    def samples(self) -> Path:
        """What the run answers to a few held-out prompts, a line per evaluation; the same bytes, as in `journal`."""
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
        """Why the process that holds the lease was asked to stop. Its successor reads it if the process is killed before its end."""
        return self.path / "stop.json"

    @property
    def mirror_online(self) -> Path:
        """Up to which step W&B's server has this run."""
        return self.path / "mirror-online.json"

    @property
    def mirror_offline(self) -> Path:
        """Up to which step W&B's offline folders have this run."""
        return self.path / "mirror-offline.json"

    def mirror_lease(self, way: str) -> Path:
        """Who mirrors this run now, ``online`` or ``offline``."""
        return self.path / f"mirror-{way}-lease.json"

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
        """Steps that have a checkpoint folder, ascending; a folder may be damaged (`train.trainer.checkpoint`)."""
        # Eight digits, so that a shell lists the folders in the order of their steps: step-00000040, step-00000100.
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
    def activity(self) -> Path:
        """What the job does now other than steps: evaluating, loading; meaningless once its process has ended."""
        return self.path / "activity.json"

    @property
    def mirror_log(self) -> Path:
        """The log of the mirror to W&B, of every attempt."""
        return self.path / "mirror.log"

    @property
    def rendezvous(self) -> Path:
        """Where the processes of a job find each other."""
        return self.path / "rendezvous.json"

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
        """What every task runs, pickled. submitit names it by the job's id; this one also works if the launcher died before that."""
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
    def report_record(self) -> Path:
        """Which arrays the newest job of that kind waits for; written once it is in the queue."""
        return self.report_job / "report.json"

    @property
    def wandb(self) -> Path:
        """W&B's own folder of offline runs."""
        return self.path / "wandb"

    @property
    def report(self) -> Path:
        """The self-contained report."""
        return self.path / "report.html"

    @property
    def dashboard(self) -> Path:
        """Which W&B workspace shows this sweep."""
        return self.path / "dashboard.json"

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
    """What is downloaded or derived once and shared by every sweep: models and tokenized data."""

    path: Path

    def model(self, key: str) -> Path:
        """Folder of a downloaded or converted model, complete if it exists."""
        return self.path / "models" / key

    def model_lock(self, key: str) -> Path:
        """Held by the process that prepares the model, so that others wait for it instead of doing the same."""
        return self.path / "models" / f"{key}.lock"

    def download(self, key: str) -> Path:
        """Folder of a model's files while they are downloaded: files from before an interruption are not downloaded again."""
        return self.path / "downloads" / key

    def facts(self, key: str) -> Path:
        """What was measured of an architecture (`train.model.facts`)."""
        return self.path / "facts" / f"{key}.json"

    def base(self, key: str) -> BaseDir:
        """A base model as jobs load it, quantized; complete if it exists. Its modification time is that of its last use."""
        return BaseDir(self.path / "bases" / key)

    def base_lock(self, key: str) -> Path:
        """Held by the process that quantizes the base."""
        return self.path / "bases" / f"{key}.lock"

    @property
    def compiled(self) -> Path:
        """Folder of compiled kernels; the compilers name the files in it."""
        return self.path / "compiled"

    def tokens(self, key: str) -> Path:
        """Folder of tokenized data (`TokensDir`), complete if it exists."""
        return self.path / "tokens" / key


@dataclass(frozen=True)
class BaseDir:
    """The files of a quantized base: ``cache/bases/<key>/``."""

    path: Path

    @property
    def about(self) -> Path:
        """What the key stands for, so that users can tell which folder they may delete."""
        return self.path / "about.json"

    @property
    def weights(self) -> Path:
        """The tensors."""
        return self.path / "base.safetensors"


@dataclass(frozen=True)
class TokensDir:
    """The files of tokenized data: ``cache/tokens/<key>/``."""

    path: Path

    @property
    def stats(self) -> Path:
        """Counts of rows and tokens, for the user and the forecast."""
        return self.path / "facts.json"

    def array(self, table: str, part: str) -> Path:
        """One array (``tokens``, ``labels``, ``offsets``) of one table (``train``, ``eval``)."""
        return self.path / f"{table}-{part}.npy"
