"""Folders and files of the disk tier that other users of the machine can reach: refused, or left alone."""

import os
import re
import shutil
import stat

import pytest

from tests.kv.disk_helper import (
    FINGERPRINT,
    NUM_SLOTS,
    assert_usable,
    child,
    give_away,
    holds,
    open_store,
    segments,
    served,
    write,
)
from xllm.errors import ConfigError
from xllm.private_files import open_private_folder

# --- folders


def refused(folder, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_store(folder)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o707, 0o702, 0o770, 0o720, 0o2775])
def test_a_folder_that_others_can_write_to(tmp_path, mode):
    folder = tmp_path / FINGERPRINT.hex()[:16]
    folder.mkdir()
    folder.chmod(mode)
    who = "every user" if mode & 0o002 else f"group {folder.stat().st_gid}"
    refused(tmp_path, rf"the folder {re.escape(str(folder))} has mode {mode:04o}: {who} can plant files in it; "
                      rf"chmod go-w {re.escape(str(folder))}")  # fmt: skip
    assert list(folder.iterdir()) == [], "nothing was written there"
    folder.chmod(mode & ~0o022)
    assert_usable(tmp_path)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o500 | 0o200])
def test_a_folder_that_others_can_only_read(tmp_path, mode):
    tmp_path.chmod(mode)
    assert_usable(tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in segments(tmp_path)} == {0o600}


def test_a_folder_of_another_user(filled, monkeypatch):
    folder = segments(filled)[0].parent
    user = give_away(folder, monkeypatch)
    refused(filled, f"the folder {folder} belongs to user {user}.*chown")


@pytest.mark.parametrize("depth", [1, 2])
def test_a_world_writable_folder_above(tmp_path, depth):
    above = tmp_path / "above"
    folder = above / "between" / "kv" if depth == 2 else above / "kv"
    folder.mkdir(parents=True)
    above.chmod(0o777)
    refused(folder, rf"the folder {above}, above {folder}/\S+, has mode 0777: every user can.*chmod o-w {above}")
    above.chmod(0o1777)  # as /tmp
    assert_usable(folder)


def test_a_link_is_followed_and_where_it_lies_counts_too(tmp_path):
    real, public = tmp_path / "real", tmp_path / "public"
    real.mkdir(mode=0o700)
    public.mkdir()
    (public / "kv").symlink_to(real)
    assert_usable(public / "kv")
    public.chmod(0o777)
    refused(public / "kv", f"the folder {public}, above")
    public.chmod(0o755)
    tmp_path.chmod(0o777)
    refused(public / "kv", f"the folder {tmp_path}, above")


def test_missing_folders_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        assert_usable(tmp_path / "a" / "b" / "kv")
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len(made) == 4 and {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}


@pytest.mark.parametrize("make", [lambda path: path.write_text("in the way"), os.mkfifo,
                                  lambda path: path.symlink_to("/dev/null"), lambda path: path.symlink_to("nowhere")],
                         ids=["file", "fifo", "device", "broken-link"])  # fmt: skip
def test_what_is_no_folder(tmp_path, make):
    make(tmp_path / "kv")
    with pytest.raises(OSError, match="kv"):
        open_private_folder(tmp_path / "kv")


# --- files in it


def foreign_owner(path, monkeypatch):
    give_away(path, monkeypatch)


def others_write(path, monkeypatch):
    path.chmod(0o622)


def group_writes(path, monkeypatch):
    path.chmod(0o620)


def hard_link(path, monkeypatch):
    os.link(path, path.parent.parent / "elsewhere")


def link(path, monkeypatch):
    target = path.parent.parent / "elsewhere"
    shutil.move(path, target)
    path.symlink_to(target)


def fifo(path, monkeypatch):
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("change", [foreign_owner, others_write, group_writes, hard_link, link, fifo])
def test_a_segment_that_is_not_ours_alone(filled, change, monkeypatch):
    """It is left as it is and counted, its number goes to a new file, and the rest is served."""
    first = segments(filled)[0]
    if change is foreign_owner and os.geteuid() != 0:  # then every file is somebody else's, and the folder too
        change(filled, monkeypatch)
        refused(filled, "belongs to user")
        return
    content = first.read_bytes()
    change(first, monkeypatch)
    before = first.lstat()
    store = open_store(filled)
    assert served(store) == {2, 3, 4} and store.counters.num_ignored_files == 1
    write(store, 0, 60)
    assert holds(store, 0, 60)
    store.close()
    after = first.lstat()
    assert (after.st_ino, after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before.st_ino, before.st_mode, before.st_uid, before.st_mtime_ns)
    if change is not fifo:
        assert first.read_bytes() == content
    assert len(segments(filled)) == 4


@pytest.mark.parametrize("make", [lambda path, target: path.symlink_to(target),
                                  lambda path, target: os.link(target, path),
                                  lambda path, target: os.mkfifo(path)], ids=["link", "hard-link", "fifo"])  # fmt: skip
def test_the_writers_name_is_written_over_nobodys_file(tmp_path, make):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    open_store(tmp_path / "kv").close()
    (folder,) = (tmp_path / "kv").iterdir()
    (folder / "writer.pid").unlink()
    make(folder / "writer.pid", victim)
    store = open_store(tmp_path / "kv")
    assert victim.read_text() == "precious"
    assert (folder / "writer.pid").read_text() == f"{os.getpid()}\n" and not (folder / "writer.pid").is_symlink()
    store.close()


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo,
                                  lambda path: path.write_text("0\x1b[31m of nobody"), lambda path: path.mkdir()],
                         ids=["endless", "fifo", "text", "folder"])  # fmt: skip
def test_a_writers_name_that_is_none(tmp_path, make):
    with child("hold", str(tmp_path)) as process:
        assert process.stdout.readline() == "held\n"
        (folder,) = tmp_path.iterdir()
        (folder / "writer.pid").unlink()
        make(folder / "writer.pid")
        refused(tmp_path, "is in use by process unknown;")
        process.stdin.close()
    assert_slots_found(tmp_path)


def assert_slots_found(folder):
    store = open_store(folder)
    assert holds(store, 0, 0) and store.num_slots == NUM_SLOTS
    store.close()
