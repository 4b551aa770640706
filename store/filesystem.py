"""What the store asks of the operating system: durable writes, and which filesystem a path is on."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from mergepipe.store.errors import EnvironmentalError, MergePipeError

# Filesystems on which LMDB's shared memory map and locks do not hold between machines.
NETWORK_FILESYSTEMS: Final = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "glusterfs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.juicefs",
        "afs",
        "9p",
        "panfs",
        "orangefs",
        "pvfs2",
        "wekafs",
    ]
)

_SYNC_FILE_RANGE_WRITE: Final = 2
_RENAME_EXCHANGE: Final = 2
_HERE: Final = -100  # AT_FDCWD


def filesystem_type(path: Path, mounts: str | None = None) -> str:
    """The filesystem type of ``path`` from the kernel's mount table; empty where there is none to read."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    wanted = str(path.resolve())
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ")
        inside = mount == "/" or wanted == mount or wanted.startswith(mount + "/")
        if inside and len(mount) >= len(best):  # a later mount on the same point hides the earlier one
            best, kind = mount, fields[2]
    return kind


def refuse_network_filesystem(path: Path, mounts: str | None = None) -> None:
    """Raises EnvironmentalError where ``path`` is on a network filesystem."""
    kind = filesystem_type(path, mounts)
    if kind in NETWORK_FILESYSTEMS:
        raise EnvironmentalError(
            f"{path} is on a network filesystem ({kind}), where the catalog's locks do not hold",
            hint="Keep the catalog on a local disk beside shared objects: mp init --catalog /local/dir",
        )


def flush_filesystem(directory: Path) -> bool:
    """One flush of everything written to the filesystem of ``directory``; False where that call is missing."""
    call = getattr(_libc(), "syncfs", None)
    if call is None:
        return False
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if call(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))
    finally:
        os.close(descriptor)
    return True


def flush_files(paths: Iterable[str]) -> None:
    """Flush each file by itself: the slow way, for systems without ``syncfs``."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_directory(directory: Path) -> None:
    """Make a directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    flush_directory(path.parent)


def start_writeback(descriptor: int) -> None:
    """Ask the kernel to begin writing a file's dirty pages, so that the one flush at the end finds less to do."""
    call = getattr(_libc(), "sync_file_range", None)
    if call is not None:  # a hint: whether it works shows nowhere but in the time that the flush takes
        call(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def will_need(path: str, first_bytes: int) -> bytes:
    """Ask the kernel to read a file ahead; returns its first bytes. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which does not wait for who writes into a pipe
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        return os.pread(descriptor, first_bytes, 0) if first_bytes else b""
    finally:
        os.close(descriptor)


def exchange(new: Path, old: Path) -> Path:
    """Let ``new`` take the name of ``old``; returns where ``old`` lies then. In one step where the system can do that.

    Otherwise there is a moment in which neither has the name; whatever interrupts it, the old one gets it back.
    """
    call = getattr(_libc(), "renameat2", None)
    if call is not None and call(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return new
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        if not os.path.lexists(old):
            aside.rename(old)
        raise
    return aside


def explain_os_error(error: OSError, doing: str) -> MergePipeError:
    """The operating system's error as one that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentalError(
            f"the disk is full while {doing}",
            hint="Free some space and run the same command again. The store is as it was before.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = f" ({error.filename})" if error.filename else ""
        return EnvironmentalError(f"no permission while {doing}{where}", hint="Check the owner and mode of the folder.")
    return EnvironmentalError(f"the system refused while {doing}: {error}")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
