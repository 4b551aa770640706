"""``mp gc --previews``: take all previews away, and nothing else.

Their rows go first, in one transaction; then the files, each under the write lock and only where it has no row. A
process that dies in between leaves files without rows, which are garbage: whoever makes the same previews again puts
them in their place. The lock keeps a writer's new preview from being taken for the old one: files get their places only
inside a write transaction (:mod:`mergepipe.store.publish`).

Blocks, files and previews share one id space, so a commit might need an object that was stored as a preview (a file
with exactly a preview's content). All commits are asked first. Such an object stays.
"""

from __future__ import annotations

import os
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mergepipe.store.catalog import Reading, Writing
from mergepipe.store.digest import DIGEST_BYTES, Digest
from mergepipe.store.errors import ConflictError, DamagedError, NotFoundError
from mergepipe.store.frame import Kind
from mergepipe.store.gc_files import remove_files
from mergepipe.store.leases import is_abandoned
from mergepipe.store.usage import object_ids

if TYPE_CHECKING:
    from mergepipe.store.store import Store

_PATIENT_TRIES: Final = 4


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes: preview objects with their bytes on disk, and rows of the catalog's ``previews``."""

    ids: tuple[Digest, ...]
    freed_bytes: int
    rows: int


def plan_removal(store: Store) -> Removal:
    """What :func:`drop_previews` would remove now; changes nothing."""
    commits = _commits(store)
    needed = _needed(store, commits)
    with store.catalog.reading() as view:
        return _removal(view, needed)


def drop_previews(store: Store) -> Removal:
    """Remove all previews; returns what went.

    Raises:
        ConflictError: somebody is writing to the store, or merging, and may rely on them.
        DamagedError: a commit's tree cannot be read, so nobody knows what it needs.
    """
    _refuse_writers(store)
    removal, tries = None, 0
    while removal is None:
        tries += 1
        commits = _commits(store)
        try:
            needed = _needed(store, commits)
        except (DamagedError, NotFoundError):
            if _commits(store) != commits:
                continue  # a collection took a commit that was being asked
            raise
        change = partial(_remove_rows, store, commits, needed, patient=tries < _PATIENT_TRIES)
        removal = store.catalog.write(change)
    remove_files(store, [Path(store.layout.object_path(digest)) for digest in removal.ids])
    return removal


def _remove_rows(
    store: Store, commits: AbstractSet[Digest], needed: AbstractSet[Digest], view: Writing, *, patient: bool
) -> Removal | None:
    """None where somebody committed meanwhile: that one must be asked too.

    Where others commit all the time that would never end. So who is no longer ``patient`` asks here, and they wait.
    """
    _refuse_writers(store)  # again: one may have begun since
    now = {Digest(key) for key, _ in view.items("commits")}
    if now != commits:
        if patient:
            return None
        needed = _needed(store, now)
    found = _removal(view, needed)
    for digest in found.ids:
        view.delete("objects", digest)
        view.delete("damaged", digest)
    for key, value in list(view.items("previews")):
        view.delete("previews", key)
        if value and view.get("objects", value[:DIGEST_BYTES]) is None:
            view.delete("damaged", value[:DIGEST_BYTES])
    return found


def _commits(store: Store) -> set[Digest]:
    with store.catalog.reading() as view:
        return {Digest(key) for key, _ in view.items("commits")}


def _needed(store: Store, commits: AbstractSet[Digest]) -> set[Digest]:
    """Those of the objects that were stored as previews which commits need, as content or as a delta's base."""
    with store.catalog.reading() as view:
        previews, bases = set(), set()
        for key, _ in view.items("objects"):
            row = view.object_row(Digest(key))
            if row is not None and row.kind is Kind.PREVIEW:
                previews.add(Digest(key))
            if row is not None and row.base is not None:
                bases.add(row.base)
    needed = previews & bases
    for commit in commits if previews else ():
        needed |= previews & object_ids(store.snapshot_of(commit))
    return needed


def _removal(view: Reading, needed: AbstractSet[Digest]) -> Removal:
    ids, freed = [], 0
    for key, _ in view.items("objects"):
        row = view.object_row(Digest(key))
        if row is not None and row.kind is Kind.PREVIEW and key not in needed:
            ids.append(Digest(key))
            freed += row.stored_bytes
    return Removal(tuple(ids), freed, view.count("previews"))


def _refuse_writers(store: Store) -> None:
    with os.scandir(store.layout.temporary) as entries:
        busy = [entry.path for entry in entries if entry.is_dir() and not is_abandoned(Path(entry.path))]
    if busy:
        raise ConflictError(
            "somebody is writing to the store, or merging, and may be reading previews",
            hint=f"Wait until it is done. If nothing runs any more, on any machine, remove {busy[0]}.",
        )
