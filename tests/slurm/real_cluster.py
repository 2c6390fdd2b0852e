"""A handle on the real Slurm of ``slurm/cluster`` for tests: submit as an ordinary user, change settings, break things."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

from slurm.daemons import client, end, environment, start_time, wait_until
from slurm.nodes import PARTITIONS, URGENT
from slurm.program import CANNOT_INSTALL
from slurm.settings import Folder, Record, Settings, read_record

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = ("launcher", "train", "conf")
DEBIAN_PYTHON = "/usr/bin/python3"
IMPORTS = "import torch, transformers, submitit, hydra"


class NotUsable(Exception):
    """The ordinary user cannot run the project's Python here; the text says why."""


class NoCluster(Exception):
    """Slurm cannot be installed on this machine; the text says why."""


class Cluster:
    """The running cluster. Times in seconds; job ids as Slurm prints them (``12`` or ``12_3``)."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.readable = Path(tempfile.mkdtemp(prefix="lorapack-tests-", dir="/var/tmp"))
        self.readable.chmod(0o755)
        self.settings = Settings()
        self._python: tuple[str, str] | None = None
        self.set()

    def set(self, **settings: int | bool | str) -> None:
        """Bring the cluster to its usual settings but these, e.g. ``set(grace=0, kill_wait=5)``; jobs go on."""
        self.settings = replace(Settings(), **settings)
        box(self.folder, "up", *arguments(self.settings))

    def reset(self) -> None:
        """The usual settings, every daemon alive, no job in the queue."""
        self.set()
        self.cancel_all()

    def close(self) -> None:
        """End it, and remove what was made."""
        box(self.folder, "down")
        shutil.rmtree(self.folder.path)
        shutil.rmtree(self.readable)

    # what Slurm says

    def ask(self, *command: str, check: bool = True) -> str:
        """What one of Slurm's commands answers root, stripped."""
        return client(self.folder, *command, check=check).stdout.strip()

    def state(self, job: str) -> str:
        """The state in squeue's long form, ``GONE`` where squeue does not list the job (any more)."""
        rows = self.ask("squeue", "--noheader", "--states=all", "--array", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows).get(job, "GONE")

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``, e.g. ``Restarts``."""
        text = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in text.split())[name]

    def wait(self, what: str, ready: Callable[[], object], seconds: float = 60.0) -> None:
        """Wait until `ready` is true; the failure shows the queue and the end of the controller's log."""
        wait_until(what, lambda: bool(ready()), self.folder.log("slurmctld"), seconds)

    def wait_for(self, job: str, *states: str, seconds: float = 60.0) -> None:
        """Wait until a job is in one of `states`."""
        self.wait(f"job {job} {' or '.join(states)}", lambda: self.state(job) in states, seconds)

    @contextmanager
    def commands(self) -> Iterator[None]:
        """Let the launcher's own functions, called in the test's process, ask this cluster as its user."""
        changed = environment(self.folder)
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            with mock.patch("os.getuid", return_value=pwd.getpwnam(self.user).pw_uid):
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    # what users do

    @property
    def user(self) -> str:
        """The ordinary user's name."""
        return self.settings.user

    def as_user(
        self, *command: str, cwd: Path | None = None, check: bool = True, umask: int = 0o022, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the ordinary user, in `cwd` (default: his home), with further environment `variables`."""
        process = self.start_as_user(*command, cwd=cwd, umask=umask, **variables)
        out, err = process.communicate(timeout=240)
        if check and process.returncode != 0:
            raise AssertionError(f"{' '.join(command)} ended with {process.returncode}\n{out}\n{err}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def start_as_user(
        self, *command: str, cwd: Path | None = None, umask: int = 0o022, **variables: str
    ) -> subprocess.Popen[str]:
        """The same, still running; stdout and stderr are pipes."""
        home = Path(f"~{self.user}").expanduser()
        cleared = {"XDG_CACHE_HOME", "PYTHONPATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES"}
        kept = {name: value for name, value in environment(self.folder).items() if name not in cleared}
        return subprocess.Popen(
            ["runuser", "-u", self.user, "--", *command],
            cwd=cwd or home,
            env=kept | {"HOME": str(home), "USER": self.user, "LOGNAME": self.user} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=umask,
        )

    def submit(self, shell: str, *options: str) -> str:
        """Submit a shell command as the ordinary user; the job's id."""
        words = ("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={shell}")
        return self.as_user(*words).stdout.strip()

    def project(self, name: str) -> Path:
        """A copy of the project, the ordinary user's own: to run the launcher in, and to break."""
        place = self.readable / name
        place.mkdir(mode=0o755)
        for folder in PROJECT:
            shutil.copytree(REPOSITORY / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chown", "-R", f"{self.user}:", str(place)], check=True)
        return place

    def launcher(
        self, project: Path, *words: str, check: bool = True, umask: int = 0o022, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """``python -m launcher WORDS`` as the ordinary user in his copy of the project."""
        command, settings = self.python(project)
        return self.as_user(*command, "-m", "launcher", *words, cwd=project, check=check, umask=umask,
                            **settings | variables)  # fmt: skip

    def python(self, project: Path) -> tuple[list[str], dict[str, str]]:
        """The interpreter that the ordinary user can run, and the environment that gives it project and packages.

        Raises:
            NotUsable: there is none.
        """
        if self._python is None:
            self._python = self._find_python()
        program, packages = self._python
        path = os.pathsep.join(filter(None, [str(project), packages]))
        return [program], {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    # what befalls a cluster

    def urgent(self, node: str, seconds: int = 3) -> str:
        """An urgent job that takes a whole node for some seconds, pushing out what runs there; its id."""
        wanted = (f"--partition={URGENT}", f"--nodelist={node}", "--exclusive", "--time=10")
        return self.submit(f"sleep {seconds}", *wanted)

    def kill_daemon(self, name: str) -> None:
        """SIGKILL to a daemon: ``slurmctld``, ``slurmdbd``, ``slurmd-t4-1``…"""
        pid, _ = self._record().pids[name]
        os.kill(pid, 9)
        self.wait(f"the end of {name}", lambda: start_time(pid) is None, 10)

    def wait_until_kept(self, job: str) -> None:
        """Wait until the controller has written down what it knows of a job, which takes it up to 5 s: killed before, it forgets that
        a job has begun, and starts it anew.
        """
        began = time.time()
        self.ask("scontrol", "update", f"jobid={job}", "admincomment=kept")
        kept = self.folder.state / "job_state"
        self.wait(f"job {job} in {kept}", lambda: kept.exists() and kept.stat().st_mtime > began, 20)

    def stop_daemon(self, name: str) -> None:
        """SIGTERM to a daemon, until it is gone."""
        end([self._record().pids[name][0]])

    def restart(self, name: str) -> None:
        """Start a daemon again, after ending it if it runs; returns when it answers."""
        box(self.folder, "restart", name)

    def cancel_all(self) -> None:
        """End every job, as an administrator."""
        for partition in (*PARTITIONS, URGENT):
            self.ask("scancel", f"--partition={partition}")
        self.wait("an empty queue", lambda: self.ask("squeue", "--noheader") == "")

    def _record(self) -> Record:
        record = read_record(self.folder)
        assert record is not None
        return record

    def _find_python(self) -> tuple[str, str]:
        """This interpreter, or Debian's of the same version with this one's packages, whichever the user may run."""
        if self._works([sys.executable], ""):
            return sys.executable, ""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        packages = Path(sys.prefix) / "lib" / f"python{version}" / "site-packages"
        for place in (packages, self.readable / "site-packages"):
            # Below a folder that he may not enter: linked, not copied, where one disk has both.
            if place != packages:
                linked = subprocess.run(["cp", "-al", str(packages), str(place)], capture_output=True, check=False)
                if linked.returncode != 0:
                    shutil.copytree(packages, place, dirs_exist_ok=True)
            if self._works([DEBIAN_PYTHON], str(place)):
                return DEBIAN_PYTHON, str(place)
        raise NotUsable(
            f"user {self.user} can run neither {sys.executable} nor {DEBIAN_PYTHON} with the packages of {packages}. "
            f"Make the environment from an interpreter that everybody may run: make PYTHON={DEBIAN_PYTHON}."
        )

    def _works(self, command: Sequence[str], packages: str) -> bool:
        version = f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}; {IMPORTS}"
        return self.as_user(*command, "-c", version, check=False, PYTHONPATH=packages).returncode == 0


def box(folder: Folder, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The program ``slurm/cluster``.

    Raises:
        NoCluster: Slurm cannot be installed here.
    """
    command = [sys.executable, str(REPOSITORY / "slurm" / "cluster"), *words, "--folder", str(folder.path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if answer.returncode == CANNOT_INSTALL:
        raise NoCluster(answer.stderr)
    assert not check or answer.returncode == 0, answer.stderr
    return answer


def arguments(settings: Settings) -> list[str]:
    """The settings as ``slurm/cluster up`` takes them."""
    words = []
    for name, value in asdict(settings).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words.append(f"--{option}={value}")
    return words


def cluster_folder() -> Folder:
    """A new run folder that every user may enter."""
    path = Path(tempfile.mkdtemp(prefix="lorapack-slurm-", dir="/var/tmp"))
    path.chmod(0o755)
    return Folder(path)
