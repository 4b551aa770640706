"""Leases: which process a writer's folder under ``tmp/`` belongs to, and whether that process is gone.

A lease names the process, its host, and the boot and process namespace that its number is valid in, and its owner holds
it locked (flock) as long as it lives: the system lets go of that however a process ends. Under one kernel the lock says
it all, in containers too. Where it could not be had (older releases took none), a process is gone if host, boot and
namespace are this process's own and no such number runs. A lease of this host from before it was started is dead once
nothing has touched its folder for a day. Folders that cannot be judged are left alone.

So a folder has its name only while its lease is in it. It is made, and removed, under a name that begins with a dot: a
process that is killed then leaves what nobody takes for a writer at work, and what anybody may remove after a minute.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mergepipe.store.digest import DIGEST_BYTES, Digest

_NAME: Final = "lease.json"
_PINS: Final = "pins"
_RELIED_ON: Final = "relied-on"
_PATIENCE_SECONDS: Final = 60.0
_DAY_SECONDS: Final = 86400.0
_held: dict[Path, int] = {}  # descriptors of the leases that this process holds locked, by their folders


@dataclass(frozen=True, slots=True)
class Lease:
    """A folder whose owner runs, or may run. ``pinned``: commits that it is reading."""

    folder: Path
    pinned: frozenset[Digest]

    def relied_on(self) -> set[Digest]:
        """Objects that were in the store when the owner wanted to write them, and that it counts on. Raises OSError."""
        return set(_ids(self.folder / _RELIED_ON))


def make_folder(temporary: Path) -> Path:
    """Make a folder of this process's, with its lease in it; raises OSError."""
    folder = temporary / f"{int(time.time())}-{os.getpid()}-{secrets.token_hex(4)}"
    making = _nameless(folder)
    try:
        making.mkdir(parents=True)
        _held[folder] = write_lease(making)
        making.rename(folder)
    except OSError:
        _let_go(folder)
        shutil.rmtree(making, ignore_errors=True)
        raise
    return folder


def remove_folder(folder: Path) -> None:
    """Take a folder of work away, with its lease; never fails."""
    going = _nameless(folder)
    with suppress(OSError):
        folder.rename(going)
    for path in (folder, going):
        shutil.rmtree(path, ignore_errors=True)
    _let_go(folder)


def _let_go(folder: Path) -> None:
    descriptor = _held.pop(folder, -1)
    if descriptor >= 0:
        os.close(descriptor)


def _nameless(folder: Path) -> Path:
    """Where a folder is made or removed."""
    return folder if _is_nameless(folder) else folder.with_name(f".{folder.name}")


def _is_nameless(folder: Path) -> bool:
    return folder.name.startswith(".")


def _is_old(folder: Path, seconds: float = _PATIENCE_SECONDS) -> bool:
    """Whether nothing changed in it for so long that nobody is making or removing it any more."""
    try:
        times = [folder.lstat().st_mtime]
        with os.scandir(folder) as entries:
            times += [entry.stat(follow_symlinks=False).st_mtime for entry in entries]
    except OSError:
        return False
    return max(times) < time.time() - seconds


def write_lease(folder: Path) -> int:
    """Put this process's lease into its folder; returns the descriptor that holds it locked. Raises OSError.

    Whoever judges it reads it first, and it has no content before it is locked.
    """
    descriptor = os.open(folder / _NAME, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a filesystem without locks
            locked = False
        lease = {"pid": os.getpid(), "started": time.time(), **_surroundings(), "locked": locked}
        os.write(descriptor, json.dumps(lease).encode())
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def pin(folder: Path, commits: Iterable[Digest]) -> None:
    """Say in a lease's folder that these commits are being read, so that no collection takes their objects."""
    with (folder / _PINS).open("ab") as file:
        file.write(b"".join(commits))


class ReliedOn:
    """The file in a writer's folder that names what it relies on. Threads share it under the caller's lock."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _RELIED_ON
        self._descriptor = -1

    def add(self, digest: Digest) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(self._descriptor, digest)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def reading(temporary: Path, commits: Iterable[Digest]) -> Iterator[None]:
    """A lease for a reader. Where nothing can be written there, nothing can be collected either."""
    folder = None
    try:
        folder = make_folder(temporary)
        pin(folder, commits)
    except OSError:
        if folder is not None:
            remove_folder(folder)
        yield
        return
    try:
        yield
    finally:
        remove_folder(folder)


def living_leases(temporary: Path) -> list[Lease]:
    """The leases of all that run, and of all that cannot be judged. Raises OSError where they cannot be read."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(temporary) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [Lease(folder, frozenset(_ids(folder / _PINS))) for folder in folders if not is_abandoned(folder)]


def _ids(path: Path) -> Iterator[Digest]:
    """Ids one after the other; a last one that is not whole is still being written."""
    try:
        data = path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:  # it is over
        return
    for start in range(0, len(data) - DIGEST_BYTES + 1, DIGEST_BYTES):
        yield Digest(data[start : start + DIGEST_BYTES])


def is_abandoned(folder: Path) -> bool:
    """Whether nobody works in the folder: its writer certainly runs no more, or has not begun."""
    return _is_nameless(folder) or _is_dead(folder)


def _is_dead(folder: Path) -> bool:
    """Whether the folder has a lease, and the process that it names is certainly gone."""
    if not (folder / _NAME).is_file():  # in a stranger's store it may be a pipe, which nobody writes into
        return False
    try:
        lease = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        pid, started, locked = int(lease["pid"]), float(lease["started"]), lease.get("locked") is True
        here = _surroundings()
        different = {name for name, value in here.items() if lease.get(name) != value}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False
    if locked and here["boot"] and "boot" not in different:
        return not _is_locked(folder / _NAME)
    if "boot" in different and "host" not in different and here["boot"] and lease.get("boot"):
        return started < _boot_time() and _is_old(folder, _DAY_SECONDS) and not _is_locked(folder / _NAME)
    return not different and not _runs(pid)


def _is_locked(path: Path) -> bool:
    """Whether somebody holds a file locked, or that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_abandoned(temporary: Path) -> int:
    """Remove the folders of writers that are gone; returns how many."""
    removed = 0
    try:
        folders = [Path(entry.path) for entry in os.scandir(temporary) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return 0
    for folder in folders:
        if _is_dead(folder) or (_is_nameless(folder) and _is_old(folder)):
            remove_folder(folder)
            removed += 1
    return removed


def _surroundings() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "namespace": _namespace()}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _boot_time() -> float:
    """When this machine was started, as Unix time."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
