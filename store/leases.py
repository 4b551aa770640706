"""Leases: which process a writer's folder under ``tmp/`` belongs to, and whether that process is gone.

A lease names the process, its host, and the boot and process namespace that its number is valid in. A folder is only
taken for abandoned where all of these are this process's own and no such process runs any more: a process number means
nothing on another machine or in another container. Folders that cannot be judged are left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Final

_NAME: Final = "lease.json"


def write_lease(folder: Path) -> None:
    """Put this process's lease into its folder."""
    lease = {"pid": os.getpid(), "started": time.time(), **_surroundings()}
    (folder / _NAME).write_text(json.dumps(lease), encoding="utf-8")


def is_abandoned(folder: Path) -> bool:
    """Whether the folder's writer certainly runs no more."""
    try:
        lease = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        pid = int(lease["pid"])
        if any(lease.get(name) != value for name, value in _surroundings().items()):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not _runs(pid)


def remove_abandoned(temporary: Path) -> int:
    """Remove the folders of writers that are gone; returns how many."""
    removed = 0
    try:
        folders = [Path(entry.path) for entry in os.scandir(temporary) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return 0
    for folder in folders:
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def _surroundings() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "namespace": _namespace()}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


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
    except OSError:
        return True
    return True
