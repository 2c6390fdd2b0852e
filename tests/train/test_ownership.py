"""Who else may write into a folder, by its permissions and its ACL."""

import grp
import os
import pwd
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest

from train.errors import BadInput
from train.store.layout import SweepDir
from train.store.permissions import refuse_shared

NOBODY = 0xFFFFFFFF
WRITE, READ = 7, 5


def put_acl(folder: Path, *entries: tuple[int, int, int], mask: int = WRITE) -> None:
    """An ACL with the owner's full rights and these entries of tag, permissions and number."""
    whole = [(0x01, 7, NOBODY), *entries, (0x04, 0, NOBODY), (0x10, mask, NOBODY), (0x20, 0, NOBODY)]
    packed = b"".join(struct.pack("<HHI", *entry) for entry in sorted(whole))
    os.setxattr(folder, "system.posix_acl_access", struct.pack("<I", 2) + packed)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDir:
    sweep = SweepDir(tmp_path / "runs" / "mine")
    sweep.code.mkdir(parents=True)
    for folder in (sweep.path.parent, sweep.path, sweep.code):
        folder.chmod(0o755)
    return sweep


def test_what_only_others_read_is_fine(sweep: SweepDir) -> None:
    refuse_shared(sweep)
    put_acl(sweep.path, (0x02, READ, 12345))
    refuse_shared(sweep)


def test_a_folder_that_is_not_there_yet_is_fine(tmp_path: Path) -> None:
    refuse_shared(SweepDir(tmp_path / "new" / "mine"))


def test_the_group_of_the_user_alone_may_write_and_another_may_not(
    sweep: SweepDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    gid, uid = os.getgid(), os.getuid()
    me = pwd.struct_passwd(("me", "x", uid, gid, "", "", ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: me)
    sweep.path.chmod(0o775)
    for name, members, refused in (("me", [], False), ("me", ["you"], True), ("users", [], True)):
        group = grp.struct_group((name, "x", gid, members))
        monkeypatch.setattr(grp, "getgrgid", lambda _gid, group=group: group)
        with pytest.raises(BadInput, match=f"group {gid}") if refused else nullcontext():
            refuse_shared(sweep)


@pytest.mark.parametrize(("tag", "who"), [(0x02, "user 12345"), (0x08, "group 12345")])
def test_an_acl_may_let_nobody_else_write(sweep: SweepDir, tag: int, who: str) -> None:
    put_acl(sweep.code, (tag, WRITE, 12345))
    with pytest.raises(BadInput, match=f"can be written by others \\({who}\\); run 'setfacl -b"):
        refuse_shared(sweep)
    put_acl(sweep.code, (tag, WRITE, 12345), mask=READ)
    refuse_shared(sweep)


def test_an_acl_entry_for_the_user_is_fine(sweep: SweepDir) -> None:
    put_acl(sweep.code, (0x02, WRITE, os.getuid()))
    refuse_shared(sweep)


def test_a_file_in_the_place_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(BadInput, match="is not a folder"):
        refuse_shared(SweepDir(tmp_path / "runs" / "mine"))
