"""``mp recover``: make the catalog anew from the objects, and the refs from their journal.

The new catalog is built beside the old one, in ``catalog.recovering``, with a file ``incomplete`` in it until all of it
is on disk. Then the two folders change places in one step, and the old one is kept as ``catalog.lost-TIME``; nothing is
thrown away but what a recovery left that did not get so far. Killed at any point, there is the old catalog or the new
one, and a second run does the rest.

While it works nobody else may have the catalog open: a lock on LMDB's own lock file, of the kind by which LMDB finds
out whether it is alone, keeps newcomers waiting; and :mod:`mergepipe.store.catalog` looks whether the folder that it
waited for is still the one in this place. Without ``apply`` nothing is locked and nothing is written.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from mergepipe.store.catalog import DATA, LOCK, Writing, is_open_here, open_catalog, release_catalog
from mergepipe.store.commits import Commit
from mergepipe.store.digest import Digest
from mergepipe.store.errors import ConflictError, DamagedError
from mergepipe.store.filesystem import exchange, explain_os_error, flush_directory
from mergepipe.store.interrupts import too_late_to_interrupt
from mergepipe.store.journal import Journal, describe, read_journal, replace_journal
from mergepipe.store.layout import Layout
from mergepipe.store.leases import is_abandoned
from mergepipe.store.lmdb_file import Rows, read_databases
from mergepipe.store.parallel import Progress
from mergepipe.store.rebuild import Found, children_rows, is_whole, scan
from mergepipe.store.refs import LOST
from mergepipe.store.restore_refs import Restored, restore

DERIVED: Final = ("deltas", "tensors", "results")
_COMPARED: Final = ("objects", "commits", "children", "refs", "reflog", "previews", "meta")
_INCOMPLETE: Final = "incomplete"
_ROWS_A_TRANSACTION: Final = 20_000


@dataclass
class Recovery:
    """What there is to recover, or was recovered.

    ``catalog``: why the old catalog cannot be read, or empty. ``differences``: what a catalog that can be read has
    otherwise, by database. ``kept``: where the old catalog lies now, None where nothing was changed.
    """

    found: Found
    restored: Restored
    journal: Journal | None
    catalog: str
    differences: dict[str, str] = field(default_factory=dict)
    applied: bool = False
    kept: Path | None = None

    @property
    def is_needed(self) -> bool:
        return bool(self.catalog or self.differences)

    @property
    def commits(self) -> dict[Digest, Commit]:
        """The commits that the new catalog has."""
        left_out = set(self.restored.unfinished)
        return {digest: commit for digest, commit in self.found.commits.items() if digest not in left_out}

    @property
    def lost(self) -> list[Digest]:
        """Commits that others were made from, and that are not there."""
        commits = self.commits
        parents = {parent.commit for commit in commits.values() for parent in commit.parents}
        return sorted(parents - commits.keys())

    def rows(self) -> dict[str, Rows]:
        """All rows of the new catalog, by database."""
        refs, reflog = self.restored.rows()
        commits = self.commits
        return {
            "objects": {digest: row.pack() for digest, row in self.found.objects.items()},
            "damaged": {digest: b"" for digest in self.found.damaged if digest in self.found.objects},
            "commits": {digest: self.found.commit_rows[digest] for digest in commits},
            "children": children_rows(commits),
            "previews": dict(self.found.previews),
            "refs": refs,
            "reflog": reflog,
            "meta": {LOST: b"".join(self.lost)} if self.lost else {},
        }


def recover(
    layout: Layout, *, apply: bool = False, full: bool = False, progress: Progress | None = None
) -> Recovery:  # fmt: skip
    """Say what can be recovered; with ``apply`` do it, where the old catalog is not what it should be.

    ``full`` reads all objects whole, and not only their headers.

    Raises:
        ConflictError: somebody has the store open, or is writing to it.
        DamagedError: the folder of the objects is not there.
        EnvironmentalError: the disk is full, or the like; the old catalog is in its place.
    """
    if not layout.objects.is_dir():  # not mounted, perhaps: an empty catalog would say that there was never anything
        raise DamagedError(f"there are no objects: {layout.objects} is not there", hint="Put the folder back first.")
    try:
        if not apply:
            return _look(layout, full=full, progress=progress)
        with _alone(layout):
            _tidy(layout.catalog.resolve())
            recovery = _look(layout, full=full, progress=progress)
            if recovery.is_needed:
                recovery.kept = _put_in_place(layout, recovery)
            recovery.applied = True
            return recovery
    except OSError as error:
        raise explain_os_error(error, "recovering the catalog") from error


def _look(layout: Layout, *, full: bool, progress: Progress | None) -> Recovery:
    old, why = _old_rows(layout.catalog / DATA)
    found = scan(layout, full=full, progress=progress)
    journal = read_journal(layout.journal)
    restored = restore(journal, old, found.commits, lambda digest: is_whole(layout, found, digest))
    recovery = Recovery(found, restored, journal, why)
    if old is not None:
        recovery.differences = _differences(recovery.rows(), old)
    return recovery


def _old_rows(data: Path) -> tuple[dict[str, Rows] | None, str]:
    """The old catalog's rows, or None and why they cannot be read."""
    try:
        if data.stat().st_size == 0:
            return None, f"{data} is empty"
        return read_databases(data), ""
    except (FileNotFoundError, NotADirectoryError):
        return None, f"{data} is not there"
    except DamagedError as error:
        return None, error.message
    except OSError as error:
        return None, f"{data} cannot be read: {error}"


def _differences(new: Mapping[str, Rows], old: Mapping[str, Rows]) -> dict[str, str]:
    """What the old catalog has otherwise; empty rows of previews, and when objects were relied on, do not count."""
    found = {}
    for name in _COMPARED:
        wanted, had = _comparable(name, new[name]), _comparable(name, old.get(name, {}))
        missing, extra = len(wanted.keys() - had.keys()), len(had.keys() - wanted.keys())
        other = sum(had[key] != value for key, value in wanted.items() if key in had)
        counts = ((missing, "missing"), (extra, "too many"), (other, "different"))
        if any(count for count, _ in counts):
            found[name] = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    return found


def _comparable(name: str, rows: Rows) -> Rows:
    if name == "objects":
        return {key: value[:24] + value[32:] for key, value in rows.items()}
    if name == "meta":
        return {key: value for key, value in rows.items() if key == LOST}
    return {key: value for key, value in rows.items() if value} if name == "previews" else rows


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Nobody else has the catalog open, or opens it, while this lasts; raises ConflictError."""
    if is_open_here(layout.catalog):
        raise ConflictError("this process has the store open", hint="Close it first.")
    with ExitStack() as held:
        _lock(held, layout.root, os.O_RDONLY, "another `mp recover` is at work here")
        catalog = layout.catalog.resolve()
        if catalog.is_dir():
            _lock(held, catalog / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, "somebody has the store open")
        busy = _writers(layout)
        if busy:
            raise ConflictError(
                "somebody is writing to the store, or reading from it",
                hint=f"Wait until it is done. If nothing runs any more, on any machine, remove {busy[0]}.",
            )
        yield


def _lock(held: ExitStack, path: Path, flags: int, busy: str) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    held.callback(os.close, descriptor)
    try:
        if flags & os.O_RDWR:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)  # where LMDB has its own
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ConflictError(busy, hint="Wait until it is done, and run the command again.") from error


def _writers(layout: Layout) -> list[str]:
    try:
        with os.scandir(layout.temporary) as entries:
            folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [folder for folder in folders if not is_abandoned(Path(folder))]


def _put_in_place(layout: Layout, recovery: Recovery) -> Path | None:
    """Build the new catalog and let it take the old one's place; returns where the old one is kept."""
    catalog, stamp = layout.catalog.resolve(), _stamp()
    building = _beside(catalog)
    journal = _build(building, recovery.rows())
    with too_late_to_interrupt():
        _keep_journal(layout.journal, journal, stamp)
        kept = _swap(building, catalog, _free(catalog, stamp))
        replace_journal(layout.journal, journal)
    return kept


def _tidy(catalog: Path) -> None:
    """What a recovery left that was killed: an unfinished catalog goes; a whole one, old or new, is kept."""
    building = _beside(catalog)
    for left in (building, building.with_name(f"{building.name}.old")):
        if (left / _INCOMPLETE).exists():
            shutil.rmtree(left)
        elif os.path.lexists(left):
            left.replace(_free(catalog, _stamp()))


def _beside(catalog: Path) -> Path:
    return catalog.with_name(f"{catalog.name}.recovering")


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _build(building: Path, rows: Mapping[str, Rows]) -> bytes:
    """Write a new catalog, whole and flushed; returns the journal that goes with it."""
    building.mkdir(parents=True)
    incomplete = building / _INCOMPLETE
    incomplete.touch()
    flush_directory(building)
    catalog = open_catalog(building, create=True)
    try:
        for name, items in rows.items():
            keys = sorted(items)
            for start in range(0, len(keys), _ROWS_A_TRANSACTION):
                some = {key: items[key] for key in keys[start : start + _ROWS_A_TRANSACTION]}
                catalog.write(partial(_put, name=name, rows=some))
        journal = catalog.write(describe)
    finally:
        release_catalog(catalog)
    incomplete.unlink()
    flush_directory(building)
    flush_directory(building.parent)
    return journal


def _put(view: Writing, name: str, rows: Rows) -> None:
    for key, value in rows.items():
        view.put(name, key, value)


def _swap(building: Path, catalog: Path, aside: Path) -> Path | None:
    if os.path.lexists(catalog):
        exchange(building, catalog).replace(aside)
    else:
        building.replace(catalog)
    flush_directory(catalog.parent)
    return aside if os.path.lexists(aside) else None


def _keep_journal(path: Path, new: bytes, stamp: str) -> None:
    """The journal that is there stays under another name, where the new one says anything else."""
    if not os.path.lexists(path):
        return
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):  # whatever that is, it is not read
        path.replace(_free(path, stamp))
    elif found.st_size != len(new) or path.read_bytes() != new:
        aside = _free(path, stamp)
        try:
            os.link(path, aside)
        except OSError:  # not every filesystem has links
            shutil.copyfile(path, aside)


def _free(path: Path, stamp: str) -> Path:
    """``catalog.lost-TIME``, with a number behind it where there is one already."""
    name = path.with_name(f"{path.name}.lost-{stamp}")
    number = 1
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f"{path.name}.lost-{stamp}-{number}")
    return name
