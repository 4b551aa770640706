"""Who writes to a store, or did: the folders under ``tmp/``, judged by their leases, and the clocks that they show."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mergepipe.store.catalog import DATA
from mergepipe.store.findings import Finding, warning, well
from mergepipe.store.layout import Layout
from mergepipe.store.leases import is_abandoned
from mergepipe.store.sizes import format_size

_DAY_SECONDS: Final = 86400.0
_SKEW_SECONDS: Final = 60.0
_LEASE: Final = "lease.json"


@dataclass(frozen=True, slots=True)
class Writer:
    """One folder under ``tmp/``. ``host`` and ``pid`` as its lease says; times are Unix times."""

    folder: Path
    abandoned: bool
    host: str
    pid: int
    started: float
    bytes: int


def writers(layout: Layout) -> list[Writer]:
    """All folders of writers, the oldest first; none where they cannot be listed."""
    try:
        with os.scandir(layout.temporary) as entries:
            folders = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted((_writer(folder) for folder in folders), key=lambda writer: writer.started)


def look_at_writers(layout: Layout) -> Iterator[Finding]:
    """What writers left behind, and who is at work."""
    now = time.time()
    found = writers(layout)
    gone = [writer for writer in found if writer.abandoned]
    others = [writer for writer in found if not writer.abandoned]
    old = [writer for writer in others if now - writer.started > _DAY_SECONDS]
    if gone:
        yield warning(
            "writers",
            f"{len(gone)} commands died and left {format_size(sum(each.bytes for each in gone))} in tmp/",
            "Nothing to do: the next command that writes removes it.",
        )
    for writer in old:
        days = (now - writer.started) / _DAY_SECONDS
        yield warning(
            "writers",
            f"{writer.folder.name}, of process {writer.pid or '?'} on {writer.host or 'an unknown machine'}, is "
            f"{days:.0f} days old and takes {format_size(writer.bytes)}; whether it still runs cannot be told from here"
            if not _is_here(writer)
            else f"process {writer.pid} has been writing for {days:.0f} days ({format_size(writer.bytes)})",
            f"If nothing runs any more, on any machine, remove {writer.folder}. Until then gc keeps what it relies on.",
        )
    at_work = len(others) - len(old)
    if at_work:
        yield well("writers", f"{at_work} at work now")
    elif not found:
        yield well("writers", "nobody is writing, and nothing was left behind")


def look_at_clock(layout: Layout) -> Iterator[Finding]:
    """Whether anything was written in the future: then this machine's clock, or another's, is wrong."""
    now = time.time()
    times = [writer.started for writer in writers(layout)]
    for path in (layout.catalog / DATA, layout.temporary, layout.objects, *layout.temporary.glob("*")):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    ahead = max(times, default=now) - now
    if ahead > _SKEW_SECONDS:
        yield warning(
            "clock",
            f"something was written {ahead:,.0f} seconds in the future: a clock is wrong, here or on a machine that "
            "shares the store",
            "Set the clocks (NTP). gc judges by age what is too young to go.",
        )
    else:
        yield well("clock", "nothing in the store is from the future")


def _writer(folder: Path) -> Writer:
    host, pid = "", 0
    started = _modified(folder)
    try:
        text = (folder / _LEASE).read_text(encoding="utf-8") if (folder / _LEASE).is_file() else ""
        lease = json.loads(text)
        host, pid, started = str(lease["host"]), int(lease["pid"]), float(lease["started"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass  # still being made, or damaged: nobody knows whose it is
    size = 0
    for path in folder.glob("*"):
        try:
            size += path.lstat().st_size
        except OSError:
            continue
    return Writer(folder, is_abandoned(folder), host, pid, started, size)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _is_here(writer: Writer) -> bool:
    return writer.host == os.uname().nodename
