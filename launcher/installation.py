"""Where this program lies: its packages, the configuration files that it ships, and those of the user.

    checkout, frozen code     installed
    conf/                     site-packages/launcher/conf/
    launcher/                 site-packages/launcher/
    train/                    site-packages/train/

Light: the help of the program needs it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

# The folder that holds the packages `launcher` and `train`.
SOURCE_DIR = Path(__file__).resolve().parents[1]

Groups = dict[str, list[str]]


def shipped_conf(source: Path = SOURCE_DIR) -> Path:
    """The configuration files that come with the packages in `source`."""
    # The wheel's place comes first: a folder site-packages/conf would belong to another package.
    in_wheel = source / "launcher" / "conf"
    return in_wheel if in_wheel.is_dir() else source / "conf"


def user_conf() -> Path:
    """Where the user's own configuration files lie: ``conf/`` of the current folder, which need not exist."""
    return Path("conf").absolute()


def conf_folders() -> tuple[Path, ...]:
    """The folders in which a configuration file is looked for; the first that has it wins. The shipped one is the last.

    In a checkout ``./conf`` is the shipped folder, and the only one.
    """
    shipped = shipped_conf()
    if not os.path.isdir("conf") or os.path.samefile("conf", shipped):
        return (shipped,)
    return (user_conf(), shipped)


def find_groups(folders: tuple[Path, ...]) -> Groups:
    """The options of every group, from all `folders`. The last folder says which groups there are.

    ``conf/model/mine.yaml`` and ``launcher/conf/model/tiny.yaml`` give ``{"model": ["mine", "tiny"]}``.
    """
    groups = sorted(folder.name for folder in folders[-1].iterdir() if folder.is_dir())
    return {group: sorted({name for folder in folders for name in _options(folder / group)}) for group in groups}


def replaced_files(folders: tuple[Path, ...]) -> list[Path]:
    """The files of the user's that are taken instead of shipped ones of the same name."""
    *own, shipped = folders
    options = [(group, name) for group, names in find_groups((shipped,)).items() for name in names]
    files = [folder / group / f"{name}.yaml" for folder in own for group, name in options]
    return [file for file in files if file.is_file()]


def put_own_packages_first() -> None:
    """Let this process import the `train` beside this package, whatever the current folder and PYTHONPATH hold.

    Call it before `train` is imported. Child processes get `child_environment`.
    """
    # `python -m launcher` in /home/ada, where there is a train.py, starts with
    #     sys.path = ["/home/ada", "/usr/lib/python311.zip", ..., "/usr/lib/python3.11/site-packages"]
    # and `import train` would run that file. An empty entry of PYTHONPATH stands for the current folder too.
    if not _is_here(str(SOURCE_DIR)):
        sys.path[:] = [entry for entry in sys.path if not _is_here(entry)]
    found = find_spec("train")
    if found is None or found.origin is None or Path(found.origin).resolve().parents[1] != SOURCE_DIR:
        sys.path.insert(0, str(SOURCE_DIR))


def child_environment() -> dict[str, str]:
    """The environment in which ``python -m train.…`` runs the `train` beside this package, whatever folder it is started in."""
    path = python_path(SOURCE_DIR)
    # site-packages on PYTHONPATH would come before the standard library, which old packages there may shadow. Without a PYTHONPATH
    # Python looks there anyway.
    if path == os.path.realpath(sysconfig.get_path("purelib")):
        path = ""
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def python_path(code: Path) -> str:
    """PYTHONPATH for a process that imports `launcher` and `train` from `code`; the user's own entries follow.

    Empty entries, as in ``/opt/tools:``, are left out: they stand for the current folder.
    """
    users = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(code), *filter(None, users)])


def _is_here(entry: str) -> bool:
    """Whether an entry of `sys.path` is the current folder."""
    try:
        return os.path.samefile(entry or ".", ".")
    except OSError:
        return False


def _options(folder: Path) -> list[str]:
    """The names of the YAML files below `folder`, without suffix; hidden ones left out."""
    files = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml"))
    return [str(file) for file in files if not any(part.startswith(".") for part in file.parts)]
