"""What the store asks of the operating system."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mergepipe.store import filesystem
from mergepipe.store.errors import EnvironmentalError
from mergepipe.store.filesystem import (
    NETWORK_FILESYSTEMS,
    exchange,
    explain_os_error,
    filesystem_type,
    flush_directory,
    flush_files,
    flush_filesystem,
    refuse_network_filesystem,
    start_writeback,
    will_need,
    write_durably,
)

MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/sdb1 /home/local xfs rw 0 0
store /mnt/two\\040words lustre rw 0 0
old /mnt/twice ext4 rw 0 0
new /mnt/twice ceph rw 0 0
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/var/lib", "ext4"),
        ("/home/me/models", "nfs4"),
        ("/home", "nfs4"),
        ("/homeless", "ext4"),
        ("/home/local/x", "xfs"),
        ("/mnt/two words/x", "lustre"),
        ("/mnt/twice/x", "ceph"),
    ],
)
def test_the_deepest_mount_decides(path: str, kind: str) -> None:
    assert filesystem_type(Path(path), MOUNTS) == kind


@pytest.mark.parametrize("kind", sorted(NETWORK_FILESYSTEMS))
def test_network_filesystems_are_refused_with_a_way_out(kind: str) -> None:
    with pytest.raises(EnvironmentalError, match=kind) as caught:
        refuse_network_filesystem(Path("/data/.mp/catalog"), f"x /data {kind} rw 0 0\n/dev/sda1 / ext4 rw 0 0\n")
    assert "/data/.mp/catalog" in caught.value.message
    assert "mp init --catalog" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "nfsd"])
def test_local_ones_are_not(kind: str) -> None:
    refuse_network_filesystem(Path("/data"), f"x /data {kind} rw 0 0\n")


def test_a_link_onto_a_network_filesystem_is_seen(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    mounts = f"/dev/sda1 / ext4 rw 0 0\nserver:/x {tmp_path}/real nfs rw 0 0\n"
    assert filesystem_type(tmp_path / "link" / "catalog", mounts) == "nfs"


def test_this_machine_has_a_filesystem(tmp_path: Path) -> None:
    assert filesystem_type(tmp_path)
    refuse_network_filesystem(tmp_path)


def test_flushing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    flush_files([str(tmp_path / "a")])
    flush_directory(tmp_path)
    assert flush_filesystem(tmp_path) is hasattr(filesystem._libc(), "syncfs")
    with pytest.raises(FileNotFoundError):
        flush_filesystem(tmp_path / "missing")


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for content in (b"first", b"second, longer", b""):
        write_durably(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full while writing x"),
        (errno.EDQUOT, "the disk is full while writing x"),
        (errno.EACCES, "no permission while writing x (/a/b)"),
        (errno.EROFS, "no permission while writing x (/a/b)"),
        (errno.EIO, "the system refused while writing x: "),
    ],
)
def test_the_systems_errors_say_what_to_do(code: int, said: str) -> None:
    error = explain_os_error(OSError(code, os.strerror(code), "/a/b"), "writing x")
    assert isinstance(error, EnvironmentalError)
    assert error.exit_code == 8
    assert error.message.startswith(said)
    assert error.hint or code == errno.EIO


@pytest.mark.parametrize("has", [True, False])
def test_hints_to_the_kernel_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    if not has:
        monkeypatch.setattr(filesystem, "_libc", object)
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"content")
        start_writeback(file.fileno())
    assert [will_need(str(path), count) for count in (0, 4, 100)] == [b"", b"cont", b"content"]


@pytest.mark.parametrize("taken", [True, False])
def test_an_exchange_that_fails_gives_the_old_one_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Unless somebody has taken it by then: nothing of theirs is replaced."""
    (tmp_path / "new").mkdir()
    (tmp_path / "old").write_bytes(b"old")
    original, calls = Path.rename, 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            if taken:
                target.write_bytes(b"theirs")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, target)

    monkeypatch.setattr(filesystem, "_libc", object)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        exchange(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == (b"theirs" if taken else b"old")
    assert (tmp_path / "new.old").exists() is taken
    assert (tmp_path / "new").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_bytes(b"before")
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            write_durably(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
