"""The files that a collection removes: those without a row, and those of objects whose rows went."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mergepipe.store.catalog import Writing
from mergepipe.store.digest import DIGEST_BYTES
from mergepipe.store.filesystem import explain_os_error

if TYPE_CHECKING:
    from mergepipe.store.store import Store

_FILES_A_LOCK: Final = 256  # writers wait while files are removed, so not for all of them
_UNFINISHED: Final = re.compile(r"(refs\.journal|store\.json)\.\d+\.part\Z")
_HEX: Final = frozenset("0123456789abcdef")


def stray_files(store: Store, limit: int) -> dict[Path, int]:
    """Files among the objects that have no row and are older than the limit, with their sizes."""
    found: dict[Path, int] = {}
    for folder in os.scandir(store.layout.objects):
        if not folder.is_dir(follow_symlinks=False) or len(folder.name) != 2:
            continue
        files = [entry for entry in os.scandir(folder.path) if entry.is_file(follow_symlinks=False)]
        with store.catalog.reading() as view:
            for entry in files:
                name = folder.name + entry.name
                if len(name) != 2 * DIGEST_BYTES or not set(name) <= _HEX:
                    continue  # not ours
                if view.get("objects", bytes.fromhex(name)) is None:
                    found.update(_old_file(entry, limit))
    return found


def _old_file(entry: os.DirEntry[str], limit: int) -> dict[Path, int]:
    """A file with its size, where it is older than the limit and nobody else has removed it meanwhile."""
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return {}
    return {Path(entry.path): status.st_size} if status.st_mtime < limit else {}


def unfinished_files(store: Store, limit: int) -> dict[Path, int]:
    """What a process left that was killed while it wrote the journal or the settings, with sizes."""
    found: dict[Path, int] = {}
    for entry in os.scandir(store.layout.root):
        if _UNFINISHED.match(entry.name) and entry.is_file(follow_symlinks=False):
            found.update(_old_file(entry, limit))
    return found


def remove_unfinished_files(store: Store, limit: int) -> dict[Path, int]:
    """The same, removed: under the write lock nobody is writing them now."""
    found = unfinished_files(store, limit)
    try:
        for path in found:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, "removing unfinished files") from error
    return found


def remove_files(store: Store, paths: Sequence[Path]) -> list[Path]:
    """Remove object files, but for those that have a row again: somebody may have written them anew.

    Returns those that were removed, or had been.
    """
    removed: list[Path] = []

    def removal(batch: Sequence[Path]) -> Callable[[Writing], None]:
        def remove(view: Writing) -> None:
            for path in batch:
                if view.get("objects", bytes.fromhex(path.parent.name + path.name)) is None:
                    path.unlink(missing_ok=True)
                    removed.append(path)

        return remove

    try:
        for start in range(0, len(paths), _FILES_A_LOCK):
            store.catalog.write(removal(paths[start : start + _FILES_A_LOCK]))
    except OSError as error:
        raise explain_os_error(error, "removing objects") from error
    return removed
