"""What the machine needs: Debian's packages, host names for the nodes, and a user to submit as."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slurm.nodes import NODES

PACKAGES = ("slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server")
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db", "unshare")
# sbin is not on every user's PATH.
SYSTEM_FOLDERS = os.pathsep.join(["/usr/sbin", "/usr/bin", "/sbin", "/bin"])
POLICY = Path("/usr/sbin/policy-rc.d")
HOSTS = Path("/etc/hosts")


class CannotInstall(Exception):
    """The cluster cannot be installed here; the text says why."""


def install() -> None:
    """Install what is missing, and add the nodes to /etc/hosts.

    Raises:
        CannotInstall: not root, no apt-get, or the packages cannot be downloaded.
    """
    if os.geteuid() != 0:
        raise CannotInstall("slurm/cluster starts daemons and changes users, so it has to be run as root.")
    if missing_programs():
        _install_packages()
    known = HOSTS.read_text()
    new = [f"127.0.0.1 {node.name}\n" for node in NODES if f" {node.name}\n" not in known]
    if new:
        with HOSTS.open("a") as hosts:
            hosts.writelines(new)


def make_user(name: str) -> None:
    """Add the ordinary user that submits jobs. The account stays after `down`, because files may belong to it."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", name], check=True)


def missing_programs() -> list[str]:
    """The programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_FOLDERS) is None]


def _install_packages() -> None:
    if shutil.which("apt-get") is None:
        raise CannotInstall(f"apt-get is missing here, so these packages cannot be installed: {' '.join(PACKAGES)}.")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    options = ["--yes", "--quiet", "--no-install-recommends"]
    with _services_stay_down():
        subprocess.run(["apt-get", "update", "--quiet"], env=environment, capture_output=True, check=False)
        answer = subprocess.run(
            ["apt-get", "install", *options, *PACKAGES], env=environment, capture_output=True, text=True, check=False
        )
    if answer.returncode != 0 or missing_programs():
        raise CannotInstall(f"apt-get install {' '.join(PACKAGES)} failed: {answer.stderr.strip()[-600:]}")


@contextmanager
def _services_stay_down() -> Iterator[None]:
    """Keep Debian from starting the services of the packages that it installs; the cluster starts its own."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
