"""Whether other users could write into a folder: jobs run code from the sweep's folder, so no other user may put code there.

Checked are the owner, the permissions and POSIX ACLs (acl(5)). Linux keeps an ACL in an extended attribute: a version, then for each
entry a tag, its permissions and its user or group. Parent folders are not checked: on a cluster they often belong to a project and
are shared with a group.

Light on purpose: the launcher checks before anything is submitted.
"""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from train.errors import BadInput
from train.store.layout import SweepDir
from train.store.storage import readable

ACL = "system.posix_acl_access"
ACL_VERSION = struct.Struct("<I")
ACL_ENTRY = struct.Struct("<HHI")
NAMED_USER = 0x02
OWNING_GROUP = 0x04
NAMED_GROUP = 0x08
WRITE = 0x02


def refuse_shared(sweep: SweepDir) -> None:
    """Refuse a sweep if others could write into its root, or where its code and its jobs lie.

    Raises:
        BadInput: naming the folder, who can write there, and how to end that.
    """
    for folder in (sweep.path.parent, sweep.path, sweep.jobs, sweep.code):
        with readable(folder):
            if folder.exists():
                _refuse_shared_folder(folder)
    with readable(sweep.code):
        for folder in sweep.code.glob("*"):
            _refuse_shared_folder(folder)


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that the user may not write or create, before hours go into fetching what its runs need.

    Raises:
        BadInput: naming the nearest folder that exists.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(f"{nearest} is not writable for you, so nothing can be kept in {folder}; choose another root=.")


def _refuse_shared_folder(folder: Path) -> None:
    info = folder.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise BadInput(f"{folder} is not a folder; choose another root=.")
    if info.st_uid != os.getuid():
        raise BadInput(f"{folder} belongs to another user (uid {info.st_uid}); choose a root= of your own.")
    for who in _other_writers(folder, info):
        path = shlex.quote(str(folder))
        remedy = f"setfacl -b {path} && chmod -R go-w {path}" if _acl(folder) else f"chmod -R go-w {path}"
        raise BadInput(f"{folder} can be written by others ({who}); run '{remedy}' or choose another root=.")


def _other_writers(folder: Path, info: os.stat_result) -> Iterator[str]:
    """Who may write apart from the owner, in words."""
    if info.st_mode & stat.S_IWOTH:
        yield "everybody"
    # With an ACL the mode's group bits are the ACL's mask, the most that any of its entries grants. Without the write bit there, no
    # user or group in the ACL can write.
    if not info.st_mode & stat.S_IWGRP:
        return
    # Without an ACL the group bits are the owning group's permissions, as if that was the only entry.
    entries = _acl(folder) or [(OWNING_GROUP, WRITE, 0)]
    for tag, permissions, number in entries:
        gid = info.st_gid if tag == OWNING_GROUP else number
        if not permissions & WRITE:
            continue
        if tag in {OWNING_GROUP, NAMED_GROUP} and not _is_own_group(gid):
            yield f"group {gid}"
        if tag == NAMED_USER and number != os.getuid():
            yield f"user {number}"


def _acl(folder: Path) -> list[tuple[int, int, int]]:
    """Tag, permissions and user or group of each entry; empty if there is no ACL or the file system has none."""
    try:
        content = os.getxattr(folder, ACL)
    except OSError:
        return []
    # 4 bytes of version, then 8 bytes per entry: tag (2), permissions (2), user or group (4), little-endian.
    return list(ACL_ENTRY.iter_unpack(content[ACL_VERSION.size :]))


def _is_own_group(gid: int) -> bool:
    """Whether it is the private group that many systems create for each user, named like the user."""
    try:
        user = pwd.getpwuid(os.getuid())
        group = grp.getgrgid(gid)
    # Neither has a name, as in some containers.
    except KeyError:
        return gid == os.getgid() == os.getuid()
    return (user.pw_gid, user.pw_name) == (gid, group.gr_name) and set(group.gr_mem) <= {user.pw_name}
